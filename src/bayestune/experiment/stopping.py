"""Delay SIGINT and SIGTERM during training until the current update is done and its checkpoint is saved."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStep(TrainerCallback):
    """Context manager that delays the exception of SIGINT or SIGTERM until the current update has a checkpoint.

    It calls the handlers that were installed before, and restores them on exit. The exception of a second signal is
    raised immediately. Unless `active`, or outside the main thread, it does nothing.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._raised: BaseException | None = None

    def __enter__(self) -> "StopAtStep":
        for number in _SIGNALS if self._active else ():
            if callable(signal.getsignal(number)):
                self._before[number] = signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        try:
            self._before[number](number, frame)
        except BaseException as error:
            if self._raised is not None:
                raise
            self._raised = error

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._raised is not None:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._raised is not None:
            control.should_training_stop = True
            self._raised.args = (f"saved {args.output_dir}/checkpoint-{state.global_step}, to resume from",)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._hold:  # else it was changed by the handler itself
                signal.signal(number, handler)
        if self._raised is not None and error is None:
            raise self._raised
