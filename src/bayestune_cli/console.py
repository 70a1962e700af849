"""What the program prints: texts from outside cannot steer the terminal; and its own error."""

import re
import sys

import typer

# Control characters but for the end of a line and the tab, marks that turn the direction of writing, and halves of
# characters, which cannot be written at all.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class FlagError(typer.TyperException):
    """A flag, or a file that a flag names, that cannot be right."""


def plain(text: str) -> str:
    r"""`text` with every character that a terminal would obey written as its escape, such as ``\x1b``."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(text: object) -> None:
    """Print a result to stdout."""
    print(plain(str(text)))


def tell(text: object) -> None:
    """Print an error or a warning to stderr."""
    print(plain(str(text)), file=sys.stderr)
