"""Defects of generated texts and of what is said of their tokens."""

from typing import Any

import torch

from mutants.defect import defect, replace, wrap

DECODING = "bayestune.inference.decoding"
TESTS = "inference/test_generate.py"
COMMAND = "cli/test_generate.py"


@defect(TESTS, "loop_over_exported")
def logits_are_averaged_and_not_probabilities() -> None:
    def wrong(right: Any) -> Any:
        def call(self: Any, input_ids: Any, scores: Any) -> Any:
            right(self, input_ids, scores)
            return scores.unflatten(0, (self.slices, -1)).mean(0).repeat(self.slices, 1)

        return call

    wrap(f"{DECODING}._Average.__call__", wrong)


@defect(TESTS, "loop_over_exported")
def the_first_draw_writes_for_all() -> None:
    wrap(f"{DECODING}._Average.__init__", lambda right: lambda self, slices, *rest: right(self, 1, *rest))


@defect(TESTS, "each_draw_alone")
def draws_that_write_alone_are_averaged() -> None:
    def wrong(right: Any) -> Any:
        def call(self: Any, slices: int, names: Any, width: int) -> None:
            right(self, 3 if slices == 1 else slices, names, width)

        return call

    wrap(f"{DECODING}._Average.__init__", wrong)


@defect(TESTS, "follow_the_average")
def the_noise_is_normal() -> None:
    def wrong(self: Any, input_ids: Any, scores: Any) -> Any:
        return scores + torch.randn_like(scores[: len(self.keys)]).repeat(self.copies, 1)

    replace(f"{DECODING}._Gumbel.__call__", wrong)


@defect(TESTS, "nothing_but_its_prompt")
def the_noise_is_global() -> None:
    def wrong(self: Any, input_ids: Any, scores: Any) -> Any:
        noise = torch.empty(len(self.keys), scores.shape[1], dtype=torch.float64).exponential_()
        return scores - noise.log().repeat(self.copies, 1)

    replace(f"{DECODING}._Gumbel.__call__", wrong)


@defect(TESTS, "information_of_one_token")
def the_information_lacks_the_number_of_draws() -> None:
    def wrong(likelihoods: Any) -> float:
        table = torch.stack(list(likelihoods))
        return float((table.diagonal() - table.logsumexp(1)).mean())

    replace("bayestune.inference.generate._information", wrong)


@defect(TESTS, "scored_as_the_draws")
def log_probabilities_are_averaged_and_not_probabilities() -> None:
    replace("bayestune.inference.generation._averaged", lambda log_probs: log_probs.mean(0))


@defect(TESTS, "end_where_they_end")
def every_text_is_finished() -> None:
    def wrong(right: Any) -> Any:
        def call(self: Any, *args: Any, **own: Any) -> Any:
            done = right(self, *args, **own)
            self.finished[:] = True
            return done

        return call

    wrap(f"{DECODING}._Ends.__call__", wrong)


@defect(COMMAND, "goes_on")
def sampled_texts_follow_their_place() -> None:
    def wrong(right: Any) -> Any:
        return lambda self, seed, keys, *rest: right(self, seed, range(len(keys)), *rest)

    wrap(f"{DECODING}._Gumbel.__init__", wrong)


@defect(TESTS, "is_refused")
def a_prompt_may_fill_the_context() -> None:
    replace("bayestune.inference.score.check_length", lambda *given: None)


ANSWERS = "inference/test_answer_scores.py"


@defect(ANSWERS, "right_answers")
def wrong_answers_count_as_surer() -> None:
    wrap("bayestune.inference.answer_scores._auroc", lambda right: lambda values, correct: right(-values, correct))


@defect(ANSWERS, "own_text")
def the_agreement_of_draws_is_ignored() -> None:
    def wrong(right: Any) -> Any:
        return lambda confidence, correct, **own: right(0 * confidence, correct, **own)

    wrap("bayestune.metrics.calibration.confidence_ece", wrong)
