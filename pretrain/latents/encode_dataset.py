"""Encodes a data set of pictures to a data set of latents, on any number of processes, and opens such sets.

Enters: a data set's folder or URL, a tokenizer, options. Leaves: OUT with latent shards, their indexes, and
`manifest.json`, which has under "latents" what a diffusion model needs: statistics per channel, scaling factor, dtype,
view, and the model's digest. Why it exists: a diffusion team trains on latents for weeks; they are made once, checked,
and nobody has to ask later which model made them.

Shard i of the pictures becomes shard i of the latents. Processes share the shards that are not finished yet; what an
earlier, killed job has finished is kept, and the result has the same bytes as without the kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from data_pipes.index.index import index_shards
from data_pipes.pack.record import what_changed
from data_pipes.shards.manifest import MANIFEST_NAME, Manifest
from data_pipes.store.files import write_atomically
from data_pipes.store.transport import StorageConfig
from pretrain.latents.coder import PictureCoder
from pretrain.latents.encode_shard import ShardEncoder, ShardNote
from pretrain.latents.options import LATENT_MEMBER, EncodeOptions
from pretrain.parallel.world import World
from pretrain.weights.tokenizer import LoadedTokenizer

LATENTS_KEY = "latents"
"""Where manifest.json describes the latents."""
SKIPPED_NAME = "skipped.json"
"""The samples that were left out, where there are some."""
_WORK_FOLDER, _RECORD = ".encode", "record.json"
"""Of OUT while it is not finished; the record says with what the job was begun."""
_VERSION = 1
"""Of the manifest's description of latents, and of the record."""


@dataclass(frozen=True)
class EncodeResult:
    """What was encoded."""

    manifest: Manifest
    """of the latents"""
    description: dict[str, Any]
    """what the manifest says of the latents, under LATENTS_KEY"""
    num_resumed_shards: int
    """shards that were finished before"""
    skipped: list[dict[str, str]]
    """samples without a readable picture, as in `ShardNote`; empty where the set was finished before"""


def encode_dataset(
    manifest: Manifest,
    out: Path,
    tokenizer: LoadedTokenizer,
    options: EncodeOptions,
    world: World,
    *,
    workers: int = 2,
    storage: StorageConfig | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_sample: Callable[[], None] | None = None,
) -> EncodeResult | None:
    """Encodes a data set of pictures into the folder `out`. All processes call this.

    Args:
        manifest: of the pictures, on a disk or in an object store.
        out: local folder that all processes see; new, or left by the same command.
        tokenizer: the model.
        options: what decides the bytes of the latents, beside the model and the pictures.
        world: of `pretrain.parallel.world.join_world`, with a timeout as long as the job.
        workers: threads per process that read and decode pictures.
        storage: how the pictures' shards are read; None: the defaults.
        on_plan: called with the number of samples that this process will encode.
        on_sample: called for each of them.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ValueError: `out` belongs to something else or was begun with another model, data or options; a SampleError for
            an unusable picture, unless those are skipped; a latent that is not finite.
        OSError: `out` cannot be written.
    """
    identity = {
        "version": _VERSION,
        "source_fingerprint": manifest.fingerprint,
        "model_digest": tokenizer.digest,
        **json.loads(json.dumps(asdict(options))),
    }
    plan = _Plan(out, len(manifest.shards))
    failure: Exception | None = None
    pending: list[int] | None = None
    if world.is_main:
        try:
            pending = _begin(plan, identity)
        except (ValueError, OSError) as error:  # the others wait for the answer
            failure = error
    failed, pending = world.broadcast((failure is not None, pending))
    if failure is not None:
        raise failure
    if failed:
        raise ValueError(f"{out}: rank 0 cannot begin there; its message says why")
    if pending is None:
        return _read_finished(plan) if world.is_main else None
    mine = pending[world.rank :: world.size]
    if on_plan is not None:
        on_plan(sum(manifest.shards[shard].num_samples for shard in mine))
    if mine:
        coder = PictureCoder(tokenizer, world.device, precision=options.precision, tile=options.tile)
        encoder = ShardEncoder(manifest, coder, options, workers=workers, storage=storage)
        try:
            for shard in mine:
                encoder.encode(shard, plan.shard(shard), plan.note(shard), on_sample or (lambda: None))
        finally:
            encoder.close()
    world.barrier()
    if not world.is_main:
        return None
    return _finish(plan, manifest, tokenizer, options, plan.num_shards - len(pending))


def read_description(manifest: Manifest) -> dict[str, Any]:
    """What the manifest of a local set says of its latents.

    Raises:
        ValueError: it is no set of latents.
    """
    path = Path(manifest.root) / MANIFEST_NAME
    description = json.loads(path.read_bytes()).get(LATENTS_KEY)
    if not isinstance(description, dict) or description.get("version") != _VERSION:
        raise ValueError(
            f"{path}: it describes no latents of version {_VERSION}; expected a folder that `tessera encode` made"
        )
    return description


@dataclass(frozen=True)
class _Plan:
    """Where everything goes."""

    out: Path
    """the folder of the latents"""
    num_shards: int
    """of the pictures, and so of the latents"""

    @property
    def work(self) -> Path:
        """The folder that is there until the set is finished."""
        return self.out / _WORK_FOLDER

    @property
    def record(self) -> Path:
        """The file that says with what the job was begun."""
        return self.work / _RECORD

    def shard(self, number: int) -> Path:
        """The file of a shard of latents."""
        return self.out / f"shard-{number:06d}.tar"

    def note(self, number: int) -> Path:
        """The file that says that a shard is finished, see `ShardNote`."""
        return self.work / f"shard-{number:06d}.json"


def _begin(plan: _Plan, identity: dict[str, Any]) -> list[int] | None:
    """Begins a job, or continues it.

    Args:
        plan: where everything goes.
        identity: what decides the bytes of the latents; has to be that of the job before.

    Returns:
        The shards that are still to be encoded; None: the set is finished.

    Raises:
        ValueError: the folder holds something else, or was begun with another identity.
    """
    finished = _finished_identity(plan.out)
    before = finished
    if before is None and plan.record.is_file():
        before = json.loads(plan.record.read_text(encoding="utf-8"))
    if before is None:
        if plan.out.exists() and (not plan.out.is_dir() or any(c.name != _WORK_FOLDER for c in plan.out.iterdir())):
            raise ValueError(f"{plan.out}: exists and was not begun by `tessera encode`; choose a new or empty folder")
        plan.work.mkdir(parents=True, exist_ok=True)
        write_atomically(plan.record, json.dumps(identity, indent=1).encode())
        return list(range(plan.num_shards))
    changed = what_changed(before, identity)
    if changed:
        raise ValueError(
            f"{plan.out}: was encoded with another model, other pictures or other options ({'; '.join(changed)}); "
            "repeat the first command, or choose another folder"
        )
    if finished is not None:
        shutil.rmtree(plan.work, ignore_errors=True)  # of a job that was killed in its last moment
        return None
    for leftover in plan.out.glob(".*.tmp"):  # of a killed job
        leftover.unlink(missing_ok=True)
    return [n for n in range(plan.num_shards) if ShardNote.load(plan.note(n), plan.shard(n)) is None]


def _finished_identity(out: Path) -> dict[str, Any] | None:
    """The identity of a set that is finished; None: it is not."""
    path = out / MANIFEST_NAME
    if not path.is_file():
        return None
    description = json.loads(path.read_bytes()).get(LATENTS_KEY)
    # A manifest without this entry is that of another data set, or of a job that was killed while it finished.
    return None if description is None else dict(description["identity"])


def _read_finished(plan: _Plan) -> EncodeResult:
    """The result of a job that had nothing to do."""
    manifest = Manifest.load(plan.out)
    return EncodeResult(manifest, read_description(manifest), plan.num_shards, [])


def _finish(
    plan: _Plan, source: Manifest, tokenizer: LoadedTokenizer, options: EncodeOptions, num_resumed: int
) -> EncodeResult:
    """Writes the manifest, then its description of the latents, which makes the set finished.

    Args:
        plan: where everything goes.
        source: manifest of the pictures.
        tokenizer: the model.
        options: with which everything was encoded.
        num_resumed: shards that were finished before.

    Raises:
        ValueError: a shard is missing, or no sample had a readable picture.
    """
    notes = [ShardNote.load(plan.note(number), plan.shard(number)) for number in range(plan.num_shards)]
    missing = [number for number, note in enumerate(notes) if note is None]
    if missing:
        raise ValueError(
            f"{plan.out}: rank 0 does not see shard {missing[0]}, which another process has finished; all processes "
            "must write to the same folder, on a file system that all nodes share"
        )
    found: Sequence[ShardNote] = [note for note in notes if note is not None]
    shards = [plan.shard(number) for number, note in enumerate(found) if note.num_samples]
    if not shards:
        raise ValueError(f"{plan.out}: no sample has a readable picture; see why without --skip-unreadable")
    manifest = index_shards(shards, plan.out, source.classes)
    sums = reduce(add, (note.sums for note in found))
    skipped = [entry for note in found for entry in note.skipped]
    description = {
        "version": _VERSION,
        "member": LATENT_MEMBER,
        "tensors": ["latent", *(["mirrored"] if options.mirrored else [])],
        "channels": len(sums.total),
        "factor": tokenizer.model.config.factor,
        "model": {
            "label": tokenizer.label,
            "digest": tokenizer.digest,
            "step": tokenizer.step,
            "run_uid": (tokenizer.complete or {}).get("run_uid"),
        },
        "view": {"resize": "bicubic, antialias", "crop": "centre"} if options.size else "as stored",
        "statistics": sums.describe(),
        "num_skipped": len(skipped),
        "identity": json.loads(plan.record.read_text(encoding="utf-8")),
    }
    if skipped:
        write_atomically(plan.out / SKIPPED_NAME, (json.dumps(skipped, indent=1) + "\n").encode())
    content = json.loads(manifest.to_bytes()) | {LATENTS_KEY: description}
    write_atomically(plan.out / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())
    shutil.rmtree(plan.work)
    return EncodeResult(manifest, description, num_resumed, skipped)
