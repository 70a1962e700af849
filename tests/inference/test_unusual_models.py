"""Models whose layers do not see rows first, several adapters at once, and logits that are no numbers."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from bayestune.adapters import BlobConfig, training_noise
from bayestune.errors import DrawError, PosteriorError
from bayestune.inference import draw, predict
from bayestune.tasks import Row
from inference.cases import CLASSES, Fixed, Letters
from models import llama, scatter


class Classes(Letters):
    """The same letters for a model that scores four classes."""

    name = "classes"

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def rows() -> list[Row]:
    words = ("why is it so", "where is it?", "who was that", "what is this")
    return [Row(id=str(i), question=word, choices=("a", "b", "c", "d"), answer=0) for i, word in enumerate(words)]


def deberta() -> PeftModel:
    """Its projections also see relative positions, [1, span, n], which belong to no row."""
    config = DebertaV2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=4,
        relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8,
        initializer_range=0.5,
    )  # fmt: skip
    return get_peft_model(
        DebertaV2ForSequenceClassification(config).eval(), BlobConfig(target_modules=["query_proj", "value_proj"])
    )


def longformer() -> PeftModel:
    """Its projections see tokens first, [tokens, rows, n]."""
    config = LongformerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=4,
        attention_window=[4, 4], initializer_range=0.5, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    model = LongformerForSequenceClassification(config).eval()
    return get_peft_model(model, BlobConfig(target_modules=["query", "value"]))


@pytest.mark.property("S16")
@pytest.mark.parametrize("make", [deberta, longformer])
@pytest.mark.filterwarnings("ignore")  # what these two models advise is theirs
def test_stacked_equals_a_loop_in_layers_that_do_not_see_rows_first(make: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    scatter(model)
    answer = predict(model, Classes(), rows(), draws=4, batch_size=4)
    assert (answer.draw_log_probs[0] - answer.draw_log_probs[1]).abs().max() > 1e-3
    for index in range(4):
        with draw(model, index=index):
            alone = predict(model, Classes(), rows(), draws=0, batch_size=4)
        torch.testing.assert_close(answer.draw_log_probs[index], alone.draw_log_probs[0], atol=1e-5, rtol=0)


def test_a_draw_reaches_every_adapter_that_a_batch_names() -> None:
    model = get_peft_model(llama().eval(), BlobConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", BlobConfig(target_modules=["q_proj", "v_proj"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        scatter(model)
    model.set_adapter("default")
    model.eval()
    ids = torch.tensor([[8, 9, 10], [11, 12, 13]])
    names = ["default", "other"]
    with torch.no_grad(), draw(model, index=2):
        mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        with torch.no_grad(), draw(model, index=2):
            alone = model(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=0)


def test_a_training_layer_does_not_use_the_noise_of_another_number_of_rows() -> None:
    """An input that is not rows first shares one draw: row-wise noise for it would follow positions."""
    model = get_peft_model(llama(), BlobConfig(target_modules=["q_proj"]))
    model.train()
    model(input_ids=torch.ones(2, 3, dtype=torch.long))
    layer = next(module for module in model.modules() if type(module).__name__ == "GaussianLinear")
    x = torch.randn(4, 2, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.drawn(layer.noise.epsilon[0]).T)
    assert training_noise(model).micro == 1


@pytest.mark.property("N02")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_by_row(bad: float) -> None:
    table = torch.zeros(3, CLASSES)
    table[1, 2] = bad
    model = get_peft_model(llama().eval(), BlobConfig(target_modules=["q_proj"]))
    three = [Row(id=str(i), question="q", choices=("a", "b", "c", "d"), answer=0) for i in range(3)]
    with pytest.raises(PosteriorError, match="row '1'"):
        predict(model, Fixed(table), three, draws=0)


def test_a_draw_needs_an_adapter() -> None:
    with pytest.raises(DrawError), draw(llama()):
        pass
