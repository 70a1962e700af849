"""Defects of runs, tables, exports, reports and the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mutants.defect import defect, replace, wrap

SUMMARY = "bayestune.tables.summary"
CLI = "bayestune_cli"


@defect("tables/test_tables.py", "best_and_second")
def the_best_is_the_largest_of_any_measure() -> None:
    def make(right: Any) -> Any:
        def wrong(measure: Any, spreads: Any) -> Any:
            best, second = right(measure, spreads)
            return (best, second) if measure.higher_is_better else (second, best)

        return wrong

    wrap(f"{SUMMARY}.ranks", make)


@defect("tables/test_tables.py", "fewer_seeds")
def values_of_fewer_seeds_are_ranked() -> None:
    def make(right: Any) -> Any:
        def wrong(measure: Any, spreads: Any) -> Any:
            return right(measure, {key: _of_one_seed(value) for key, value in spreads.items()})

        return wrong

    wrap(f"{SUMMARY}.ranks", make)


def _of_one_seed(value: Any) -> Any:
    import dataclasses

    return dataclasses.replace(value, seeds=1)


@defect("tables/test_tables.py", "sample_deviation or spread")
def the_deviation_of_a_whole_population() -> None:
    import dataclasses
    import statistics

    def make(right: Any) -> Any:
        def wrong(values: Any) -> Any:
            found = right(values)
            return (
                found if found.deviation is None else dataclasses.replace(found, deviation=statistics.pstdev(values))
            )

        return wrong

    wrap(f"{SUMMARY}.spread", make)


@defect("cli/test_contract.py", "exit_code")
def every_failure_has_the_exit_code_1() -> None:
    name = f"{CLI}.errors.fail"
    wrap(name, lambda right: lambda message, error, code, *, as_json: right(message, error, 1, as_json=as_json))


@defect("cli/test_contract.py", "exit_code")
def a_failure_has_no_json() -> None:
    name = f"{CLI}.errors.fail"
    wrap(name, lambda right: lambda message, error, code, *, as_json: right(message, error, code, as_json=False))


@defect("cli/test_contract.py", "cannot_be_written")
def an_output_that_cannot_be_written_is_found_when_all_is_done() -> None:
    replace("bayestune.files.disk.check_writable", lambda folder, what: None)


@defect("cli/test_contract.py", "named_before")
def a_record_made_with_other_rows_passes_for_the_same() -> None:
    replace("bayestune.experiment.provenance.warn_if_other", lambda record, found: None)


@defect("cli/test_disk.py", "full_disk")
def a_full_disk_is_an_internal_error() -> None:
    @contextmanager
    def wrong(path: Any, *, needed: int | None = None) -> Iterator[None]:
        yield

    replace("bayestune.files.disk.writing", wrong)


@defect("report/test_markdown.py", "markdown")
def texts_of_a_table_are_markdown() -> None:
    replace("bayestune.report.markdown.escaped", lambda text: text)


@defect("serving/test_lora.py", "plain_peft")
def every_exported_draw_is_the_first() -> None:
    wrap("bayestune.sampling.stacked.single_weights", lambda right: lambda model, index, seed: right(model, 0, seed))


@defect("serving/test_lora.py", "warns")
def an_export_says_nothing_of_what_servers_refuse() -> None:
    replace("bayestune.serving.lora._notes", lambda posterior, adapter: [])


@defect("test_cli.py", "ood_is_positive")
def detection_takes_the_own_rows_for_the_others() -> None:
    def make(right: Any) -> Any:
        def wrong(*args: Any, **options: Any) -> Any:
            found = right(*args, **options)
            return {key: 1 - value if key.startswith("auroc") and value else value for key, value in found.items()}

        return wrong

    wrap("bayestune.experiment.detection.detection", make)


@defect("experiment/test_folder.py", "P11")
def a_run_is_made_without_its_lock() -> None:
    import contextlib

    replace("bayestune.experiment.folder._alone", lambda output: contextlib.nullcontext())


@defect("experiment/test_prompts.py", "whatever_became")
def a_loaded_run_draws_its_shots_again() -> None:
    name = "bayestune.experiment.trained.resolve"
    wrap(name, lambda right: lambda *args, shots=None, **more: right(*args, **more))


@defect("experiment/test_prompts.py", "no_split")
def shots_are_trained_on() -> None:
    from bayestune.tasks.datasets import rows_of

    name = "bayestune.tasks.tokenized.TokenizedTask.rows"
    replace(name, lambda self, split: list(rows_of(self.spec, split, self.data)))
