"""Which of several training processes this is, as torchrun and `accelerate launch` tell each in its environment."""

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
    """End this process at once: at the interpreter's own end gloo's threads can abort it, or wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
