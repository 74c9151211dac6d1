"""What is indexed already: for shards in a store, from which version of the shard each index was made.

Enters: the manifest of an earlier run and the journal of one that was interrupted. Leaves: an entry for each shard that
they know. Why it exists: a killed run over thousands of remote shards must go on where it was. Whether a local shard is
older than its index is seen in the times of the files; for an object only its etag tells, which no index file holds,
since the same data must have the same index in every store.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from data_pipes.errors import ShardError
from data_pipes.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from data_pipes.store.storage import Storage
from data_pipes.store.urls import is_remote, join_url

JOURNAL_NAME = f"{MANIFEST_NAME}.partial"
"""The journal's file, in the folder of the manifest."""
_MAX_BYTES = 1 << 30
"""Size of a journal in a store, at most."""
_FLUSH_S = 10.0
"""Least seconds between two writes of a journal in a store, where it is written as a whole."""


class IndexJournal:
    """`manifest.json.partial` in the folder of the manifest: a JSON line per shard, until the manifest is written."""

    def __init__(self, root: str, storage: Storage) -> None:
        """Reads what is known and writes the journal at once: a folder or store that takes no files is found before a
        shard is read.

        Args:
            root: path or URL of the folder of the manifest.
            storage: for a folder in a store.

        Raises:
            ShardError: the journal cannot be written.
        """
        self._root, self._place, self._storage = root, join_url(root, JOURNAL_NAME), storage
        self.known = {entry.url: entry for entry in [*self._of_manifest(), *self._of_journal()]}
        self._lines = [_line(entry) for entry in self.known.values()]
        self._written_s = 0.0
        self._write()

    def add(self, entry: ShardEntry) -> None:
        """Notes one more shard."""
        self._lines.append(_line(entry))
        if not is_remote(self._place):
            with open(self._place, "a", encoding="utf-8") as file:
                file.write(self._lines[-1])
        elif time.monotonic() > self._written_s + _FLUSH_S:
            self._write()

    def flush(self) -> None:
        """Writes what is not written yet."""
        if is_remote(self._place):
            self._write()

    def finish(self) -> None:
        """Removes the journal, once the manifest is written; in a store an empty object stays."""
        if is_remote(self._place):
            self._storage.write_whole(self._place, b"")
        else:
            os.unlink(self._place)

    def _write(self) -> None:
        try:
            self._storage.write_whole(self._place, "".join(self._lines).encode())
        except OSError as error:
            raise ShardError(
                f"{self._root}: the manifest cannot be written ({error.strerror or error}); name a writable folder "
                "with --out"
            ) from error
        self._written_s = time.monotonic()

    def _of_manifest(self) -> list[ShardEntry]:
        with suppress(ValueError, OSError):
            return list(Manifest.load(self._root, self._storage).shards)
        return []

    def _of_journal(self) -> list[ShardEntry]:
        try:
            if is_remote(self._place):
                data = self._storage.read_whole(self._place, _MAX_BYTES)
            else:
                data = Path(self._place).read_bytes()
        except OSError:
            return []
        entries = []
        for line in data.splitlines():
            with suppress(ValueError, TypeError):  # a half line of a killed run
                entries.append(ShardEntry(**json.loads(line)))
        return entries


def _line(entry: ShardEntry) -> str:
    """An entry as a line of the journal."""
    return json.dumps(asdict(entry)) + "\n"
