"""docs/configuration.md is what the fields say."""

from __future__ import annotations

from tools.configuration import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `python tools/configuration.py` and commit docs/configuration.md"


def test_every_key_is_explained() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    assert not [row for row in rows if row.endswith("|  |")]
