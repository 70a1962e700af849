"""Tables and reports as self-contained HTML pages: no scripts, no network. The only file that imports jinja2.

Every external text is escaped, in elements and attributes. Pictures are embedded as data, and a
Content-Security-Policy forbids everything but those and the style sheet inside the page. Equal views give equal bytes.
"""

import base64
from pathlib import Path

from bayestune.report.views import Page, Section, Table

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("reports need jinja2: pip install '.[report]'", name=error.name) from error

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()


def page_html(page: Page) -> str:
    """Return the page as one HTML file."""
    return _TEMPLATES.get_template("page.html.jinja").render(page=page)


def table_html(table: Table) -> str:
    """Return a page of one table."""
    return page_html(Page(table.title, facts=(), sections=(Section("", "", tables=(table,)),)))
