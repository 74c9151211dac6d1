"""The folder of a cache: what may lie in it, what it is configured by, and what it holds.

Enters: a folder. Leaves: a `CacheConfig`, a `CacheStatus`, or a refusal. Why it exists: a cache deletes files of its
folder by their names, so nothing else may lie in it.

A folder holds `index.sqlite` and its journal (see data_pipes.cache.database), `lock` and `owners/` (see
data_pipes.cache.owners), `<key>.chunk`, and `<key>.<number>.part` for what is being written.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipes.bounds import bounded
from data_pipes.cache.database import DATABASE_NAME

_OURS = re.compile(r"index\.sqlite(-journal)?|lock|owners|[0-9a-f]{64}\.(chunk|[0-9]+\.part)|lost\+found")
"""The names of everything that may lie in a cache's folder."""
_MIN_BYTES = 2 << 20
"""A cap below this is an error."""
_FEW_BYTES = 64 << 20
"""A cap below this is warned of: a chunk has 4 to 16 MiB."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheConfig:
    """A cache of remote data on a local disk."""

    dir: str | None = None
    """Folder on a local disk, for this alone; shared by all ranks of the node and by several runs. None: no cache."""
    max_bytes: int = bounded(100 << 30, least=1)
    """Hard cap on everything in the folder, other runs' chunks included, in bytes."""


class CacheUser(NamedTuple):
    """A living process that put chunks or said when it needs some."""

    process_id: int
    max_bytes: int
    num_claims: int


@dataclass(frozen=True)
class CacheStatus:
    """What a cache folder holds."""

    dir: str
    used_bytes: int
    """Of the disk: chunks, those being written, the index and the space that its journal takes now and then."""
    num_chunks: int
    """That are complete."""
    chunk_bytes: int
    """Of the disk, for these."""
    num_pinned: int
    """Of these, in use now by any living process."""
    num_writing: int
    """Chunks that are being written."""
    users: tuple[CacheUser, ...]


def checked_folder(config: CacheConfig) -> Path:
    """The folder that a configuration names.

    Raises:
        ValueError: it names none on a local disk, or the cap holds no chunk.
    """
    if not config.dir or "://" in config.dir:
        raise ValueError(f"data.cache.dir is {config.dir!r}; expected a folder on a local disk")
    if config.max_bytes < _MIN_BYTES:
        raise ValueError(
            f"data.cache.max_bytes is {config.max_bytes:,}; expected at least {_MIN_BYTES:,}, better thousands of "
            "chunks of 4 to 16 MiB"
        )
    if config.max_bytes < _FEW_BYTES:
        _logger.warning("data.cache.max_bytes is %s: room for few chunks of 4 to 16 MiB", f"{config.max_bytes:,}")
    return Path(os.path.abspath(os.path.expanduser(config.dir)))


def check_is_cache(folder: Path, *, may_be_new: bool) -> None:
    """Refuses a folder that is not for a cache.

    Args:
        folder: to look into; it need not exist.
        may_be_new: whether an empty or missing folder will do.
    Raises:
        ValueError: other things are in it, or it has to be a cache and is none.
    """
    names = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{folder}: not a folder for a cache, it holds other things, e.g. {foreign[0]!r}; name an empty or new one"
        )
    if not may_be_new and DATABASE_NAME not in names:
        raise ValueError(f"{folder}: no cache here; name the folder that a run has as data.cache.dir")
