"""Links from docs/ to files beside it: right in the repository, and right on the site.

A page may link to `../configs/mae/vit_base.yaml`, as whoever reads it in the repository expects. The site has only what
lies in docs/, so mkdocs would call that link broken. This hook of mkdocs copies each such file into the site, as text
that a browser shows, and points the link there. A link to something that does not exist, or to a folder, is left as it
is: mkdocs then warns, and the build fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to and that lie outside of docs/."""
    for page in list(files.documentation_pages()):
        for link in _LINK.findall(page.content_string):
            source = _source(link, page.src_uri)
            if source is not None and files.get_file_from_path(_place(source)) is None:
                files.append(File.generated(config, _place(source), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/ to those copies."""

    def moved(found: re.Match[str]) -> str:
        source = _source(found[1], page.file.src_uri)
        if source is None:
            return found[1]
        return posixpath.relpath(_place(source), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(moved, markdown)


def _source(link: str, src_uri: str) -> Path | None:
    """The file of the repository that a page's link leads to, where it lies outside of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(src_uri), link))
    inside = path.startswith(("docs/", "../"))
    return ROOT / path if not inside and (ROOT / path).is_file() else None


def _place(source: Path) -> str:
    """Where the copy lies in the site: the ending makes browsers show it."""
    return f"repository/{source.relative_to(ROOT).as_posix()}.txt"
