"""The rank of this training process, from the environment that torchrun and `accelerate launch` set."""

import os
import sys
from typing import NoReturn


def process_count() -> int:
    """Processes that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files, evaluates and prints. A launcher ends the others if it fails."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(code: int) -> NoReturn:
    """Exit at once: in a normal exit of the interpreter, gloo's threads can abort or deadlock."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
