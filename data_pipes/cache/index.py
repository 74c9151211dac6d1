"""What lies in a cache folder, who needs it next, and the right to add to it.

Enters: keys, sizes and times of next use from many processes. Leaves: reservations within the cap, and victims. Why it
exists: the cap is hard, so space is reserved before a byte is written, and given back when the writer dies.

What lies in the folder: see data_pipes.cache.folder.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

from data_pipes.cache.database import (
    DATABASE_NAME,
    Chunk,
    empty_and_unlink,
    find_chunk,
    find_chunks,
    remove_claims,
    set_claims,
    total_bytes,
    transaction,
)
from data_pipes.cache.folder import CacheStatus, CacheUser
from data_pipes.cache.owners import Owner, sweep_owners

_FIXED_BYTES = 64 << 10
"""Disk space of the lock and of the folder of owners."""


class Reservation(NamedTuple):
    """The answer to a wish for space."""

    part: Path | None
    """The file to write the chunk to, before `finish` or `abandon` is called; None: nothing was granted."""
    present: bool = False
    """There is nothing to do: the chunk is there, or somebody is writing it."""
    evicted: Sequence[str] = ()
    """The keys of the chunks that were evicted."""


class CacheIndex:
    """The index of one folder. Safe for threads and processes.

    Raises:
        OSError: from every method, when the folder or the database cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: of the cache.
            max_bytes: hard cap on everything in it.
        """
        self.folder, self.max_bytes = folder, max_bytes
        # for the database, 550 bytes per chunk with 16 users, and as much again for its journal
        self.index_bytes = max(1 << 20, max_bytes // 512)
        self._disk_block = os.statvfs(folder).f_frsize or 4096
        self._owner: Owner | None = None
        with self._transaction():
            pass

    def chunk_path(self, key: str) -> Path:
        """Where a complete chunk lies."""
        return self.folder / f"{key}.chunk"

    def _part_path(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}.part"

    def reserve(self, key: str, num_bytes: int, next_use_s: float) -> Reservation:
        """Asks for space, which is made by evicting what is needed no sooner.

        Args:
            key: of the chunk.
            num_bytes: length of its file.
            next_use_s: when this process needs it next.
        """
        with self._transaction() as database:
            me = self._own_id(database)
            found = find_chunk(database, key)
            if found and found.writer is not None and not self._lives(database, found.writer):
                self._sweep(database)
                found = None
            if found and found.writer is None and _size(self.chunk_path(key)) != num_bytes:
                self._remove(database, found)  # a kill in the middle of an eviction, or damage
                found = None
            if found:
                set_claims(database, me, {key: next_use_s})
                return Reservation(None, present=True)
            disk_bytes = self._on_disk(num_bytes)
            victims = self._victims(database, disk_bytes, next_use_s)
            if victims is None:
                return Reservation(None)
            for victim in victims:
                self._remove(database, victim)
            row = (bytes.fromhex(key), disk_bytes, me)
            number = database.execute("INSERT INTO chunks(key, bytes, writer) VALUES(?, ?, ?)", row).lastrowid
            assert number is not None
            set_claims(database, me, {key: next_use_s})
            return Reservation(self._part_path(key, number), evicted=[victim.key for victim in victims])

    def has_room(self, num_bytes: int, next_use_s: float) -> bool:
        """Whether `reserve` would grant this now."""
        with self._transaction() as database:
            self._own_id(database)
            return self._victims(database, self._on_disk(num_bytes), next_use_s) is not None

    def finish(self, key: str, part: Path) -> bool:
        """Makes a written chunk one of the cache.

        Returns:
            False when the reservation is gone, with the whole index.
        """
        with self._transaction() as database:
            found = find_chunk(database, key)
            if found is None or self._part_path(key, found.id) != part:
                return False
            os.replace(part, self.chunk_path(key))
            database.execute("UPDATE chunks SET writer = NULL WHERE id = ?", (found.id,))
            return True

    def abandon(self, key: str, part: Path) -> None:
        """Gives a reservation back, with what was written."""
        empty_and_unlink(part)
        with self._transaction() as database:
            found = find_chunk(database, key)
            if found and self._part_path(key, found.id) == part:
                self._remove(database, found)

    def claim(self, next_use_s: Mapping[str, float]) -> None:
        """Notes when this process needs chunks next, by key; those that are not there are passed over."""
        with self._transaction() as database:
            set_claims(database, self._own_id(database), next_use_s)

    def drop(self, key: str, inode: int) -> bool:
        """Removes a damaged chunk, unless it was replaced in the meantime.

        Args:
            key: of the chunk.
            inode: of the damaged file.
        Returns:
            Whether that file was there.
        """
        with self._transaction() as database:
            found = find_chunk(database, key)
            try:
                same = os.stat(self.chunk_path(key)).st_ino == inode
            except FileNotFoundError:
                same = False
            if found and found.writer is None and same:
                self._remove(database, found)
            return same

    def clear(self) -> int:
        """Removes all chunks but those being written; returns the bytes that are free now."""
        with self._transaction() as database:
            before = total_bytes(database)
            self._sweep(database)
            for chunk in list(find_chunks(database, "WHERE writer IS NULL")):
                self._remove(database, chunk)
            return before - total_bytes(database)

    def status(self) -> CacheStatus:
        """What is there now; what dead processes left behind is removed first."""
        with self._transaction() as database:
            self._sweep(database)
            num_chunks, chunk_bytes, num_pinned = database.execute(
                "SELECT count(*), coalesce(sum(bytes), 0), coalesce(sum(next_use <= 0), 0) FROM chunks "
                "WHERE writer IS NULL"
            ).fetchone()
            num_writing = database.execute("SELECT count(*) FROM chunks WHERE writer IS NOT NULL").fetchone()[0]
            users = database.execute(
                "SELECT process_id, max_bytes, (SELECT count(*) FROM claims WHERE owner = owners.id) FROM owners"
            )
            return CacheStatus(
                str(self.folder),
                self._used(database, 0),
                num_chunks,
                chunk_bytes,
                num_pinned,
                num_writing,
                tuple(CacheUser(*user) for user in users),
            )

    def close(self) -> None:
        """Gives up this process's claims, and its name unless a thread of it is writing."""
        if self._owner is None or self._owner.process_id != os.getpid():
            return
        with suppress(OSError), self._transaction() as database:
            me = self._own_id(database)
            remove_claims(database, me)
            if database.execute("SELECT 1 FROM chunks WHERE writer = ?", (me,)).fetchone() is None:
                self._owner.release()
                self._owner = None
                self._sweep(database)

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self.folder, max_database_bytes=self.index_bytes // 2)

    def _own_id(self, database: sqlite3.Connection) -> int:
        """This process's number in the database; a forked child gets one of its own."""
        if self._owner is None or self._owner.process_id != os.getpid():
            owners = self.folder / "owners"
            owners.mkdir(exist_ok=True)
            if not self._sweep(database):
                self._reconcile(database)
            self._owner = Owner(owners)
        found = database.execute("SELECT id FROM owners WHERE name = ?", (self._owner.name,)).fetchone()
        if found is None:
            row = (self._owner.name, self._owner.process_id, self.max_bytes)
            found = database.execute(
                "INSERT INTO owners(name, process_id, max_bytes) VALUES(?, ?, ?) RETURNING id", row
            ).fetchone()
        return int(found[0])

    def _lives(self, database: sqlite3.Connection, owner: int) -> bool:
        name = database.execute("SELECT name FROM owners WHERE id = ?", (owner,)).fetchone()
        return name is not None and name[0] in sweep_owners(self.folder / "owners")

    def _victims(self, database: sqlite3.Connection, disk_bytes: int, next_use_s: float) -> list[Chunk] | None:
        """What to evict for `disk_bytes` more: the furthest next use first, then the least recently put.

        Returns:
            None when there is not enough that is needed no sooner than `next_use_s`: nothing is evicted in vain.
        """
        if self._used(database, self.index_bytes) + disk_bytes <= self.max_bytes:
            return []
        self._sweep(database)
        excess = self._used(database, self.index_bytes) + disk_bytes - self.max_bytes
        victims: list[Chunk] = []
        if disk_bytes > self.max_bytes - self.index_bytes:
            return None
        later = find_chunks(
            database, "WHERE writer IS NULL AND next_use > 0 AND next_use >= ? ORDER BY next_use DESC, id", next_use_s
        )
        while excess > 0:
            victim = next(later, None)
            if victim is None:
                return None
            victims.append(victim)
            excess -= victim.bytes
        return victims

    def _used(self, database: sqlite3.Connection, index_bytes: int) -> int:
        """Bytes of the disk, with at least `index_bytes` for the index; one made under a larger cap may have more."""
        index_bytes = max(index_bytes, 2 * _size(self.folder / DATABASE_NAME))
        return total_bytes(database) + index_bytes + os.stat(self.folder).st_blocks * 512 + _FIXED_BYTES

    def _on_disk(self, num_bytes: int) -> int:
        """Whole blocks, and one for what the file system needs to find them."""
        return (-(-num_bytes // self._disk_block) + 1) * self._disk_block

    def _remove(self, database: sqlite3.Connection, chunk: Chunk) -> None:
        """The file goes first: a kill in between leaves a chunk counted that is not there, not the reverse."""
        for path in (self.chunk_path(chunk.key), self._part_path(chunk.key, chunk.id)):
            empty_and_unlink(path)
        database.execute("DELETE FROM chunks WHERE id = ?", (chunk.id,))

    def _sweep(self, database: sqlite3.Connection) -> set[str]:
        """Removes the claims and half-written files of dead processes; returns the names of the living."""
        living = sweep_owners(self.folder / "owners") if (self.folder / "owners").is_dir() else set()
        dead = [row for row, name in database.execute("SELECT id, name FROM owners").fetchall() if name not in living]
        for owner in dead:
            for chunk in list(find_chunks(database, "WHERE writer = ?", owner)):
                self._remove(database, chunk)
            remove_claims(database, owner)
            database.execute("DELETE FROM owners WHERE id = ?", (owner,))
        return living

    def _reconcile(self, database: sqlite3.Connection) -> None:
        """Without a living user: files and rows that have no counterpart go. Only a power cut or a hand makes them."""
        files = {entry.name for entry in os.scandir(self.folder)}
        for chunk in list(find_chunks(database, "")):
            if f"{chunk.key}.chunk" not in files:
                self._remove(database, chunk)
            files.discard(f"{chunk.key}.chunk")
        for name in files:
            if name.endswith((".chunk", ".part")):
                empty_and_unlink(self.folder / name)


def _size(path: Path) -> int:
    """Bytes of a file; -1: it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
