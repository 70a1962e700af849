"""What tables and pages show, as plain values: made from cells in `tables`, and written by `markdown` and `html`."""

from typing import NamedTuple

LONGEST = 120


class Value(NamedTuple):
    """One value of a table, and whether it is the best or the second best of its column."""

    text: str
    best: bool = False
    second: bool = False


class Line(NamedTuple):
    """One line of a block; `published` if its values come from a paper."""

    label: str
    values: tuple[Value, ...]
    published: bool = False


class Block(NamedTuple):
    """One measure, with a line per method and a column per data set; `corner` is the heading of the labels."""

    heading: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


class Table(NamedTuple):
    """A table: its title, facts about its origin, blocks, and notes below them."""

    title: str
    facts: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


class Figure(NamedTuple):
    """A picture with its heading; `alt` describes it to readers who cannot see it."""

    heading: str
    alt: str
    svg: str


class Listing(NamedTuple):
    """A plain table of texts, folded until the reader opens it."""

    heading: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """A part of a page, with a text that explains how to read it."""

    heading: str
    text: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    listings: tuple[Listing, ...] = ()


class Page(NamedTuple):
    """A report."""

    title: str
    facts: tuple[str, ...]
    sections: tuple[Section, ...]


def shown(text: str, longest: int = LONGEST) -> str:
    """Return an external text on one line of at most `longest` characters, without unprintable ones."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
