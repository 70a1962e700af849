"""What processes do to a folder that they share: each rename is reported, and a signal can end a process at one."""

import os
import signal
import sys
from collections.abc import Mapping


def watch(file: int, *, signals: Mapping[str, signal.Signals] | None = None) -> None:
    """Write the new path of every rename of this process to the descriptor `file`, a line each, from now on.

    Before a rename to a path that ends as a key of `signals`, the process sends itself that signal.
    """

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "os.rename":
            path = str(args[1])
            for end, number in (signals or {}).items():
                if path.endswith(end):
                    os.kill(os.getpid(), number)
            os.write(file, f"{path}\n".encode())

    sys.addaudithook(hook)
