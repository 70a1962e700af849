"""Pages: texts from outside never become elements or attributes, nothing is fetched, the bytes are the same again."""

import base64
import importlib.util
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from bayestune.report import html
from bayestune.report.views import Block, Figure, Line, Listing, Page, Section, Table, Value

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style></title></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!--",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\x1b[31m",
]


class Parsed(HTMLParser):
    """Elements with their attributes in order, and all text outside of the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self.other: list[str] = []
        self._style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(name for name, _ in attrs)) for tag, attrs in self.elements]


def page(text: str) -> Page:
    """A page with `text` in every place that holds a text from outside."""
    value = Value(text=text, best=True)
    block = Block(
        heading=text,
        corner=text,
        columns=(text,),
        lines=(Line(label=text, values=(value,)), Line(label=text, values=(Value(text=text),), published=True)),
    )
    table = Table(title=text, facts=(text,), blocks=(block,), notes=(text,))
    figure = Figure(heading=text, alt=text, svg="<svg/>")
    listing = Listing(heading=text, columns=(text,), lines=((text,),))
    section = Section(heading=text, text=text, tables=(table,), figures=(figure,), listings=(listing,))
    return Page(title=text, facts=(text,), sections=(section,))


def texts_of(value: Any) -> Counter[str]:
    """How often each text is anywhere in a view."""
    if isinstance(value, str):
        return Counter([value])
    return sum((texts_of(part) for part in value if isinstance(part, str | tuple)), Counter())


@pytest.mark.property("X05")
@pytest.mark.parametrize("payload", PAYLOADS, ids=[payload[:12] for payload in PAYLOADS])
def test_a_text_from_outside_adds_no_element_and_no_attribute(payload: str) -> None:
    plain, found = Parsed(html.page_html(page("plain"))), Parsed(html.page_html(page(payload)))
    assert found.shape == plain.shape
    assert found.other == plain.other == []
    shown = "".join(found.texts)
    # As often as in the page of a plain word.
    assert shown.count(payload) == "".join(plain.texts).count("plain") > 15
    for (_, before), (_, after) in zip(plain.elements, found.elements, strict=True):
        for (name, old), (_, new) in zip(before, after, strict=True):
            assert new == (old or "").replace("plain", payload), name


@pytest.mark.property("X05")
def test_nothing_can_be_fetched_or_run() -> None:
    text = html.page_html(page("plain"))
    found = Parsed(text)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", (("http-equiv", "Content-Security-Policy"), ("content", policy))) in found.elements
    names = {tag for tag, _ in found.elements}
    assert names & {"script", "link", "iframe", "object", "embed", "svg", "base", "form", "a", "image", "use"} == set()
    attributes = {name for _, attrs in found.elements for name, _ in attrs}
    assert not any(name.startswith("on") for name in attributes)
    assert attributes & {"href", "xlink:href", "style", "srcset", "action"} == set()
    sources = [dict(attrs)["src"] for _, attrs in found.elements if "src" in dict(attrs)]
    assert sources == ["data:image/svg+xml;base64,PHN2Zy8+"] and base64.b64decode(sources[0][26:]) == b"<svg/>"
    assert not re.search(r"https?:|//|@import|url\(", text)


def test_the_page_is_balanced_and_of_one_language() -> None:
    text = html.page_html(page("plain"))
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">') and text.endswith("</html>\n")
    for tag in ("html", "head", "body", "table", "tr", "td", "figure", "details", "ul", "li", "div", "span"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_every_text_of_the_views_is_shown() -> None:
    words = iter(range(10_000))

    def named(value: Any) -> Any:
        """The view with each text replaced by a word of its own."""
        if isinstance(value, str):
            return f"word{next(words)}." if value == "plain" else value
        if isinstance(value, tuple):
            parts = [named(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    view = named(page("plain"))
    found = Parsed(html.page_html(view))
    text = "".join([*found.texts, *(value or "" for _, attrs in found.elements for _, value in attrs)])
    missing = [word for word in texts_of(view) if word.startswith("word") and word not in text]
    assert missing == []


def test_best_second_missing_and_published_are_seen() -> None:
    values = (Value(text="1", best=True), Value(text="2", second=True), Value(text="-"), Value(text="4"))
    lines = (Line(label="ours", values=values), Line(label="paper", values=values, published=True))
    block = Block(heading="h", corner="", columns=("a", "b", "c", "d"), lines=lines)
    text = html.table_html(Table(title="t", facts=(), blocks=(block,), notes=()))
    looks = ['<span class="best">1', '<span class="second">2', '<span class="missing">-', "<span>4"]
    assert all(text.count(look) == 2 for look in looks)
    assert text.count('<tr class="published">') == 1
    assert text.count("<h1>t</h1>") == 1


def test_without_jinja2_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    spec = importlib.util.spec_from_file_location("html_without_jinja2", html.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
