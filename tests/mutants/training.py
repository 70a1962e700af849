"""Defects of the objective, the KL step, and what stops or survives an update."""

import math
from collections.abc import Callable
from typing import Any

import torch

from mutants.defect import defect, replace, wrap

TRAINER = "bayestune.training.trainer.BayesTrainer"
KL = "bayestune.training.kl"


def scaled(name: str, factor: Callable[[Any, int, Any], float]) -> None:
    """Multiply the loss of `compute_loss` by ``factor(trainer, rows, num_items_in_batch)``."""

    def make(right: Any) -> Any:
        def wrong(
            self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            rows = len(next(iter(inputs.values())))
            found = right(self, model, inputs, return_outputs, num_items_in_batch)
            times = factor(self, rows, num_items_in_batch)
            return (found[0] * times, found[1]) if return_outputs else found * times

        return wrong

    wrap(name, make)


@defect("training/test_gradient.py", "S17 and not nightly")
def sum_of_the_nlls_instead_of_their_mean() -> None:
    scaled(f"{TRAINER}.compute_loss", lambda self, rows, items: rows if items is None else int(items))


@defect("training/test_gradient.py", "S17 and not nightly")
def micro_batches_averaged_by_their_number() -> None:
    scaled(
        f"{TRAINER}.compute_loss",
        lambda self, rows, items: 1.0 if items is None else int(items) / rows / self.args.gradient_accumulation_steps,
    )


@defect("training/test_gradient.py", "S05")
def draws_added_up_instead_of_averaged() -> None:
    scaled(f"{TRAINER}.compute_loss", lambda self, rows, items: self.train_draws)


@defect("training/test_kl.py", "kl_step")
def kl_step_without_the_weight_of_the_schedule() -> None:
    def make(right: Any) -> Any:
        return lambda layers, *, rate, weight, along_nll: right(layers, rate=rate, weight=1.0, along_nll=along_nll)

    wrap(f"{KL}.kl_step", make)


@defect("training/test_kl.py", "kl_step")
def g_does_not_move_along_its_nll() -> None:
    def make(right: Any) -> Any:
        return lambda layers, *, rate, weight, along_nll: right(layers, rate=rate, weight=weight, along_nll=False)

    wrap(f"{KL}.kl_step", make)


@defect("training/test_kl.py", "kl_step")
def g_jumps_past_the_minimum_of_the_kl() -> None:
    from bayestune.functional import gaussian_kl_gradient

    @torch.no_grad()
    def wrong(layers: Any, *, rate: float, weight: float, along_nll: bool) -> None:
        for layer in layers:
            mean, rho = gaussian_kl_gradient(layer.weight, layer.rho, layer.prior_std)
            layer.weight.sub_(mean, alpha=rate * weight)
            if along_nll and layer.rho.grad is not None:
                layer.rho.sub_(layer.rho.grad, alpha=rate)
            layer.rho.sub_(rho, alpha=rate * weight)

    replace(f"{KL}.kl_step", wrong)


@defect("training/test_kl.py", "many_layers")
def the_last_layers_that_move_together_are_left_out() -> None:
    wrap(f"{KL}.layer_groups", lambda right: lambda layers: list(right(layers))[:-1] or list(right(layers)))


@defect("training/test_kl.py", "elbo")
def elbo_weight_of_one_row_more() -> None:
    wrap(f"{KL}.elbo_kl_weight", lambda right: lambda rows: right(rows + 1))


@defect("training/test_large_kl.py", "billions")
def the_logged_kl_in_single_precision() -> None:
    def wrong(layers: Any) -> dict[str, float]:
        total = torch.zeros((), dtype=torch.float32)
        for layer in layers:
            total += layer.kl().float()
        return {"kl": total.item(), "std": 0.0}

    replace(f"{KL}.posterior_summary", wrong)


@defect("training/test_trainer.py", "N09")
def weight_decay_on_the_means() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, model: Any = None) -> Any:
            optimizer = right(self, model)
            for group in optimizer.param_groups:
                group["weight_decay"] = self.args.weight_decay
            return optimizer

        return wrong

    wrap(f"{TRAINER}.create_optimizer", make)


@defect("training/test_trainer.py", "S18")
def evaluation_leaves_the_model_in_evaluation_mode() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, *args: Any, **settings: Any) -> Any:
            found = right(self, *args, **settings)
            self.model.eval()
            return found

        return wrong

    wrap(f"{TRAINER}.evaluation_loop", make)


@defect("training/test_memory.py", "first_update")
def a_failed_try_advances_the_noise() -> None:
    replace("bayestune.training.callbacks.NoiseCallback.rewind", lambda self: None)


@defect("training/test_finite.py", "row_that")
def a_loss_that_is_not_finite_is_trained_on() -> None:
    replace("bayestune.training.finite.nonfinite_rows", lambda nll, index, ids: None)


@defect("training/test_finite.py", "row_that or weights")
def numbers_that_are_not_finite_pass() -> None:
    replace("bayestune.training.finite.first_nonfinite", lambda tensors, *, squared=False: None)


@defect("training/test_order.py")
def the_order_of_rows_ignores_the_epoch() -> None:
    replace("bayestune.training.batches.LengthGrouped.set_epoch", lambda self, epoch: None)


STD = "bayestune.training.posterior_std"


@defect("training/test_posterior_std.py", "first_width")
def first_std_of_the_middle_of_the_start() -> None:
    replace("bayestune.functional.initial_std", lambda rho_init: rho_init**2 * ((1 + math.sqrt(0.5)) / 2) ** 2)


@defect("training/test_posterior_std.py", "gives_it")
def kl_rate_for_half_the_std() -> None:
    wrap(f"{STD}.kl_rate_for_std", lambda right: lambda std, **more: right(std / 2 + more["start"] / 2, **more))


@defect("training/test_posterior_std.py", "recursion")
def kl_only_std_without_a_warmup() -> None:
    def make(right: Any) -> Any:
        return lambda rate, **settings: right(rate, **{**settings, "warmup": 0.0})

    wrap(f"{STD}.kl_only_std", make)
