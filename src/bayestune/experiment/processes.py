"""Which of several training processes this is, as torchrun and `accelerate launch` tell each in its environment."""

import os

import torch.distributed


def process_count() -> int:
    """Processes that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files, evaluates and prints. A launcher ends the others if it fails."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """End the group of this process, if it is in one: gloo's threads would else abort the interpreter at its exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
