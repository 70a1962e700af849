"""Defects of folders, checksums, saved posteriors and checkpoints."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from mutants.defect import defect, replace, wrap

FILES = "bayestune.files.folders"
STATE = "bayestune.storage.state"
MANIFEST = "bayestune.storage.manifest"
CHECKPOINTS = "bayestune.training.checkpoint_files"
GGUF = "serving/test_gguf.py"
FAULTS = "training/test_checkpoint_faults.py"
STORAGE = "storage/test_storage.py"


@defect(STORAGE, "P11")
def two_processes_save_to_one_folder() -> None:
    @contextlib.contextmanager
    def wrong(target: Any, **settings: Any) -> Iterator[None]:
        yield

    replace(f"{FILES}.alone", wrong)


@defect(STORAGE, "on_disk")
def nothing_is_flushed_to_the_disk() -> None:
    replace("bayestune.files.disk.flush", lambda folder: None)


@defect(STORAGE, "P02 and left")
def the_litter_of_killed_saves_stays() -> None:
    replace(f"{FILES}._remove_litter", lambda target: None)


@defect(STORAGE, "overwrite or existing")
def any_folder_is_overwritten() -> None:
    replace(f"{FILES}._check_target", lambda target, overwrite, kind: None)


@defect(STORAGE, "interrupted or killed_at")
def the_old_posterior_goes_before_the_new_one_stands() -> None:
    import shutil

    def wrong(work: Any, target: Any, aside: Any) -> None:
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)

    replace(f"{FILES}.publish", wrong)


@defect("storage/test_faults.py", "P06 and twice")
def json_that_is_not_strict() -> None:
    replace("bayestune.files.json_files.strict_json", lambda text, *, limit, finite=True: json.loads(text))


@defect("storage/test_faults.py", "P08 and not nightly")
def the_hashes_of_a_posterior_are_not_compared() -> None:
    def wrong(folder: Any, records: Any) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in records}

    replace(f"{MANIFEST}.read_files", wrong)


@defect("storage/test_faults.py", "P09")
def files_that_the_manifest_does_not_list_are_let_in() -> None:
    replace(f"{MANIFEST}._check_entries", lambda folder, allowed: None)


@defect("storage/test_faults.py", "P06")
def other_weights_of_the_same_shapes_are_taken_for_the_base() -> None:
    replace("bayestune.storage.fingerprint.weights_difference", lambda expected, found: None)


@defect("storage/test_faults.py", "another_function")
def other_settings_of_the_base_are_ignored() -> None:
    replace("bayestune.storage.fingerprint.settings_difference", lambda expected, found: None)


@defect("storage/test_faults.py", "wrong_settings")
def settings_of_an_adapter_are_not_checked() -> None:
    replace(f"{STATE}.settings_fault", lambda values, kind: None)


@defect("storage/test_faults.py", "wrong_tensors")
def tensors_of_an_adapter_are_not_checked() -> None:
    replace(f"{STATE}.tensor_fault", lambda expected, found: None)


@defect(STORAGE, "would_not_come_back")
def numbers_that_do_not_come_back_are_saved() -> None:
    replace(f"{STATE}.value_fault", lambda tensors: None)


@defect(STORAGE, "P10")
def any_adapter_name_becomes_a_path() -> None:
    replace(f"{STATE}.check_name", lambda adapter: None)


@defect("test_golden.py")
def the_square_of_g_in_the_golden_folder() -> None:
    wrap("bayestune.functional.std", lambda right: lambda rho: right(rho) * rho.abs())


@defect(FAULTS, "P08 and not nightly")
def the_sums_of_a_checkpoint_are_not_compared() -> None:
    def wrong(checkpoint: Any) -> set[str]:
        return {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}

    replace(f"{CHECKPOINTS}.check_checkpoint", wrong)


@defect(FAULTS, "P04 and passed_over")
def the_first_checkpoint_instead_of_the_last() -> None:
    from bayestune.training.checkpoint_files import _checkpoints, _step

    replace(f"{CHECKPOINTS}.last_complete", lambda folder: min(_checkpoints(folder), key=_step, default=None))


@defect(FAULTS, "seal")
def a_seal_that_forgets_a_file() -> None:
    def make(right: Any) -> Any:
        def wrong(checkpoint: Any) -> None:
            hidden = checkpoint.parent / "hidden"
            name = next(path for path in sorted(checkpoint.rglob("*")) if path.is_file())
            name.rename(hidden)
            right(checkpoint)
            hidden.rename(name)

        return wrong

    wrap(f"{CHECKPOINTS}.seal", make)


@defect(FAULTS, "P04 and best")
def the_best_checkpoint_is_rotated_away() -> None:
    wrap(f"{CHECKPOINTS}.rotate", lambda right: lambda run, limit, keep: right(run, limit, set()))


@defect("training/test_checkpoint.py", "P05")
def random_states_are_not_restored() -> None:
    replace("bayestune.training.checkpoint_state.load_random_state", lambda *args: None)


@defect("training/test_checkpoint.py", "settings or rows_and")
def a_resumed_run_with_other_settings() -> None:
    name = "bayestune.training.checkpoint.SafeTrainer.resume_settings"
    replace(name, lambda self: {})


@defect("storage/test_storage.py", "holder_of_its_lock")
def a_folder_is_looked_at_before_its_lock_is_held() -> None:
    from contextlib import contextmanager
    from pathlib import Path

    from bayestune.files import folders

    def make(right: Any) -> Any:
        @contextmanager
        def wrong(path: Any, *, overwrite: bool, kind: Any = None) -> Any:
            folders._check_target(Path(path).absolute(), overwrite, kind)
            with right(path, overwrite=overwrite, kind=kind) as work:
                yield work

        return wrong

    wrap("bayestune.files.folders.new_folder", make)


@defect(GGUF)
def rows_of_queries_and_keys_in_the_order_of_transformers() -> None:
    replace("bayestune.serving.gguf.permuted_rows", lambda weight, heads: weight)


@defect(GGUF)
def an_alpha_that_scales_a_gguf_adapter_twice() -> None:
    def make(right: Any) -> Any:
        return lambda *args, rank, source: right(*args, rank=2 * rank, source=source)

    wrap("bayestune.serving.gguf.write_gguf", make)
