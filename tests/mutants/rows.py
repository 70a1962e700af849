"""Defects of rows, prompts, labels, masks and tokenizers."""

from typing import Any

import torch
from torch import Tensor

from mutants.defect import defect, replace, wrap

DATA = "bayestune.tasks.data"
ROWS = "bayestune.tasks.rows"
TENSORS = "bayestune.tasks.tensors"
TOKENIZED = "bayestune.tasks.tokenized"
CHOICES = "bayestune.tasks.multiple_choice"


@defect("training/test_permuted.py", "D12")
def the_label_is_off_by_one() -> None:
    def make(right: Any) -> Any:
        def wrong(examples: Any) -> dict[str, Tensor]:
            return {name: (labels + 1) % 2 for name, labels in right(examples).items()}

        return wrong

    wrap(f"{TENSORS}.labels_of", make)


@defect("tasks/test_text_choice.py", "does_not_bind_labels")
def a_model_that_binds_labels_is_taken_for_one_at_chance() -> None:
    name = "bayestune.tasks.causal.CausalChoice.mean_log_probs"
    wrap(name, lambda right: lambda self, model, batch: -right(self, model, batch))


@defect("tasks/test_multiple_choice.py", "D09")
def the_label_loses_its_blank() -> None:
    name = "bayestune.tasks.causal.CausalChoice.answers"
    wrap(name, lambda right: lambda self, row: [label.strip() for label in right(self, row)])


@defect("tasks/test_multiple_choice.py", "D09 or prompt")
def a_prompt_without_its_last_word() -> None:
    name = "bayestune.tasks.causal.CausalChoice.prompt_text"
    wrap(name, lambda right: lambda self, row: right(self, row).removesuffix("Answer:"))


@defect("tasks/test_multiple_choice.py")
def labels_scored_one_token_too_early() -> None:
    def make(right: Any) -> Any:
        def wrong(sequences: Any) -> tuple[list[int], list[list[int]]]:
            context, after = right(sequences)
            return context[:-1], after

        return wrong

    wrap("bayestune.tasks.causal.beyond_common_prefix", make)


@defect("tasks/test_multiple_choice.py")
def absent_choices_get_probability() -> None:
    wrap("bayestune.tasks.choices.choice_mask", lambda right: lambda counts: torch.ones_like(right(counts)))


@defect("tasks/test_multiple_choice.py", "N07")
def sequences_padded_on_the_wrong_side() -> None:
    wrap(f"{TENSORS}.pad", lambda right: lambda sequences, value, left: right(sequences, value, left=not left))


@defect("tasks/test_multiple_choice.py", "D06")
def a_row_that_is_too_long_is_taken() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, *given: Any, **named: Any) -> None:
            right(self, *given, **named)
            self.max_tokens = 10**9

        return wrong

    wrap(f"{TOKENIZED}.TokenizedTask.__init__", make)


@defect("tasks/test_rows_without_tokens.py", "refused")
def a_text_without_a_token_is_scored() -> None:
    replace(f"{TOKENIZED}.TokenizedTask._empty_texts", lambda self, rows: set())


@defect("tasks/test_tokenizers.py", "D10")
def the_padding_of_the_model_is_not_checked() -> None:
    replace(f"{TOKENIZED}.check_padding", lambda model, attention_mask, pad_id: None)


@defect("tasks/test_tokenizers.py", "predicting")
def tokens_beyond_the_embeddings_are_let_in() -> None:
    replace(f"{TOKENIZED}.embeddings_of", lambda model: None)


@defect("tasks/test_multiple_choice.py", "widened")
def half_precision_logits_stay_as_they_are() -> None:
    replace(f"{TENSORS}.widen", lambda logits: logits)


@defect("tasks/test_rows_without_tokens.py", "same_to")
def choices_that_are_the_same_to_the_tokenizer_pass_in_silence() -> None:
    replace("bayestune.tasks.encoder_multiple_choice._alike", lambda row, example: False)


@defect("tasks/test_data.py", "D01")
def the_last_of_two_fields_of_one_name_is_taken() -> None:
    replace(f"{DATA}._unique", dict)


@defect("tasks/test_data.py", "D02")
def a_bool_is_a_label() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, name: str, *kinds: type, expected: str) -> Any:
            return right(self, name, bool, *kinds, expected=expected)

        return wrong

    wrap(f"{ROWS}.Fields.label", make)


@defect("tasks/test_new_task.py", "refused")
def every_file_may_hold_rows_of_every_task() -> None:
    def make(right: Any) -> Any:
        def wrong(values: Any, *, formats: Any, **more: Any) -> Any:
            return right(values, formats=formats[-1:], **more)

        return wrong

    wrap(f"{DATA}.parse_row", make)


@defect("tasks/test_multiple_choice.py", "counts_padding")
def padding_may_count_as_positions() -> None:
    replace("bayestune.tasks.causal.CausalChoice._check_padding", lambda self, model, short, long: None)


@defect("tasks/test_data.py", "D03 or label or answer")
def an_answer_may_be_out_of_range() -> None:
    replace(f"{ROWS}.Row.__post_init__", lambda self: None)


@defect("cli/test_bad_rows.py", "blank")
def texts_are_not_checked() -> None:
    replace(f"{ROWS}.check_text", lambda row, name, text: None)


@defect("cli/test_bad_rows.py", "twice")
def ids_may_be_repeated() -> None:
    replace(f"{DATA}.check_together", lambda rows: None)


@defect("experiment/test_overlap.py", "hide")
def only_rows_repeated_letter_for_letter_are_counted() -> None:
    replace("bayestune.experiment.overlap.folded", lambda row: tuple(row.texts))


@defect("experiment/test_rows.py", "D11")
def a_last_batch_that_is_not_full_is_left_out() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any) -> Any:
            whole = len(self) - len(self) % self._batch_size
            return iter(list(right(self))[:whole])

        return wrong

    wrap("bayestune.training.batches.LengthGrouped.__iter__", make)


TEXTS = "bayestune.tasks.text_choice"


@defect("tasks/test_text_choice.py", "sums_of_separate")
def a_branch_sees_the_branches_before_it() -> None:
    def wrong(branch: Tensor) -> Tensor:
        tokens = branch.shape[1]
        return torch.ones(tokens, tokens, dtype=torch.bool).tril() & (branch >= 0).unsqueeze(1)

    replace(f"{TEXTS}.tree_attention", wrong)


@defect("tasks/test_text_choice.py", "sums_of_separate")
def positions_go_on_from_branch_to_branch() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, examples: Any) -> dict[str, Tensor]:
            batch = right(self, examples)
            return {**batch, "position_ids": ((batch["branch"] >= 0).cumsum(1) - 1).clamp(min=0)}

        return wrong

    wrap(f"{TEXTS}.CausalTextChoice._collate_packed", make)


@defect("tasks/test_text_choice.py", "sums_of_separate")
def the_first_token_of_a_branch_follows_the_branch_before() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, examples: Any) -> dict[str, Tensor]:
            batch = right(self, examples)
            width = batch["before"].shape[1]
            return {**batch, "before": (torch.arange(width) - 1 - width).expand_as(batch["before"])}

        return wrong

    wrap(f"{TEXTS}.CausalTextChoice._collate_packed", make)


@defect("tasks/test_text_choice.py", "cannot_take_the_mask")
def every_model_takes_the_mask() -> None:
    replace(f"{TEXTS}.CausalTextChoice._packs", lambda self, model, example, longest: True)


@defect("tasks/test_text_choice.py", "special_tokens_once")
def special_tokens_before_a_chat() -> None:
    replace("bayestune.tasks.prompts.Prompt.special_tokens", property(lambda self: True))
