"""`tessera cache`: what a node's cache of remote data holds, and emptying it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

if TYPE_CHECKING:
    from data_pipes.cache.folder import CacheStatus

HELP = "Show what a cache of remote data on a local disk holds, or empty it; safe while runs use it."
EXAMPLES = """\
tessera cache status /local/cache          bytes, chunks, and the runs that use it now
tessera cache clear /local/cache           frees the space at once; runs go on and read from the store again

DIR is the folder that runs have as data.cache.dir. Either action removes what killed processes left half written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what to do, and where."""
    parser.add_argument("action", choices=("status", "clear"), help="show it, or empty it")
    parser.add_argument("folder", metavar="DIR", help="folder of the cache")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Shows or empties the cache.

    Raises:
        ValueError: the folder is no cache.
    """
    from data_pipes.cache.cache import open_cache

    cache = open_cache(arguments.folder)
    freed_bytes = cache.clear() if arguments.action == "clear" else None
    status = cache.status()
    console = Console(stderr=True)
    for line in _describe(status, freed_bytes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {
        "dir": status.dir,
        **({} if freed_bytes is None else {"freed_bytes": freed_bytes}),
        "used_bytes": status.used_bytes,
        "num_chunks": status.num_chunks,
        "chunk_bytes": status.chunk_bytes,
        "num_pinned": status.num_pinned,
        "num_writing": status.num_writing,
        "users": [user._asdict() for user in status.users],
    }


def _describe(status: CacheStatus, freed_bytes: int | None) -> list[str]:
    """The status in lines for people; `freed_bytes` is None where nothing was emptied."""
    freed = "" if freed_bytes is None else f"{decimal(freed_bytes)} freed; "
    lines = [
        f"{status.dir}: {freed}{status.num_chunks:,} chunks, {decimal(status.chunk_bytes)}, {status.num_pinned:,} of "
        f"them in use; {status.num_writing:,} being written; "
        + (f"{len(status.users):,} processes use it" if status.users else "no process uses it")
    ]
    lines += [
        f"process {user.process_id}: cap {decimal(user.max_bytes)}, needs {user.num_claims:,} of the chunks again"
        for user in status.users
    ]
    return lines
