"""Writes one planned shard, its index and a note that it is done.

Enters: a `ShardPlan` and the source. Leaves: `shard-000000.tar`, `shard-000000.tar.idx` and a `ShardResult`, kept as a
small JSON file. Why it exists: the note is written last, so a shard is either finished, or is written again from the
start.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from data_pipes.errors import SampleError, ShardError
from data_pipes.index.walk import index_shard
from data_pipes.pack.listing import Entry
from data_pipes.pack.reencode_picture import UnreadableFile
from data_pipes.pack.sources import Source, SourceFile
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import INDEX_SUFFIX
from data_pipes.store.files import new_file, write_atomically

Prepare = Callable[[bytes], tuple[bytes, str]]
"""From the bytes of a file to those that are packed and their extension; raises where a file cannot be used."""


@dataclass(frozen=True)
class ShardPlan:
    """Which files go into which shard, in order."""

    folder: Path
    """Where the shard goes."""
    notes: Path
    """Where the notes on finished shards go."""
    split: str
    """The name of the split, "train" or "val"."""
    number: int
    """Number of the shard in its split, from 0."""
    entries: list[Entry]

    @property
    def path(self) -> Path:
        """The file of the shard."""
        return self.folder / f"shard-{self.number:06d}.tar"

    @property
    def note_path(self) -> Path:
        """The file of the note that says that the shard is finished."""
        return self.notes / f"{self.split}-{self.number:06d}.json"


@dataclass(frozen=True)
class ShardResult:
    """A finished shard; one without samples (all its files unreadable) has no file."""

    num_samples: int
    size_bytes: int
    """Size of the tar file."""
    index_sha256: str
    """Hex digest of the index file."""
    skipped: list[dict[str, str]]
    """Unreadable files, each with its "split", "name", "cause" and "error"."""


class Stopped(Exception):
    """The shard was given up because another one failed."""


def finished_shard(plan: ShardPlan) -> ShardResult | None:
    """The result of an earlier run for this plan, if its shard and index are there and intact; else None."""
    try:
        result = ShardResult(**json.loads(plan.note_path.read_text(encoding="utf-8")))
        if result.num_samples:
            index = ShardIndex.load(_index_path(plan.path), result.index_sha256)
            if index.size_bytes != plan.path.stat().st_size:
                return None
    except (OSError, ShardError, ValueError, TypeError):
        return None
    return result


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, each from its plan; one writer serves all threads of a pack."""

    prepare: Prepare
    skip_unreadable: bool
    """Leave out files that cannot be used, and list them in the result, instead of failing."""
    on_sample: Callable[[int], None]
    """Called for each file that was handled, with its bytes in the source, from any thread."""
    stop: threading.Event
    """When set, by each failure, all shards that are being written are given up."""

    def write(self, plan: ShardPlan, source: Source) -> ShardResult:
        """Writes the shard under a temporary name, walks it strictly, indexes it and renames it.

        Args:
            plan: the shard.
            source: where its files are read.

        Raises:
            UnreadableFile: a file cannot be read or decoded, and `skip_unreadable` is off.
            OSError: the shard cannot be written.
            Stopped: `stop` is set.
        """
        try:
            with new_file(plan.path) as draft:
                num_samples, skipped = self._write_samples(draft.file, plan, source)
                draft.file.flush()
                draft.keep = num_samples > 0
                index = index_shard(draft.path) if num_samples else None
            result = ShardResult(0, 0, "", skipped)
            if index is not None:
                result = ShardResult(num_samples, index.size_bytes, index.save(_index_path(plan.path)), skipped)
            write_atomically(plan.note_path, json.dumps(asdict(result)).encode())
        except BaseException as error:
            self.stop.set()
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"{plan.path}: cannot be written ({error.strerror or error}); free or enlarge the space and repeat "
                "the same command: finished shards are kept"
            ) from error
        return result

    def _write_samples(self, file: IO[bytes], plan: ShardPlan, source: Source) -> tuple[int, list[dict[str, str]]]:
        """Writes the tar; returns the number of samples, and the files that were left out."""
        from webdataset.writer import TarWriter  # imports torch, seconds

        num_samples = 0
        skipped: list[dict[str, str]] = []
        # Fixed owner, mode and time: packing twice gives the same bytes.
        with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
            for entry in plan.entries:
                if self.stop.is_set():
                    raise Stopped
                try:
                    data, extension = _read(source, entry.file, self.prepare)
                except UnreadableFile as error:
                    if not self.skip_unreadable:
                        raise
                    skipped.append(
                        {"split": plan.split, "name": entry.file.name, "cause": error.cause, "error": str(error)}
                    )
                else:
                    sample = {"__key__": entry.key, extension: data}
                    if entry.label >= 0:
                        sample["cls"] = b"%d" % entry.label
                    writer.write(sample)
                    num_samples += 1
                self.on_sample(entry.file.size_bytes)
        return num_samples, skipped


def _read(source: Source, file: SourceFile, prepare: Prepare) -> tuple[bytes, str]:
    """The bytes of a file as they are packed, and their extension.

    Raises:
        UnreadableFile: whatever fails; the message names the file.
        ImportError: the file is a video, and PyAV is missing.
    """
    try:
        data = source.read(file.name)
        if source.sizes_are_exact and len(data) != file.size_bytes:
            raise UnreadableFile(f"it had {file.size_bytes:,} bytes when listed and has {len(data):,} now", "changed")
        return prepare(data)
    except ImportError:  # PyAV is missing: no fault of the file
        raise
    # A zip raises BadZipFile, zlib.error, RuntimeError (encrypted) or NotImplementedError (its compression).
    except Exception as error:
        cause = error.cause if isinstance(error, SampleError | UnreadableFile) else "unreadable"
        raise UnreadableFile(
            f"{source.title}: {file.name} cannot be packed ({error}); repair or remove it, or leave out and list such "
            "files with --skip-unreadable",
            cause,
        ) from error


def _index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)
