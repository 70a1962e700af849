"""Tokenizers built in code, tiny models, and rows, for the tests of the tasks."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bayestune.tasks import Row

VOCABULARY = 320
SPACE = "\u0120"  # how byte-level vocabularies write a blank


def _byte_vocabulary(first_id: int) -> dict[str, int]:
    return {symbol: first_id + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _finish(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


def byte_level(*merges: tuple[str, str], boundary: bool = True, pad: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these merges; without `boundary` they may join words. No pad token unless asked for."""
    vocabulary = _byte_vocabulary(0)
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=boundary)
    tokenizer.decoder = decoders.ByteLevel()
    if pad:
        tokenizer.add_special_tokens(["<pad>"])
    return _finish(tokenizer, **({"pad_token": "<pad>"} if pad else {}))


def lettered() -> PreTrainedTokenizerFast:
    """Byte-level BPE where " A" to " E" are one token each, as in GPT-2 and Llama 3."""
    return byte_level(*[(SPACE, letter) for letter in "ABCDE"])


def merging() -> PreTrainedTokenizerFast:
    """Byte-level BPE where ": A" to ": E" are one token each: the label merges with the end of the prompt."""
    return byte_level((":", SPACE), *[(f":{SPACE}", letter) for letter in "ABCDE"], boundary=False)


def merging_one() -> PreTrainedTokenizerFast:
    """Byte-level BPE where only ": C" is one token."""
    return byte_level((SPACE, "C"), (":", f"{SPACE}C"), boundary=False)


def two_tokens() -> PreTrainedTokenizerFast:
    """Byte-level, with letters rewritten as Greek and Cyrillic ones of two bytes: no label is one token."""
    tokenizer = byte_level()
    greek = [normalizers.Replace(letter, other) for letter, other in zip("ABCDE", "αβдéж", strict=True)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(greek)
    return tokenizer


def sentencepiece(*, prefix: str = "always", eos: bool = False) -> PreTrainedTokenizerFast:
    """Metaspace BPE as SentencePiece makes it: BOS in front, a blank before the first word or not, EOS or not."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 3}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in map(chr, range(33, 70)):
        vocabulary[character] = len(vocabulary)
    merges = [("▁", letter) for letter in "ABCDE"]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return _finish(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encoder() -> PreTrainedTokenizerFast:
    """Byte-level with [CLS] a [SEP] b [SEP] and token types, as BERT's."""
    tokenizer = Tokenizer(models.BPE(vocab={"[PAD]": 0, **_byte_vocabulary(1), "[CLS]": 257, "[SEP]": 258}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 257), ("[SEP]", 258)],
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


CAUSAL_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "lettered": lettered,
    "plain bytes": byte_level,
    "with pad": lambda: byte_level((SPACE, "A"), pad=True),
    "merging": merging,
    "merging one": merging_one,
    "two tokens": two_tokens,
    "sentencepiece": sentencepiece,
    "sentencepiece without prefix": lambda: sentencepiece(prefix="never"),
    "sentencepiece with EOS": lambda: sentencepiece(eos=True),
}


@pytest.fixture(params=CAUSAL_TOKENIZERS)
def causal_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return CAUSAL_TOKENIZERS[request.param]()


@pytest.fixture
def tokenizers() -> dict[str, Callable[[], PreTrainedTokenizerFast]]:
    return {**CAUSAL_TOKENIZERS, "encoder": encoder}


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 1024}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Large enough weights that probabilities differ from uniform, and padding from text, by far more than the bounds.
_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, initializer_range=0.2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2)
    ),
    "bert choice": lambda: BertForMultipleChoice(BertConfig(**_SIZES, **_NO_DROPOUT, initializer_range=0.2)),
    "bert reward": lambda: BertForSequenceClassification(
        BertConfig(**_SIZES, **_NO_DROPOUT, initializer_range=0.2, num_labels=1)
    ),
    "llama reward": lambda: LlamaForSequenceClassification(
        LlamaConfig(**_SIZES, initializer_range=0.2, num_labels=1, pad_token_id=2)
    ),
    "bert classes": lambda: BertForSequenceClassification(BertConfig(**_SIZES, **_NO_DROPOUT, initializer_range=0.2)),
}


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """A tiny model by name, in evaluation mode, the same each time."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return _MODELS[name]().to(dtype).eval()

    return make


@pytest.fixture
def questions() -> list[Row]:
    """Sixteen questions of different lengths; the last three have 3, 5 and 2 choices."""
    words = "why do birds sing when rain falls on the old red barn at noon in May".split()
    rows = [
        Row(
            id=f"q{i}",
            question=" ".join(words[i % 5 : 4 + i]) + "?",
            choices=tuple(f"{word} {i}" for word in words[i % 7 : i % 7 + 4]),
            answer=i % 4,
        )
        for i in range(13)
    ]
    for count in (3, 5, 2):
        rows.append(Row(id=f"c{count}", question="How many?", choices=tuple(words[:count]), answer=1))
    return rows
