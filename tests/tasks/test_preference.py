"""Preferences: the loss and the probability of a Bradley-Terry model, its rows, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, DataError, TaskError
from bayestune.tasks import DatasetSpec, Preference, PreferenceRow, classification, preference, read_rows
from models import scatter
from toys import write_rows

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]

SPEC = DatasetSpec(name="pairs", folder="pairs", row=PreferenceRow, classes=2)
ROWS = [
    PreferenceRow(id="a", prompt="Why is the sky blue? ", chosen="It scatters light.", rejected="No."),
    PreferenceRow(id="b", chosen="Yes", rejected="Not at all, and never since"),
    PreferenceRow(id="c", prompt="2 + 2 = ", chosen="4", rejected="5"),
]
GOOD = {"id": "p", "prompt": "Q: ", "chosen": "a", "rejected": "b"}


def with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, whose padding has an id of its own."""
    tokenizer.pad_token = "<unk>"
    return tokenizer


def case(name: str, tokenizers: Tokenizers, build: Build, dtype: torch.dtype) -> tuple[Preference, PreTrainedModel]:
    tokenizer = tokenizers["encoder"]() if name == "bert" else with_pad(tokenizers["sentencepiece"]())
    return Preference(SPEC, tokenizer, data=None, max_tokens=100), build(f"{name} reward", dtype)


def reward(task: Preference, model: PreTrainedModel, text: str) -> Tensor:
    """The reward of one text, without padding, ended by hand."""
    eos = task.tokenizer.eos_token or ""
    return model(**task.tokenizer(text + eos, return_tensors="pt")).logits[0, 0]


@pytest.mark.property("N07")
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_loss_is_minus_log_sigmoid_of_the_difference_of_rewards(
    tokenizers: Tokenizers, build: Build, name: str, dtype: torch.dtype, bound: float
) -> None:
    """Those of each text alone, without its neighbors and their padding; and so is the gradient."""
    task, model = case(name, tokenizers, build, dtype)
    batch = task.collate([task.example(row) for row in ROWS])
    assert batch["input_ids"].shape[:2] == (3, 2) and not batch["attention_mask"].all()
    loss = task.loss(model, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), next(model.parameters()))
    chosen = torch.stack([reward(task, model, row.prompt + row.chosen) for row in ROWS])
    rejected = torch.stack([reward(task, model, row.prompt + row.rejected) for row in ROWS])
    expected = -logsigmoid(chosen - rejected)
    (alone,) = torch.autograd.grad(expected.sum(), next(model.parameters()))
    scale = max(1.0, alone.abs().max().item())
    assert (loss - expected).abs().max() <= bound
    assert (gradient - alone).abs().max() <= bound * scale
    assert expected.detach().std() > 0.01


@pytest.mark.parametrize(
    ("name", "chosen", "ending"),
    [
        ("sentencepiece", "4", ["4", "</s>"]),
        ("sentencepiece", "4</s>", ["4", "</s>"]),
        ("sentencepiece with EOS", "4", ["4", "</s>"]),
        ("plain bytes", "14", ["1", "4"]),
        ("encoder", "4", ["4", "[SEP]"]),
    ],
)
def test_the_eos_follows_the_text_once(tokenizers: Tokenizers, name: str, chosen: str, ending: list[str]) -> None:
    """Also where the tokenizer, or the row, has put it there; and nothing where the tokenizer has none."""
    tokenizer = tokenizers[name]()
    row = PreferenceRow(id="r", prompt="2 + 2 = ", chosen=chosen, rejected="5")
    encoding = Preference(SPEC, tokenizer, data=None, max_tokens=100).example(row)["encodings"][0]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"])[-2:] == ending
    assert {len(ids) for ids in encoding.values()} == {len(encoding["input_ids"])}


def test_two_texts_in_the_other_order_have_the_other_probability(tokenizers: Tokenizers, build: Build) -> None:
    task, base = case("bert", tokenizers, build, torch.float64)
    model = gaussian(base, "query", "value", alpha=32)
    swapped = [PreferenceRow(id=r.id, prompt=r.prompt, chosen=r.rejected, rejected=r.chosen) for r in ROWS]
    one, other = (bt.predict(model, task, rows, draws=5) for rows in (ROWS, swapped))
    assert (one.probs[:, 0] - other.probs[:, 1]).abs().max() <= 1e-12
    assert (one.epistemic - other.epistemic).abs().max() <= 1e-12
    assert one.epistemic.min() > 1e-3
    assert one.scores(resamples=2).accuracy == (one.probs[:, 0] > 0.5).double().mean()
    records = one.records(ROWS)
    assert [record["label"] for record in records] == [
        "chosen" if p > 0.5 else "rejected" for p in one.probs[:, 0].tolist()
    ]
    assert [record["probs"][0] for record in records] == one.probs[:, 0].tolist()


def gaussian(base: PreTrainedModel, *targets: str, alpha: int = 8) -> Any:
    config = bt.BlobConfig(r=4, lora_alpha=alpha, target_modules=list(targets), rho_init=0.4)
    return scatter(get_peft_model(base, config)).to(torch.float64).eval()  # type: ignore[arg-type]


def test_a_reward_that_is_linear_in_the_weights_has_the_probability_of_the_quadrature(
    tokenizers: Tokenizers, build: Build, figure: Callable[..., None]
) -> None:
    """With features h, the difference of two rewards is Gaussian: mean (W + s B M) dh, variance s^2 B^2 G^4 dh^2."""
    task, base = case("bert", tokenizers, build, torch.float64)
    model = gaussian(base, "classifier", alpha=80)
    draws = 600
    found = bt.predict(model, task, ROWS, draws=draws)

    (layer,) = gaussian_layers(model).values()
    linear = model.base_model.model.classifier
    batch = task.collate([task.example(row) for row in ROWS])
    with torch.no_grad():
        inputs = {key: batch[key].flatten(0, 1) for key in task.tokenizer.model_input_names}
        features = base.bert(**inputs).pooler_output.unflatten(0, (3, 2))
        difference = features[:, 0] - features[:, 1]
        b = linear.lora_B["default"].weight * linear.scaling["default"]
        mean = difference @ (linear.base_layer.weight + b @ layer.weight).T
        variance = difference.square() @ (b.square() @ layer.rho.pow(4)).T
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(80))
    gap = mean + variance.sqrt() * nodes  # [rows, nodes]
    weights = weights / weights.sum()
    entropy = torch.special.entr(gap.sigmoid()) + torch.special.entr((-gap).sigmoid())
    assert variance.min() > 0.01

    each = found.draw_log_probs[..., 0].exp()
    for what, expected, values in (
        ("probability", gap.sigmoid() @ weights, each),
        ("mean entropy", entropy @ weights, torch.special.entr(found.draw_log_probs.exp()).sum(-1)),
    ):
        error = (values.mean(0) - expected) / (values.std(0) / draws**0.5)
        figure(f"{what} of {draws} draws less the quadrature, standard errors", error.abs().max().item(), at_most=5)


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chosen": ""}, "field 'chosen': found empty text, expected some text"),
        ({"rejected": " \n"}, "field 'rejected': found only blanks, expected some text"),
        ({"rejected": "a"}, "field 'rejected': found the text of 'chosen', expected another text"),
        ({"prompt": " "}, "field 'prompt': found only blanks, expected some text"),
        ({"prompt": 3}, "field 'prompt': found 3, expected a string"),
        ({"chosen": ["a"]}, r"field 'chosen': found \['a'\], expected a string"),
        ({"rejected": None}, "field 'rejected': found None, expected a string"),
        ({"chosen": "a\0"}, "field 'chosen': found a NUL character"),
    ],
)
def test_a_row_that_is_no_preference_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "id": "first"}, {**GOOD, **changes}])
    with pytest.raises(DataError, match=rf"rows.jsonl:2 \(id p\): {says}"):
        read_rows(path)


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_a_row_without_one_of_its_texts_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({key: text for key, text in GOOD.items() if key != missing}) + "\n")
    with pytest.raises(
        DataError, match=rf"rows.jsonl:1 \(id p\): field '{missing}': found nothing, expected a string"
    ):
        read_rows(path)


@pytest.mark.property("D06")
@pytest.mark.parametrize("field", ["chosen", "rejected"])
@pytest.mark.parametrize("prompt", ["", "Q: "])
def test_the_text_that_is_too_long_is_named(tokenizers: Tokenizers, field: str, prompt: str) -> None:
    task = Preference(SPEC, tokenizers["encoder"](), data=None, max_tokens=20)
    row = PreferenceRow(**{**GOOD, "prompt": prompt, field: "x" * 30})
    found = 32 + len(prompt)
    with pytest.raises(DataError, match=rf"\(id p\): field '{field}': found {found} tokens .* at most 20"):
        task.example(row)


def test_texts_with_the_same_tokens_are_warned_of(tokenizers: Tokenizers, build: Build) -> None:
    task, model = case("llama", tokenizers, build, torch.float32)
    alike = PreferenceRow(id="alike", chosen="4", rejected="4</s>")
    with pytest.warns(
        BayestuneWarning, match="1 of 4 rows of pairs have different choices with the same tokens.*alike"
    ):
        task.examples([*ROWS, alike], model)


def test_rows_and_heads_of_another_kind_are_refused(tokenizers: Tokenizers, build: Build, tmp_path: Path) -> None:
    tokenizer = tokenizers["encoder"]()
    with pytest.raises(TaskError, match="data set rte: found sentence rows, expected preferences"):
        preference("rte", tokenizer)
    write_rows(tmp_path / "pairs" / "train.jsonl", [GOOD])
    task = preference("pairs", tokenizer, data=tmp_path)
    with pytest.raises(TaskError, match="data set pairs: found preference rows, expected sentences"):
        classification("pairs", tokenizer, data=tmp_path)
    with pytest.raises(TaskError, match="data set pairs: found preference rows, expected questions"):
        bt.tasks.encoder_multiple_choice("pairs", tokenizer, data=tmp_path)
    batch = task.collate([task.example(row) for row in task.rows("train")])
    with pytest.raises(TaskError, match="pairs: the model has 2 labels, expected 1, the reward; load it with num_l"):
        task.outputs(build("bert classes", torch.float32), batch)
