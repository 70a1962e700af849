"""What a process does to a folder that it shares with others: each of its renames is reported."""

import os
import sys
from collections.abc import Callable


def watch(file: int, *, before: Callable[[str], None]) -> None:
    """Write the new path of each rename of this process, a line each, to the descriptor `file`, from now on.

    Args:
        file: of a pipe, or of a file that several processes append to.
        before: called with that path before it is written and the rename made.
    """

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "os.rename":
            before(str(args[1]))
            os.write(file, f"{args[1]}\n".encode())

    sys.addaudithook(hook)
