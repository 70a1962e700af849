"""The gradient that reaches the optimiser is that of the stated objective."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from bayestune.adapters import drawn_weights, gaussian_layers, training_noise
from bayestune.errors import ConfigError
from bayestune.functional import (
    gaussian_kl,
    gaussian_kl_gradient,
    linear_kl_weight,
    paper_kl_weight,
    uniform_kl_weight,
)
from bayestune.training.batches import ROW
from training.toys import TASK, Recorder, arguments, double_blob, lora, rows, trained

EPSILON = torch.finfo(torch.float64).eps


Variant = tuple[int, float, int, bool]
"""Draws, dropout, accumulation, checkpointing."""
EVERY_COMMIT: list[Variant] = [(1, 0.0, 1, True), (4, 0.5, 1, False), (1, 0.5, 3, True), (4, 0.0, 3, False)]
EVERY_NIGHT = [each for each in product((1, 4), (0.0, 0.5), (1, 3), (False, True)) if each not in EVERY_COMMIT]
ERROR = "error of 200 coordinates, of 1e-6 of the gradient and the rounding of the difference"


@pytest.mark.property("S03")
@pytest.mark.parametrize("variant", EVERY_COMMIT)
def test_gradient_equals_finite_differences(tmp_path: Path, variant: Variant, figure: Callable[..., None]) -> None:
    figure(ERROR, gradient_error(tmp_path, *variant), at_most=1.0)


@pytest.mark.property("S03")
@pytest.mark.nightly
def test_gradient_equals_finite_differences_in_every_variant(tmp_path: Path, figure: Callable[..., None]) -> None:
    figure(ERROR, max(gradient_error(tmp_path, *variant) for variant in EVERY_NIGHT), at_most=1.0)


def gradient_error(output: Path, draws: int, dropout: float, accumulation: int, checkpointing: bool) -> float:
    """The largest error of the first update's gradient against central differences; 1 is at its bound."""
    model = double_blob(layers=1, lora_dropout=dropout)
    model.enable_input_require_grads()
    trainer = Recorder(
        model,
        task=TASK,
        args=arguments(output, gradient_accumulation_steps=accumulation, activation_checkpointing=checkpointing),
        train_rows=rows(2 * accumulation - 1),
        train_draws=draws,
    )
    trainer.train()
    restore(model, trainer.before[0])
    layers, weight = gaussian_layers(model), 0.25
    gradients = dict(trainer.gradients[0])
    for name, parameter in model.named_parameters():
        for layer in layers.values():
            kl_gradient = gaussian_kl_gradient(layer.weight.detach(), layer.rho.detach(), layer.prior_std)
            for part, gradient in zip((layer.weight, layer.rho), kl_gradient, strict=True):
                if parameter is part:
                    gradients[name] = gradients[name] + weight * gradient

    clock = training_noise(model)

    def objective() -> float:
        total = 0.0
        for seen in trainer.micros:
            torch.set_rng_state(seen.random_state)
            clock.step, clock.micro = seen.step, seen.micro
            total += trainer.compute_loss(model, seen.inputs, num_items_in_batch=seen.rows).item()
        return total + weight * sum(
            gaussian_kl(layer.weight, layer.rho, layer.prior_std).item() for layer in layers.values()
        )

    with torch.random.fork_rng(), torch.no_grad():
        model.train()
        return max(excess for _, excess in differences(model, gradients, objective))


def differences(
    model: torch.nn.Module, gradients: dict[str, torch.Tensor], objective: Callable[[], float], step: float = 1e-6
) -> Iterator[tuple[str, float]]:
    """|central difference - gradient| over its bound, for 200 coordinates spread over M, G and B.

    The bound is 1e-6 of the gradient plus what rounding of the objective leaves of a difference.
    """
    parameters = dict(model.named_parameters())
    kinds = [[n for n in gradients if part in n] for part in ("lora_A.default.weight", "lora_A.default.rho", "lora_B")]
    generator = torch.Generator().manual_seed(0)
    rounding = 32 * EPSILON * abs(objective()) / step
    for i in range(200):
        names = kinds[i % 3]
        name = names[int(torch.randint(len(names), (), generator=generator))]
        flat = parameters[name].view(-1)
        at = int(torch.randint(flat.numel(), (), generator=generator))
        value, gradient = flat[at].item(), gradients[name].view(-1)[at].item()
        flat[at] = value + step
        above = objective()
        flat[at] = value - step
        below = objective()
        flat[at] = value
        yield name, abs((above - below) / (2 * step) - gradient) / (1e-6 * abs(gradient) + rounding)


@pytest.mark.property("S05")
def test_loss_is_the_mean_of_the_nlls_of_the_draws(tmp_path: Path, figure: Callable[..., None]) -> None:
    model, draws, data = double_blob(), 4, rows(3)
    trainer = Recorder(model, task=TASK, args=arguments(tmp_path), train_rows=data, train_draws=draws)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    model.train()
    loss = trainer.compute_loss(model, batch).item()

    layers = gaussian_layers(model)
    noise = {name: layer.noise.epsilon for name, layer in layers.items()}
    model.eval()
    log_likelihoods = torch.zeros(draws, 3, dtype=torch.float64)
    logits = torch.zeros(draws, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        for draw in range(draws):
            for row in range(3):
                single = TASK.collate([TASK.example(data[row])])
                weights = {layer: layer.drawn(noise[name][draw * 3 + row]) for name, layer in layers.items()}
                with drawn_weights(weights):
                    log_likelihoods[draw, row] = TASK.loss(model, single)[0]
                    logits[draw, row] = TASK.outputs(model, single)[0]
    figure("loss less the mean of the draws' NLLs", abs(loss - log_likelihoods.mean().item()), at_most=1e-12)
    labels = torch.tensor([row.answer for row in data])
    of_mean_logits = torch.nn.functional.cross_entropy(logits.mean(0), labels).item()
    assert loss - of_mean_logits > 1e-3  # Jensen: the two are told apart


Epoch = tuple[int, int, int, bool]
"""Rows, batch, accumulation, whether the last batch is dropped if it is not full."""
EPOCHS: list[Epoch] = [
    *((1, 1, 1, False), (5, 3, 1, False), (7, 3, 3, False), (11, 64, 1, False), (11, 1, 64, False)),
    *((11, 3, 3, True), (11, 11, 1, True)),
]
LARGER_EPOCHS = [
    epoch for epoch in product((1, 40, 41), (1, 7, 64), (1, 3), (False, True)) if epoch[0] >= epoch[1] or not epoch[3]
]


@pytest.mark.property("S17")
@pytest.mark.parametrize("epoch", EPOCHS)
def test_updates_add_up_to_the_epoch(tmp_path: Path, epoch: Epoch, figure: Callable[..., None]) -> None:
    figure("sum over updates of rows x loss, less the NLL of all rows", epoch_error(tmp_path, *epoch), at_most=1e-10)


@pytest.mark.property("S17")
@pytest.mark.nightly
def test_updates_add_up_to_the_epoch_in_every_variant(tmp_path: Path, figure: Callable[..., None]) -> None:
    error = max(epoch_error(tmp_path, *epoch) for epoch in LARGER_EPOCHS)
    figure("sum over updates of rows x loss, less the NLL of all rows", error, at_most=1e-10)


def epoch_error(output: Path, size: int, batch: int, accumulation: int, dropping: bool) -> float:
    """|sum over updates of rows x loss - the NLL of all rows that are not dropped|, whatever the micro-batches."""
    model, data = lora(), rows(size)
    args = arguments(
        output,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_steps=-1,
        learning_rate=1e-300,
        dataloader_drop_last=dropping,
    )
    trainer = Recorder(model, task=TASK, args=args, train_rows=data)
    trainer.train()
    seen = [row for micro in trainer.micros for row in micro.inputs[ROW].tolist()]
    assert len(set(seen)) == len(seen) == (size // batch * batch if dropping else size)
    with torch.no_grad():
        expected = TASK.loss(model.eval(), TASK.collate([TASK.example(data[row]) for row in seen])).sum().item()
    found = sum(loss * micro.rows for loss, micro in zip(trainer.losses, trainer.micros, strict=True))
    return abs(found - expected)


@pytest.mark.property("S17")
def test_an_epoch_in_which_all_is_dropped_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=7, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="drops all training rows: found 6, expected at least one batch of 7"):
        Recorder(lora(), task=TASK, args=args, train_rows=rows(6))


@pytest.mark.property("S17")
def test_accumulated_gradient_is_that_of_one_batch(tmp_path: Path, figure: Callable[..., None]) -> None:
    gradients = []
    for batch, accumulation in [(7, 1), (3, 3)]:
        args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        trainer = Recorder(lora(), task=TASK, args=args, train_rows=rows(7))
        trainer.train()
        gradients.append(trainer.gradients[0])
    whole, pieces = gradients
    assert whole.keys() == pieces.keys()
    error = max((whole[name] - pieces[name]).abs().max().item() for name in whole)
    figure("gradient of three micro-batches less that of one batch", error, at_most=1e-14)


@pytest.mark.property("S17")
@pytest.mark.parametrize("schedule", [paper_kl_weight, uniform_kl_weight, linear_kl_weight])
def test_weights_of_a_cycle_count_the_kl_once(
    schedule: Callable[[int, int], float], figure: Callable[..., None]
) -> None:
    for cycle in (1, 2, 40, 100_000):
        total = sum(schedule(step, cycle) for step in range(3 * cycle, 4 * cycle))
        missing = 1 / (2.0 ** (cycle + 1) - 1) if schedule is paper_kl_weight and cycle < 1000 else 0.0
        figure(f"sum of a cycle of {schedule.__name__}, less 1", abs(total + missing - 1), at_most=1e-10)


@pytest.mark.property("N08")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_leaves_the_gradients_alone(tmp_path: Path, dropout: float, figure: Callable[..., None]) -> None:
    """Reentrant or not, the recomputed forward sees the same noise and the same dropout."""
    gradients = []
    for settings in [
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ]:
        model = double_blob(lora_dropout=dropout)
        model.enable_input_require_grads()
        args = arguments(tmp_path, gradient_accumulation_steps=2, **settings)
        trainer = Recorder(model, task=TASK, args=args, train_rows=rows(4))
        trainer.train()
        assert model.get_base_model().is_activation_checkpointing == bool(settings)
        gradients.append(trainer.gradients[0])
    for other in gradients[1:]:
        error = max((gradients[0][name] - other[name]).abs().max().item() for name in gradients[0])
        figure("training gradients with checkpointing less those without", error, at_most=1e-14)


def restore(model: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name])
    assert all(torch.equal(value, parameters[name]) for name, value in trained(model).items())
