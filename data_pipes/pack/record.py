"""The record of a pack: what was begun in a folder, with which options, and whether it is finished.

Enters: the folder and all that decides the content. Leaves: OUT/pack.json. Why it exists: a killed pack may only be
continued as it was begun, a finished one is never overwritten, and two at once would spoil each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipes.store.files import exclusive, write_atomically

RECORD_NAME = "pack.json"
"""The record's file in the folder that is packed into."""
WORK_FOLDER = ".pack"
"""Below the folder that is packed into: the lock, and the notes on finished shards."""


def refuse_foreign(root: Path) -> None:
    """Refuses a folder that a pack may not write into.

    Raises:
        ValueError: the folder holds something else, or a finished pack.
    """
    if not root.exists() or _read_record(root) is not None:
        return
    if not root.is_dir() or any(child.name != WORK_FOLDER for child in root.iterdir()):
        raise ValueError(f"{root}: exists and was not begun by `tessera pack`; choose a new or empty folder")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps other packs out of a folder; the lock goes with the process, so a killed one leaves none behind.

    On a file system without locks only the record protects.

    Raises:
        ValueError: another pack is writing here.
    """
    (root / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    busy = ValueError(f"{root}: another `tessera pack` is writing here; wait for it, or choose another folder")
    with exclusive(root / WORK_FOLDER / "lock", 0, busy):
        yield


def begin(root: Path, identity: dict[str, Any], probe: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The record of a new pack, or of the one that is continued.

    Args:
        root: the folder that is packed into.
        identity: all that decides the content of the shards.
        probe: measures the shrink factor of each split; called for a new pack only.

    Raises:
        ValueError: the pack that was begun here has another identity, or is finished.
    """
    record = _read_record(root)
    if record is None:
        record = {"state": "packing", "identity": identity, "shrink_factors": probe()}
        write_atomically(root / RECORD_NAME, json.dumps(record, indent=1).encode())
        return record
    changed = what_changed(record["identity"], identity)
    if changed:
        raise ValueError(
            f"{root}: was begun with other options or another source ({'; '.join(changed)}); repeat the first "
            "command to continue it, or choose another folder"
        )
    return record


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each entry in which two identities differ, in words."""
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _read_record(root: Path) -> dict[str, Any] | None:
    """The record of a pack that was begun here; None if none was.

    Raises:
        ValueError: the pack is finished, or the file is no record.
    """
    path = root / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_finished = {"packing": False, "finished": True}[record["state"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of `tessera pack`; choose another folder") from error
    if is_finished:
        raise ValueError(
            f"{root}: holds a finished dataset; it is never overwritten: choose another folder, or delete it first"
        )
    return record
