"""What the site's build does to links and docstrings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.docs_docstrings import one_argument_each, plain_brackets
from tools.docs_links import on_page_markdown


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("data.md", "../configs/mae/vit_base.yaml", "repository/configs/mae/vit_base.yaml.txt"),
        ("decisions/index.md", "../../README.md", "../repository/README.md.txt"),
        ("decisions/index.md", "../data.md", "../data.md"),  # inside of docs/: mkdocs' own
        ("data.md", "../configs/mae/missing.yaml", "../configs/mae/missing.yaml"),  # mkdocs warns of it
        ("data.md", "../configs/mae", "../configs/mae"),  # a folder
        ("data.md", "../../outside.md", "../../outside.md"),
    ],
)
def test_links_to_files_beside_docs_lead_to_their_copies(page: str, link: str, expected: str) -> None:
    moved = on_page_markdown(f"see [it]({link}) there", SimpleNamespace(file=SimpleNamespace(src_uri=page)))
    assert moved == f"see [it]({expected}) there"


def test_shapes_are_no_links_and_placeholders_no_tags() -> None:
    text = "in [-1, 1] [B, C] of `[a] [b]` in <run>/x, `<run>`, 3 < 4"
    assert plain_brackets(text).replace("\u200b", "|") == "in [-1, 1]| [B, C] of `[a] [b]` in <|run>/x, `<run>`, 3 < 4"


def test_arguments_that_share_a_line_are_split_where_they_are_arguments() -> None:
    text = "Args:\n    train, test: two\n        folders.\n    one, more: not both."
    assert one_argument_each(text, {"train", "test", "one"}) == (
        "Args:\n    train: two\n        folders.\n    test: two\n        folders.\n    one, more: not both."
    )


def test_every_page_of_the_reference_names_modules_that_exist(root: Path) -> None:
    for page in (root / "docs" / "reference").glob("*.md"):
        for line in page.read_text().splitlines():
            if line.startswith("::: "):
                module = root / line.removeprefix("::: ").replace(".", "/")
                assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), f"{page}: {line}"
