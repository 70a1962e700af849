"""A table as Markdown."""

import re

from bayestune.report.views import Block, Table, Value


def markdown(table: Table) -> str:
    """Return the table for GitHub: heading, facts, one Markdown table per block, and notes.

    Best values are bold, second best underlined. Texts are escaped, so nothing in them becomes Markdown or HTML. Equal
    tables give equal bytes.
    """
    parts = [f"# {escaped(table.title)}", "\n".join(f"- {escaped(fact)}" for fact in table.facts)]
    for block in table.blocks:
        parts += [f"## {escaped(block.heading)}", _lines(block)]
    parts.append("\n".join(f"- {escaped(note)}" for note in table.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Return `text` with a backslash before every character that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", text)


def _lines(block: Block) -> str:
    head = [escaped(text) for text in (block.corner, *block.columns)]
    lines = [head, ["---", *["--:"] * len(block.columns)]]
    for line in block.lines:
        label = f"*{escaped(line.label)}*" if line.published else escaped(line.label)
        lines.append([label, *map(_value, line.values)])
    return "\n".join(f"| {' | '.join(texts)} |" for texts in lines)


def _value(value: Value) -> str:
    text = escaped(value.text)
    return f"**{text}**" if value.best else f"<ins>{text}</ins>" if value.second else text
