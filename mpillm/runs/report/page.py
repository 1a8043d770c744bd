"""The report's page as one HTML file: no network, no script, and each value escaped as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from mpillm.system.messages import printable

TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    key: str
    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]]
    """(what, its colour's name in the page's style)."""
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    """Empty: a table of names and values."""
    rows: Sequence[Sequence[str]]
    figures: frozenset[int] = frozenset()
    """Columns that are aligned to the right."""
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    folder: str
    state: str
    """A word: the name of its colour too."""
    headline: str
    made: str
    share: float | None
    """Of the steps that are done, 0 to 1."""
    figures: Sequence[Figure]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    recipe: Mapping[str, Sequence[tuple[str, str]]]
    """Section → (key, value)."""


def render_page(page: Page) -> str:
    """Return the page's HTML: equal pages give equal bytes."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)
    # A log may hold control characters and halves of characters, which no page can.
    return printable(text)
