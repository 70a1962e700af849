"""A tiny causal model, a tiny encoder and data for them, as folders: what the command line is pointed at."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

COLOURS = ("red", "green", "blue", "black")
THINGS = ("cup", "hat", "door", "leaf", "ball", "coat", "pen", "boat", "lamp", "kite")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a pad."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )


def questions(start: int, count: int) -> list[dict[str, Any]]:
    """Rows whose answer is the colour named in the question; each has two to four choices."""
    rows = []
    for i in range(start, start + count):
        colour, thing, width = COLOURS[i % 4], THINGS[i % 10], 2 + i % 3
        others = [other for other in COLOURS if other != colour][: width - 1]
        place = i % width
        choices = [*others[:place], colour, *others[place:]]
        rows.append({"id": f"q{i}", "question": f"The {thing} is {colour}", "choices": choices, "answer": place})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """`folder` with the data sets "colours" and, for what was not trained on, "others"."""
    write_rows(folder / "colours" / "train.jsonl", questions(0, 16))
    write_rows(folder / "colours" / "dev.jsonl.gz", questions(16, 10))
    write_rows(folder / "others" / "dev.jsonl", questions(40, 6))
    return folder


def pretrained_llama(folder: Path, **settings: Any) -> Path:
    """A Llama of two layers that has read a few prompts, with its byte-level tokenizer, saved to `folder`."""
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **settings,
        )
        model = LlamaForCausalLM(config)
        texts = [f"{row['question']}? {row['choices'][row['answer']]}" for row in questions(100, 8)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pretrained_bert(folder: Path) -> Path:
    """A BERT of two layers without a head, saved to `folder`."""
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(bert_config(len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_config(vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=vocabulary - 1,
    )
