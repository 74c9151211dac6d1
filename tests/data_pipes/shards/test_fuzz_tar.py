"""A thousand damaged data sets: each ends in an error that says what is wrong, in flagged samples, or in intact data.

What is promised, and held against every mutation here:

- Indexing a damaged tar gives a ShardError, or an index in which every byte of the file is accounted for: members that
  stock `tarfile` sees as well, one behind the other, and zeros to the end. A tar from which a whole member was cut out
  is a valid tar; only the manifest of an earlier indexing knows better. Likewise a long name, which stands in the body
  of an extended header and so under no checksum, may be another valid name.
- A shard that is damaged after it was indexed: every sample of the manifest is still asked for, and gives a ShardError
  or its own bytes. Bytes can differ only within a member's payload, for which a plain tar has no checksum: the decoder
  may notice (SampleError: replaced and counted) or give a different picture. `verify` finds any damage to headers, and
  with decoding all damage to PNGs, by their checksums.
- Index files and manifests: an error, or the same places. (Names of classes are not covered by the fingerprint.)
- Effort is bounded by the size of the file, whatever its headers claim: reads, bytes and memory are measured.
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipes.errors import SampleError, ShardError
from data_pipes.index.index import index_shards
from data_pipes.index.walk import index_shard, split_name
from data_pipes.inspect.content import Check
from data_pipes.inspect.verify import verify_shard
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import label_of
from data_pipes.shards.reader import ShardReader
from data_pipes.shards.tar import BLOCK, MAX_EXTENDED_HEADER_BYTES, TarProblem, walk_tar
from data_pipes.store.storage import Storage
from data_pipes.transforms.pictures import picture_of
from tests.data_pipes.tiny_shards import picture

NUM_TARS, NUM_INDEXES, NUM_MANIFESTS, NUM_PAYLOADS = 600, 150, 100, 150
MAX_PIXELS = 10_000
Random = np.random.Generator
Result = TypeVar("Result")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def encoded(seed: int) -> dict[str, bytes]:
    """The members of one sample; formats take turns."""
    if seed % 4 == 0:
        return {"png": picture(seed), "cls": b"%d" % (seed % 7)}
    if seed % 4 == 1:
        return {"jpg": picture(seed, 40, 30, "JPEG"), "json": json.dumps({"label": seed % 7}).encode()}
    if seed % 4 == 2:
        file = io.BytesIO()
        np.save(file, np.full((9, 8, 3), seed, np.uint8))
        return {"npy": file.getvalue(), "cls": b"3", "txt": b"a caption"}
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (seed, 5, 9)).save(file, "TIFF", compression="tiff_lzw")
    return {"tif": file.getvalue(), "cls": b"1\n"}


@dataclass(frozen=True)
class Original:
    """An intact tar."""

    data: bytes
    samples: dict[str, dict[str, bytes]]
    headers: tuple[int, ...]  # first byte of each member's first header block
    blocks: tuple[int, ...]  # first byte of the block that says the size
    ends: tuple[int, ...]


@cache
def original(form: str) -> Original:
    samples = {}
    for i in range(8):
        folder = "ordner/" if i % 3 else "ö" * 70 + "/" if form != "ustar" else "a" * 90 + "/"
        samples[f"{folder}{i:04d}"] = encoded(i)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 1_700_000_000
                tar.addfile(info, io.BytesIO(data))
    content = file.getvalue()
    places = list(walk_tar(io.BytesIO(content), len(content)))
    return Original(
        content,
        samples,
        tuple(place.header for place in places),
        tuple(place.data - BLOCK for place in places),
        tuple(place.end for place in places),
    )


def with_checksum(block: bytes | bytearray) -> bytes:
    changed = bytearray(block)
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def pick(random: Random, values: Sequence[int]) -> int:
    return int(values[random.integers(len(values))])


def flip_bits(data: bytes, random: Random, low: int = 0, high: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        changed[random.integers(low, high or len(data))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def flip_in_a_header(tar: Original, random: Random) -> bytes:
    start = pick(random, tar.blocks)
    return flip_bits(tar.data, random, start, start + BLOCK)


def cut(tar: Original, random: Random) -> bytes:
    if random.integers(2):
        return tar.data[: int(random.integers(len(tar.data)))]
    return tar.data[: int(random.integers(len(tar.data) // BLOCK)) * BLOCK]


def rearrange_blocks(tar: Original, random: Random) -> bytes:
    blocks = [tar.data[at : at + BLOCK] for at in range(0, len(tar.data), BLOCK)]
    one, two = (int(random.integers(tar.ends[-1] // BLOCK)) for _ in range(2))
    kind = random.integers(5)
    if kind == 0:
        blocks[one], blocks[two] = blocks[two], blocks[one]
    elif kind == 1:
        blocks[one] = bytes(BLOCK)
    elif kind == 2:
        blocks.insert(two, blocks[one])
    elif kind == 3:
        del blocks[one]
    else:
        blocks[one] = random.bytes(BLOCK)
    return b"".join(blocks)


def rearrange_members(tar: Original, random: Random) -> bytes:
    parts = [tar.data[a:b] for a, b in zip(tar.headers, tar.ends, strict=True)]
    one, two = (int(random.integers(len(parts))) for _ in range(2))
    kind = random.integers(3)
    if kind == 0:
        parts[one], parts[two] = parts[two], parts[one]
    elif kind == 1:
        parts.insert(two, parts[one])
    else:
        del parts[one]
    return b"".join(parts) + tar.data[tar.ends[-1] :]


def lie_about_the_size(tar: Original, random: Random) -> bytes:
    start = pick(random, tar.blocks)
    block = bytearray(tar.data[start : start + BLOCK])
    size = int(block[124:135], 8)
    sizes = [0, size - 1, size + 1, size + BLOCK, max(0, size - BLOCK), 8**11 - 1, 1 << 40, (1 << 88) - 1]
    lie = max(0, sizes[random.integers(len(sizes))])
    block[124:136] = b"%011o\0" % lie if lie < 8**11 and random.integers(2) else b"\x80" + lie.to_bytes(11, "big")
    if random.integers(8) == 0:
        block[124:136] = b"\xff" * 12
    return tar.data[:start] + with_checksum(block) + tar.data[start + BLOCK :]


def lie_in_the_header(tar: Original, random: Random) -> bytes:
    """Another name, kind or prefix, with a right checksum."""
    start = pick(random, tar.blocks)
    block = bytearray(tar.data[start : start + BLOCK])
    kind = random.integers(3)
    names = [b"../x.png", b"/etc/passwd.png", b"a/../../b.png", b"", b"x", b".hidden", b"n" * 100, b"\xff\xfe.png"]
    names += [b"d/" * 49 + b"x", b"__meta__", b"0000.png", b"folder/", b"a.png/b.png", b"." * 99]
    if kind == 0:
        block[:100] = names[random.integers(len(names))].ljust(100, b"\0")
    elif kind == 1:
        block[156] = pick(random, b"0\x001234567gxXLKSVDMN")
    else:
        block[345:500] = names[random.integers(len(names))].ljust(155, b"\0")
    return tar.data[:start] + with_checksum(block) + tar.data[start + BLOCK :]


def extended(random: Random) -> bytes:
    """A hostile PAX or GNU header."""
    payloads = [
        b"30 path=../../../../etc/x.png\n",
        b"12 size=999\n",
        b"20 size=99999999999\n",
        b"11 size=-1\n",
        b"99999999999999999999 path=a\n",
        b"14 path=a.png\n" * 2,
        b"6 a=b\n" * 2000,
        b"19 GNU.sparse.a=1\n\n",
        random.bytes(int(random.integers(1, 1500))),
        b"x" * 5000,
        b"",
    ]
    payload = payloads[random.integers(len(payloads))]
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = bytes([pick(random, b"xgXLK")]), len(payload)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if random.integers(4) == 0:
        giant = [MAX_EXTENDED_HEADER_BYTES + 1, 1 << 33, 1 << 62][random.integers(3)]
        header[124:136] = b"\x80" + giant.to_bytes(11, "big")
    return with_checksum(header) + payload + bytes(-len(payload) % BLOCK)


def insert_extended(tar: Original, random: Random) -> bytes:
    start = pick(random, (*tar.headers, *tar.blocks, tar.ends[-1]))
    return tar.data[:start] + extended(random) * int(random.integers(1, 4)) + tar.data[start:]


def append(tar: Original, random: Random) -> bytes:
    tails = [bytes(int(random.integers(1, 3000))), random.bytes(700), tar.data, tar.data[: tar.ends[1]]]
    return tar.data + tails[random.integers(len(tails))]


MUTATIONS: tuple[Callable[[Original, Random], bytes], ...] = (
    lambda tar, random: flip_bits(tar.data, random),
    flip_in_a_header,
    cut,
    rearrange_blocks,
    rearrange_members,
    lie_about_the_size,
    lie_in_the_header,
    insert_extended,
    append,
)


def mutated_tar(number: int) -> tuple[str, Original, bytes]:
    """(kind, intact, damaged) of case `number`."""
    random = np.random.Generator(np.random.PCG64([number, 1]))
    tar = original(tuple(FORMATS)[number % 3])
    mutate = MUTATIONS[number // 3 % len(MUTATIONS)]
    return mutate.__name__, tar, mutate(tar, random)


class Counting(io.BytesIO):
    """Counts what is read."""

    num_reads = num_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.num_reads, self.num_bytes = self.num_reads + 1, self.num_bytes + len(data)
        return data


@pytest.fixture(autouse=True)
def _bounded_memory() -> object:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown:,} KiB more memory"


def attempt(call: Callable[[], Result], expected: type[Exception] = ShardError) -> tuple[Result | None, str]:
    """(result, ""), or (None, the message of the expected error). Any other error fails the test."""
    try:
        return call(), ""
    except expected as error:
        return None, str(error)


def members_by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if not info.isdir()]


def test_indexing_damaged_tars(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "s.tar"
    for number in range(NUM_TARS):
        kind, _, data = mutated_tar(number)
        stream = Counting(data)
        members, _ = attempt(lambda: list(walk_tar(stream, len(data))), TarProblem)  # noqa: B023
        assert stream.num_reads <= 3 * len(data) // BLOCK + 8, (number, kind)
        assert stream.num_bytes <= 2 * len(data) + BLOCK, (number, kind)
        path.write_bytes(data)
        index, error = attempt(lambda: index_shard(path))
        outcomes["index" if index else "error"] += 1
        if index is None:
            assert str(path) in error
            assert ";" in error, "what to do is missing"
            continue
        assert members is not None
        ends = [0, *(member.end for member in members)]
        assert [member.header for member in members] == ends[:-1], (number, kind)
        assert not any(data[ends[-1] :]), (number, kind)
        files = [(member.name, member.data, member.size) for member in members if not member.is_folder]
        assert files == members_by_tarfile(data), (number, kind)
        places = [place for i in range(index.num_samples) for place in index.members(i).values()]
        assert len(places) + index.num_skipped == len(members), (number, kind)
        assert set(places) <= {(offset, size) for _, offset, size in files}, (number, kind)
    assert min(outcomes["error"], outcomes["index"]) > NUM_TARS // 10, outcomes


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """A data set of one shard for each format of tar."""
    found = {}
    for form in FORMATS:
        folder = tmp_path_factory.mktemp(form)
        (folder / "s.tar").write_bytes(original(form).data)
        found[form] = index_shards([folder / "s.tar"], folder)
    return found


def expected_members(tar: Original) -> list[tuple[str, dict[str, bytes]]]:
    return list(tar.samples.items())


def size_field(data: bytes, index: ShardIndex, sample: int, extension: str) -> bytes:
    """What the header of a member says, where it lay when it was indexed; of base 256 only that it is that."""
    header = index.members(sample)[extension][0] - BLOCK
    digits = data[header + 124 : header + 136].strip(b" \0")
    return digits[:1] if digits.startswith(b"\x80") else digits


def payload_changed(tar: Original, index: ShardIndex, sample: int, extension: str, data: bytes) -> bool:
    offset, size = index.members(sample)[extension]
    return data[offset : offset + size] != tar.data[offset : offset + size]


def test_damage_after_indexing(indexed: dict[str, Manifest]) -> None:
    outcomes: Counter[str] = Counter()
    storage = Storage()
    for number in range(NUM_TARS):
        kind, tar, data = mutated_tar(number)
        manifest = indexed[tuple(FORMATS)[number % 3]]
        manifest.shard_path(0).write_bytes(data)
        index = ShardIndex.load(manifest.index_path(0))
        reader = ShardReader(manifest)
        verdict = verify_shard(manifest, Check(decode=True, max_pixels=MAX_PIXELS), 0, storage)
        flagged = {flaw.key for flaw in verdict.flaws}
        num_errors = num_changed = 0
        for sample, (key, members) in enumerate(expected_members(tar)):
            raw, error = attempt(lambda: reader.read(0, sample))  # noqa: B023
            if raw is None:
                assert "s.tar" in error
                num_errors += 1
                continue
            assert (raw.key, set(raw.members)) == (key, set(members)), (number, kind)
            for extension, found in raw.members.items():
                assert len(found) == len(members[extension]), (number, kind)
                assert size_field(data, index, sample, extension) in (
                    size_field(tar.data, index, sample, extension),
                    b"\x80",
                ), (number, kind, "a header that says another size was read")
                if found != members[extension]:
                    assert payload_changed(tar, index, sample, extension, data), (number, kind)
                    num_changed += 1
                    if extension == "png":
                        assert flagged & {key, None}, (number, kind, "a damaged PNG was not found")
        reader.close()
        if num_errors:
            assert None in flagged, (number, kind, "read errors that verify does not see")
        if not verdict.num_flaws:
            assert places_in(data) == places_in(tar.data), (number, kind, "damaged headers that verify does not see")
        name = "errors" if num_errors else "flagged" if verdict.num_flaws else "changed" if num_changed else "intact"
        outcomes[name] += 1
    assert all(outcomes[name] > NUM_TARS // 50 for name in ("errors", "flagged", "intact")), outcomes
    for form, manifest in indexed.items():
        manifest.shard_path(0).write_bytes(original(form).data)
        assert not verify_shard(manifest, Check(decode=True), 0, storage).flaws


def places_in(data: bytes) -> list[tuple[tuple[str, str], int, int]]:
    return [(split_name(member.name), member.data, member.size) for member in walk_tar(io.BytesIO(data), len(data))]


def test_damaged_index_files(indexed: dict[str, Manifest], tmp_path: Path) -> None:
    """Damage is found by the digest; with a forged digest the places still lie within the shard."""
    outcomes: Counter[str] = Counter()
    manifest = indexed["pax"]
    intact = manifest.index_path(0).read_bytes()
    shard = manifest.shard_path(0).read_bytes()
    (tmp_path / "s.tar").write_bytes(shard)
    for number in range(NUM_INDEXES):
        random = np.random.Generator(np.random.PCG64([number, 2]))
        data = [flip_bits(intact, random), intact[: random.integers(len(intact))], intact + b"\0"][number % 3]
        with pytest.raises(ShardError):
            ShardIndex.from_bytes(data, "s.tar.idx", manifest.shards[0].index_sha256)
        with pytest.raises(ShardError, match=r"s\.tar\.idx"):
            ShardIndex.from_bytes(data, "s.tar.idx")
        body = forged_body(intact[40:], random)
        forged = intact[:8] + hashlib.sha256(body).digest() + body
        index, error = attempt(lambda: ShardIndex.from_bytes(forged, "s.tar.idx"))  # noqa: B023
        outcomes["places" if index else "error"] += 1
        if index is None:
            assert "s.tar.idx" in error
            continue
        (tmp_path / "s.tar.idx").write_bytes(forged)
        entry = {"url": "s.tar", "num_samples": index.num_samples, "size_bytes": len(shard)}
        entry["index_sha256"] = hashlib.sha256(forged).hexdigest()
        reader = ShardReader(Manifest(str(tmp_path), (type(manifest.shards[0])(**entry),)))
        for sample in range(min(index.num_samples, 50)):
            raw, error = attempt(lambda: reader.read(0, sample))  # noqa: B023
            outcomes["read" if raw else "read error"] += 1
            assert raw is None or all(found in shard for found in raw.members.values())
        reader.close()
    assert min(outcomes.values()) > 5, outcomes


def forged_body(body: bytes, random: Random) -> bytes:
    """Damage that its author signed: in the numbers, or in the JSON head."""
    length = int.from_bytes(body[:4], "little")
    if random.integers(2):
        return flip_bits(body, random, 4 + length)
    head = json.loads(body[4 : 4 + length])
    wild = [-1, 0, 1, 2**31, 2**63, 2**70, -(2**70), 1.5, None, "x", [], {}, True, 1e400]
    name = list(head)[random.integers(len(head))]
    value = wild[random.integers(len(wild))]
    if name == "arrays" and random.integers(4):
        array = list(head["arrays"])[random.integers(len(head["arrays"]))]
        head["arrays"][array][random.integers(2)] = value
    else:
        head[name] = value
    changed = json.dumps(head).encode()
    return len(changed).to_bytes(4, "little") + changed + body[4 + length :]


def test_damaged_manifests(indexed: dict[str, Manifest], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "manifest.json"
    manifest = indexed["pax"]
    manifest.save(tmp_path)
    intact = path.read_bytes()
    wild = [
        b"-1",
        b"1e999",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"NaN",
        b"9" * 5000,
        b"[" * 100_000,
        b'"\\ud800"',
        b'"../x"',
    ]
    for number in range(NUM_MANIFESTS):
        random = np.random.Generator(np.random.PCG64([number, 3]))
        if number % 4 == 0:
            data = flip_bits(intact, random)
        elif number % 4 == 1:
            data = intact[: random.integers(len(intact))]
        else:
            lines = intact.split(b"\n")
            places = [i for i, line in enumerate(lines) if b": " in line]
            place = pick(random, places)
            lines[place] = lines[place].split(b": ")[0] + b": " + wild[random.integers(len(wild))] + b","
            data = b"\n".join(lines)
        path.write_bytes(data)
        found, error = attempt(lambda: Manifest.load(tmp_path), ValueError)
        outcomes["loaded" if found else "error"] += 1
        assert "manifest.json" in error or found is not None
        assert found is None or found.shards == manifest.shards
    assert outcomes["error"] > NUM_MANIFESTS // 2, outcomes


def test_damaged_pictures_in_intact_tars(indexed: dict[str, Manifest]) -> None:
    """The decoder's part: an error that is counted, or a picture within the limits. Labels: an error, or a number."""
    outcomes: Counter[str] = Counter()
    manifest = indexed["gnu"]
    reader = ShardReader(manifest)
    for number in range(NUM_PAYLOADS):
        random = np.random.Generator(np.random.PCG64([number, 4]))
        raw = reader.read(0, number % 8)
        members = {name: damaged_payload(data, random) for name, data in raw.members.items()}
        raw = raw._replace(members=members)
        image, error = attempt(lambda: picture_of(raw, 3, torch.uint8, MAX_PIXELS), SampleError)  # noqa: B023
        outcomes["picture" if error == "" else "error"] += 1
        assert image is None or image.shape[1] * image.shape[2] <= MAX_PIXELS
        label, error = attempt(lambda: label_of(raw, 7), SampleError)  # noqa: B023
        assert label in range(-1, 7) or "label" in error or "metadata" in error
    reader.close()
    assert min(outcomes["picture"], outcomes["error"]) > NUM_PAYLOADS // 10, outcomes


def damaged_payload(data: bytes, random: Random) -> bytes:
    kind = random.integers(4)
    if kind == 0:
        return data[: random.integers(len(data))]
    if kind == 1:
        at = int(random.integers(len(data)))
        return data[:at] + random.bytes(8) + data[at + 8 :]
    return flip_bits(data, random, 0, None if kind == 2 else min(len(data), 64))


def test_a_long_name_ends_with_its_header(tmp_path: Path) -> None:
    """tarfile reads a name without a zero byte on into the padding: two readers would see two names."""
    tar = original("gnu")
    at = tar.headers[0]
    size = int(tar.data[at + 124 : at + 135], 8)
    assert tar.data[at + BLOCK + size - 1] == 0
    data = bytearray(tar.data)
    data[at + BLOCK + size - 1 : at + BLOCK + size + 3] = b"more"
    (tmp_path / "s.tar").write_bytes(data)
    assert members_by_tarfile(bytes(data))[0][0].endswith("more")
    with pytest.raises(ShardError, match="an extended header that goes on behind its end"):
        index_shard(tmp_path / "s.tar")
