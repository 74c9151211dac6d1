"""The state of a cache folder: an SQLite database, changed by one process at a time.

Enters: a folder. Leaves: transactions; one that a kill cuts short has not happened. Why it exists: what is there, what
is being written and who needs what next must survive any process. Each transaction opens the database anew (0.4 ms in
all, beside 5 ms to write a chunk), so there is nothing that threads or forked processes could share by mistake. It
keeps a rollback journal and no write-ahead log, whose length nothing bounds.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_pipes.cache.owners import locked

DATABASE_NAME = "index.sqlite"
_VERSION = 1
"""Of the tables; a folder of another version is refused."""
_PAGE_BYTES = 4096
_SCHEMA = f"""
CREATE TABLE owners(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, process_id INTEGER, max_bytes INTEGER);
CREATE TABLE chunks(id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE, bytes INTEGER,
    writer INTEGER,  -- owner that is writing it; NULL: complete
    next_use REAL DEFAULT 9e999);  -- the least of its claims
CREATE INDEX by_next_use ON chunks(next_use DESC, id) WHERE writer IS NULL;
CREATE TABLE claims(chunk INTEGER, owner INTEGER, next_use REAL, PRIMARY KEY(chunk, owner)) WITHOUT ROWID;
CREATE INDEX by_owner ON claims(owner);
CREATE TABLE total(bytes INTEGER);
INSERT INTO total VALUES(0);
CREATE TRIGGER added AFTER INSERT ON chunks BEGIN UPDATE total SET bytes = bytes + new.bytes; END;
CREATE TRIGGER removed AFTER DELETE ON chunks BEGIN
    UPDATE total SET bytes = bytes - old.bytes;
    DELETE FROM claims WHERE chunk = old.id;
END;
PRAGMA user_version = {_VERSION};
"""
_LEAST_CLAIM = "coalesce((SELECT min(claims.next_use) FROM claims WHERE chunk = chunks.id), 9e999)"


class Chunk(NamedTuple):
    """A row: a chunk that is complete, or the reservation of one."""

    id: int
    key: str
    bytes: int
    """On the disk."""
    writer: int | None
    """The owner that is writing it; None: it is complete."""


@contextmanager
def transaction(folder: Path, max_database_bytes: int) -> Iterator[sqlite3.Connection]:
    """Everything that changes the folder happens in here, one process and thread at a time.

    A damaged database is removed with all chunks, and the next transaction begins a new one.

    Args:
        folder: of the cache.
        max_database_bytes: cap on the database.
    Yields:
        The open database; what was done with it is kept when the block ends without an error.
    Raises:
        OSError: the folder or the database cannot be used.
        ValueError: the cache belongs to another version of this program.
    """
    with locked(folder / "lock"):
        database = None
        try:
            database = _open(folder / DATABASE_NAME, max_database_bytes // _PAGE_BYTES)
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise OSError(f"{folder / DATABASE_NAME}: {error}") from error
            _remove_all(folder)
            raise OSError(f"{folder / DATABASE_NAME}: {error}; the cache was emptied and starts anew") from error
        finally:
            if database is not None:
                database.close()  # rolls back what is not committed


def _open(path: Path, max_pages: int) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        # Nothing is forced to the disk: a power cut may damage the database, and a cache may lose what it has.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = TRUNCATE")
        database.execute(f"PRAGMA max_page_count = {max_pages}")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(f"PRAGMA page_size = {_PAGE_BYTES}; BEGIN; {_SCHEMA} COMMIT;")
        elif version != _VERSION:
            raise ValueError(
                f"{path.parent}: a cache of version {version}, this program has version {_VERSION}; name another "
                "folder, or delete this one when no run uses it"
            )
    except BaseException:
        database.close()
        raise
    return database


def find_chunks(database: sqlite3.Connection, rest_of_query: str, *values: object) -> Iterator[Chunk]:
    """The rows that `rest_of_query` (WHERE ..., ORDER BY ...) selects; the table may not change meanwhile."""
    rows = database.execute(f"SELECT id, key, bytes, writer FROM chunks {rest_of_query}", values)
    return (Chunk(row[0], row[1].hex(), row[2], row[3]) for row in rows)


def find_chunk(database: sqlite3.Connection, key: str) -> Chunk | None:
    """The row of one key; None: there is none."""
    return next(find_chunks(database, "WHERE key = ?", bytes.fromhex(key)), None)


def total_bytes(database: sqlite3.Connection) -> int:
    """Bytes on the disk of all chunks, those being written included."""
    return int(database.execute("SELECT bytes FROM total").fetchone()[0])


def set_claims(database: sqlite3.Connection, owner: int, next_use_s: Mapping[str, float]) -> None:
    """Notes when an owner needs chunks.

    Args:
        database: within a transaction.
        owner: its number.
        next_use_s: by key; infinity takes the claim back. Keys without a row are passed over.
    """
    keys = [(bytes.fromhex(key),) for key in next_use_s]
    timed = [(time_s, *key) for key, time_s in zip(keys, next_use_s.values(), strict=True)]
    database.executemany(
        f"DELETE FROM claims WHERE owner = {owner} AND chunk = (SELECT id FROM chunks WHERE key = ?)",
        [(key,) for time_s, key in timed if time_s == math.inf],
    )
    database.executemany(
        f"INSERT OR REPLACE INTO claims SELECT id, {owner}, ? FROM chunks WHERE key = ?",
        [row for row in timed if row[0] != math.inf],
    )
    database.executemany(f"UPDATE chunks SET next_use = {_LEAST_CLAIM} WHERE key = ?", keys)


def remove_claims(database: sqlite3.Connection, owner: int) -> None:
    """Takes all claims of an owner back."""
    claimed = database.execute("SELECT chunk FROM claims WHERE owner = ?", (owner,)).fetchall()
    database.execute("DELETE FROM claims WHERE owner = ?", (owner,))
    database.executemany(f"UPDATE chunks SET next_use = {_LEAST_CLAIM} WHERE id = ?", claimed)


def empty_and_unlink(path: Path) -> None:
    """Removes a file so that its space is free at once, whoever has it open: readers get short reads, never others'
    bytes.
    """
    with suppress(FileNotFoundError):
        with suppress(PermissionError):  # another user's file: its space is free when the last reader closes it
            os.truncate(path, 0)
        os.unlink(path)


def _remove_all(folder: Path) -> None:
    for name in os.listdir(folder):
        if name.endswith((".chunk", ".part")) or name.startswith(DATABASE_NAME):
            empty_and_unlink(folder / name)
