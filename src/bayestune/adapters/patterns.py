"""Regular expressions that name layers, as PEFT takes them: only such as end, whoever wrote them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST, FORKS, EXPRESSIONS = 256, 3, 64
# Names, dots, escapes, groups of alternatives, and a star after a dot: nothing here can repeat what itself repeats.
_PLAIN = re.compile(r"(?:[\w.^$|()\\-]|(?<=\.)\*)*")


def pattern_fault(settings: Mapping[str, Any]) -> str | None:
    """The first setting of LoRA whose regular expression might take for ever, in words; None where there is none.

    With at most `FORKS` stars and groups, and the star that PEFT adds in front of some, a match takes at most the
    fourth power of the length of a module's name; and at most `EXPRESSIONS` of them are more than names.
    """
    expressions = 0
    for name, pattern in _patterns(settings):
        forks = pattern.count("*") + pattern.count("(")
        if len(pattern) > LONGEST or forks > FORKS or not _PLAIN.fullmatch(pattern):
            return (
                f"{name}: found {pattern[:60]!r}, expected names, or a short regular expression with no other "
                f"operators than . .* ( | ) and at most {FORKS} stars and groups; list the names of the layers"
            )
        expressions += forks > 0
        if expressions > EXPRESSIONS:
            return f"{name}: found more than {EXPRESSIONS} regular expressions in all; list the names of the layers"
    return None


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What PEFT hands to `re`, by the name of the setting."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(name), str):  # of a list it compares the names themselves
            yield name, settings[name]
    for name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        found = settings.get(name) or ()
        for pattern in (found,) if isinstance(found, str) else found:
            if isinstance(pattern, str):
                yield name, pattern
