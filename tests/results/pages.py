"""A page, parsed, and the tables in it."""

from pathlib import Path

from bs4 import BeautifulSoup, Tag

SECTIONS = [
    "waterfall",
    "families",
    "bytes",
    "phases",
    "runs",
    "lengths",
    "longest",
    "prediction",
    "published",
    "verdicts",
    "matrix",
]


def parsed(path: Path) -> BeautifulSoup:
    """The page in that file."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def table(soup: Tag, name: str) -> list[list[Tag]]:
    """The cells of the body of the table whose caption has that id."""
    caption = soup.find(id=name)
    assert isinstance(caption, Tag), name
    return [row.find_all(["th", "td"]) for row in caption.find_parent("table").tbody.find_all("tr")]


def values(soup: Tag, name: str) -> list[list[int | float]]:
    """The figures of that table, as machines read them."""
    rows = [[cell.data["value"] for cell in row if cell.find("data")] for row in table(soup, name)]
    return [[float(value) if "." in value or "e" in value else int(value) for value in row] for row in rows]
