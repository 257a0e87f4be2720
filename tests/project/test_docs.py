"""The pages in docs/, and those that point there: what they name exists."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|json))`")
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def named(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    names = {named(page) for page in PAGES}
    assert {"docs/README.md", "docs/design.md", "docs/glossary.md", "docs/performance.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=named)
def test_named_files_exist(page):
    """From the root, or in the package."""
    for name in FILE.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        assert (ROOT / name).exists() or (ROOT / "lstm_triton" / name).exists(), name


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").iterdir():
        assert path.name == "README.md" or path.suffix == ".svg" or f"]({path.name}" in index, path


def test_pictures_are_drawings():
    for picture in (ROOT / "docs").rglob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
