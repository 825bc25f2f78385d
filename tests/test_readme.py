"""What the README and the pages of docs/ show is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recognition.messages import json_schema, parse_update

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Every relative link of the README and the pages names a file that exists."""
    links = LINK.findall(page.read_text(encoding="utf-8"))

    missing = [link for link in links if "://" not in link and not (page.parent / link).is_file()]
    assert missing == []


def test_messages_of_the_reference_are_valid() -> None:
    """The message reference shows messages that this release reads."""
    shown = _blocks(ROOT / "docs" / "messages.md", "json")

    assert len(shown) == 2
    for block in shown:
        assert parse_update(block).version == 1


def test_the_published_schema_is_what_the_code_says() -> None:
    """docs/message.schema.json is what `recognition schema` prints."""
    published = json.loads((ROOT / "docs" / "message.schema.json").read_text(encoding="utf-8"))

    assert published == json_schema()
