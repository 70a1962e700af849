"""Signals during training: what they raise waits for the end of the update, and for its checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStep(TrainerCallback):
    """Inside its `with`, what SIGINT and SIGTERM raise waits until the update is done and a checkpoint of it saved.

    The handlers are those that were there before, and are there again afterwards; one that raises nothing stops
    nothing. What a second signal raises, is raised at once. Without `active`, and outside the main thread, nothing
    is changed.
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
