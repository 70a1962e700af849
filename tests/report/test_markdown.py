"""Markdown tables: the exact text of a small one, and texts from outside that stay texts."""

import pytest

from bayestune.report.markdown import escaped, markdown
from bayestune.report.views import LONGEST, Block, Line, Table, Value, shown


def table(text: str = "50.00") -> Table:
    lines = (
        Line(label=text, values=(Value(text="1.0", best=True), Value(text="2.0", second=True))),
        Line(label="paper", values=(Value(text="-"), Value(text=text)), published=True),
    )
    block = Block(heading=text, corner="method", columns=("A", text), lines=lines)
    return Table(title=text, facts=(text, "two"), blocks=(block,), notes=(text,))


def test_the_text_of_a_small_table() -> None:
    assert markdown(table()) == (
        "# 50.00\n\n- 50.00\n- two\n\n## 50.00\n\n"
        "| method | A | 50.00 |\n| --- | --: | --: |\n"
        "| 50.00 | **1.0** | <ins>2.0</ins> |\n| *paper* | - | 50.00 |\n\n- 50.00\n"
    )


@pytest.mark.parametrize("text", ["<script> a|b *b* `c` [d](e) a_b_ &lt; ~~x~~ #1 $x$", "\\"])
def test_nothing_in_a_text_is_markdown(text: str) -> None:
    assert escaped(text).replace("\\\\", "\0").replace("\\", "").replace("\0", "\\") == text
    special = set("\\`*_[]<>|#&~$")
    quoted = escaped(text)
    for place, character in enumerate(quoted):
        if character in special - {"\\"}:
            assert quoted[place - 1] == "\\"
    assert len(quoted) == len(text) + sum(character in special for character in text)
    assert len(markdown(table(text)).splitlines()) == len(markdown(table()).splitlines())


def test_a_text_from_outside_is_shown_on_one_line_and_cut() -> None:
    assert shown("a\nb\u2028c\x00d\u202ee") == "a\ufffdb\ufffdc\ufffdd\ufffde"
    assert shown("x" * LONGEST) == "x" * LONGEST
    assert shown("x" * 100_000) == "x" * (LONGEST - 3) + "..."
