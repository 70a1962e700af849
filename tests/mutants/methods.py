"""Defects of the methods and of what averages their draws."""

import dataclasses
from typing import Any

import torch

from mutants.defect import defect, replace, wrap

METHODS = "bayestune.methods"


@defect("methods/test_temperature.py", "recovered")
def the_inverse_of_the_temperature() -> None:
    wrap(f"{METHODS}.temperature.fit_temperature", lambda right: lambda *args: 1 / right(*args))


@defect("methods/test_temperature.py", "average")
def the_temperature_of_every_draw_by_itself() -> None:
    def make(right: Any) -> Any:
        def wrong(log_probs: Any, labels: Any) -> float:
            return sum(right(one[None], labels) for one in log_probs) / len(log_probs)

        return wrong

    wrap(f"{METHODS}.temperature.fit_temperature", make)


@defect("methods/test_laplace_curvature.py", "dense")
def evidence_without_the_norm_of_the_weights() -> None:
    name = f"{METHODS}.laplace.prior_precision.log_evidence"
    wrap(name, lambda right: lambda curvatures, square_norm, precision: right(curvatures, 0.0, precision))


@defect("methods/test_laplace_curvature.py", "most_evident")
def the_precision_of_twice_the_norm() -> None:
    name = f"{METHODS}.laplace.prior_precision.most_evident"
    wrap(name, lambda right: lambda curvatures, square_norm: right(curvatures, 2 * square_norm))


@defect("methods/test_laplace_curvature.py", "candidate")
def the_candidate_with_the_largest_nll() -> None:
    from bayestune.metrics import nll

    def wrong(log_probs: Any, labels: Any) -> int:
        return max(range(len(log_probs)), key=lambda k: nll(log_probs[k], labels))

    replace(f"{METHODS}.laplace.prior_precision.best_candidate", wrong)


@defect("methods/test_laplace_curvature.py", "roots")
def roots_of_the_loss_that_are_not_centred() -> None:
    def wrong(logits: Any) -> Any:
        root = logits.softmax(-1).sqrt()
        for c in range(logits.shape[1]):
            vector = torch.zeros_like(root)
            vector[:, c] = root[:, c]
            yield vector

    replace("bayestune.tasks.classes.loss_roots", wrong)


@defect("methods/test_laplace.py", "probit")
def a_probit_answer_without_its_variance() -> None:
    def wrong(forward: Any, factors: Any, precisions: Any) -> Any:
        return forward.logits.detach().expand(len(precisions), *forward.logits.shape)

    replace(f"{METHODS}.laplace.linearised.probit_logits", wrong)


@defect("methods/test_laplace_curvature.py", "factors_are")
def curvature_of_inputs_added_up() -> None:
    name = f"{METHODS}.laplace.kfac.FactorSums.add_inputs"
    wrap(name, lambda right: lambda self, inputs: right(self, 2 * inputs))


@defect("methods/test_swag.py", "moments")
def snapshots_without_the_running_mean() -> None:
    name = f"{METHODS}.swag.Moments.variance"
    wrap(name, lambda right: lambda self, name: 2 * right(self, name))


@defect("methods/test_swag.py", "snapshot")
def snapshots_that_are_no_copies() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, weights: Any) -> None:
            right(self, {name: weight + 1e-3 for name, weight in weights.items()})

        return wrong

    wrap(f"{METHODS}.swag.Moments.add", make)


@defect("methods/test_tfb.py", "what_is_returned")
def the_widest_trial_instead_of_the_widest_accepted() -> None:
    def make(right: Any) -> Any:
        def wrong(*args: Any, **settings: Any) -> Any:
            found = right(*args, **settings)
            return dataclasses.replace(found, sigma=max(trial.sigma for trial in found.trace))

        return wrong

    wrap(f"{METHODS}.tfb.search_sigma", make)


@defect("methods/test_tfb.py", "mean")
def a_rotation_that_changes_the_adapter() -> None:
    def make(right: Any) -> Any:
        def wrong(*args: Any, **settings: Any) -> Any:
            first, *others = right(*args, **settings)
            return (1.01 * first, *others)

        return wrong

    wrap(f"{METHODS}.tfb.rotated", make)


@defect("methods/test_tfb.py", "anchor")
def an_anchor_loss_of_half_its_size() -> None:
    def make(right: Any) -> Any:
        def wrong(*args: Any, **settings: Any) -> Any:
            loss = right(*args, **settings)
            return lambda model: loss(model) / 2

        return wrong

    wrap(f"{METHODS}.tfb.anchor_loss", make)


@defect("methods/test_methods.py", "first_member")
def all_members_of_an_ensemble_have_one_seed() -> None:
    from bayestune.functional import derive_seed as right

    def wrong(*key: Any) -> int:
        return 0 if key[0] == "member" else right(*key)

    replace("bayestune.functional.derive_seed", wrong)


@defect("methods/test_ensemble.py", "averages")
def the_average_of_log_probabilities() -> None:
    replace("bayestune.tasks.classes.Prediction.log_probs", lambda self: self.draw_log_probs.mean(0).log_softmax(-1))


@defect("inference/test_unusual_models.py", "N02")
def logits_that_are_no_numbers_are_averaged() -> None:
    replace("bayestune.inference.predict._finite", lambda logits, ids: logits)


@defect("experiment/test_chosen_scale.py", "cut_from_train")
def rows_that_choose_the_scale_are_trained_on() -> None:
    replace("bayestune.experiment.rows._cut", lambda rows, count, seed: (rows, rows[:count]))


@defect("methods/test_scale.py", "minimum")
def the_chosen_scale_is_not_applied() -> None:
    replace("bayestune.methods.scale._set_scale", lambda layers, start, factor: None)


@defect("methods/test_scale.py", "equal_factors")
def the_smallest_of_equal_factors_is_chosen() -> None:
    replace("bayestune.methods.scale.chosen", lambda nll: min(nll, key=nll.get))


@defect("methods/test_default_width.py", "thirty_updates")
def the_default_of_the_trainer_has_no_width() -> None:
    from bayestune.training import KLSettings

    replace("bayestune.training.posterior_std.default_kl", lambda layers, rows, args: KLSettings(cycle=1000))


IVON = f"{METHODS}.ivon"


@defect("methods/test_ivon.py", "conjugate or whatever_is_estimated")
def a_curvature_without_its_correction() -> None:
    replace(f"{IVON}.next_curvature", lambda h, estimate, *, beta2, delta: h + (1 - beta2) * (estimate - h))


@defect("methods/test_ivon.py", "conjugate")
def a_curvature_of_half_the_estimate() -> None:
    name = f"{IVON}.next_curvature"
    wrap(name, lambda right: lambda h, estimate, *, beta2, delta: right(h, estimate / 2, beta2=beta2, delta=delta))


@defect("methods/test_ivon.py", "logistic")
def draws_as_wide_as_the_variance() -> None:
    wrap(f"{IVON}.IvonOptimizer._std", lambda right: lambda self, group, weight: right(self, group, weight).square())


@defect("methods/test_ivon.py", "micro_batches")
def a_draw_that_the_first_micro_batch_alone_sees() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            right(self, args, state, control, **kwargs)
            held = dict(self._optimizer._held)

            def back(*_: Any) -> None:
                for weight, (mean, _) in held.items():
                    weight.data.copy_(mean)

            kwargs["model"].get_base_model().register_forward_hook(back)

        return wrong

    wrap(f"{IVON}.IvonCallback.on_step_begin", make)


@defect("methods/test_ivon.py", "conjugate or equations")
def the_mean_moves_from_the_draw() -> None:
    replace(f"{IVON}.IvonOptimizer.restore", lambda self: self._held.clear())


@defect("methods/test_ivon.py", "depend_on_seed")
def the_same_draw_in_every_update() -> None:
    from bayestune.functional import derive_seed as right

    def wrong(*key: Any) -> int:
        return right(key[0], key[1], key[3]) if key[0] == "ivon" else right(*key)

    replace("bayestune.functional.derive_seed", wrong)


@defect("methods/test_ivon.py", "bit_for_bit")
def a_resumed_run_without_its_momentum() -> None:
    def make(right: Any) -> Any:
        def wrong(folder: Any, optimizer: Any, scheduler: Any, settings: Any) -> None:
            right(folder, optimizer, scheduler, settings)
            for own in optimizer.state.values():
                own["momentum"].zero_()

        return wrong

    wrap("bayestune.training.checkpoint_state.load_optimizer", make)


@defect("methods/test_ivon.py", "saved_loaded")
def a_posterior_of_the_variances() -> None:
    wrap(
        f"{IVON}.IvonOptimizer.std",
        lambda right: lambda self: {name: value.square() for name, value in right(self).items()},
    )


@defect("methods/test_distilled.py", "divergence")
def a_student_learns_only_what_the_teacher_finds_most_probable() -> None:
    def make(right: Any) -> Any:
        def wrong(task: Any, outputs: Any, batch: Any) -> Any:
            teacher = batch["teacher"]
            return right(task, outputs, {**batch, "teacher": (teacher == teacher.amax(-1, keepdim=True)).float()})

        return wrong

    wrap(f"{METHODS}.distilled.Distillation.row_loss", make)
