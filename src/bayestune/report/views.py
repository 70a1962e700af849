"""What tables and pages show, as plain values: made from cells elsewhere, written by `markdown` and `html`."""

from dataclasses import dataclass

LONGEST = 120


@dataclass(frozen=True, kw_only=True)
class Value:
    """One place of a table: its text, and whether it is the best or the second best of its column."""

    text: str
    best: bool = False
    second: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a block; `published` where its values were measured by others."""

    label: str
    values: tuple[Value, ...]
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """One measure, a line a method and a column a data set; `corner` says what the lines are."""

    heading: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: what it shows, where it came from, blocks, and notes below them."""

    title: str
    facts: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark of an axis, at `place` pixels."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something drawn: the outline of a path in pixels, and a look that the style sheet knows."""

    path: str
    look: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of `width` x `height` pixels with its axes in the box (left, top, right, bottom)."""

    title: str
    caption: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a legend: a look, drawn as the path `outline` in 22 x 12 pixels, and what it stands for."""

    look: str
    outline: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Charts side by side with one legend."""

    heading: str
    keys: tuple[Key, ...]
    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A plain table of texts, folded away until it is asked for."""

    heading: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, with a text that says how to read it."""

    heading: str
    text: str
    tables: tuple[Table, ...] = ()
    groups: tuple[Group, ...] = ()
    listings: tuple[Listing, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    facts: tuple[str, ...]
    sections: tuple[Section, ...]


def shown(text: str, longest: int = LONGEST) -> str:
    """A text from outside as it may be shown: on one line, cut at `longest`, without characters that do not print."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
