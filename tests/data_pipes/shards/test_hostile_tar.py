"""Damaged and malicious shards: each is an error that names the shard; nothing is skipped silently."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from data_pipes.errors import ShardError
from data_pipes.index.walk import index_shard
from data_pipes.shards.tar import BLOCK, MAX_EXTENDED_HEADER_BYTES


def member(name: str, data: bytes = b"", *, form: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    """Header(s) and padded data of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    header: bytes = info.tobuf(form)  # type: ignore[arg-type]
    return header + data + bytes(-len(data) % BLOCK)


def sized(block: bytes, size: int) -> bytes:
    """The header with another size (base 256), and a correct checksum."""
    changed = bytearray(block)
    changed[124:136] = b"\x80" + size.to_bytes(11, "big")
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


END = bytes(2 * BLOCK)
FIRST = member("a.cls", b"1") + member("a.jpg", b"j" * 600)
SECOND = member("ü" * 60 + ".jpg", b"j" * 100)  # with a PAX header
GNU_NAME = member("n" * 150 + ".jpg", b"j", form=tarfile.GNU_FORMAT)
GOOD = FIRST + SECOND + GNU_NAME


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        index_shard(path)
    assert str(path) in str(caught.value)
    assert ";" in str(caught.value), "what to do is missing"
    return str(caught.value)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(GOOD + END)
    assert index_shard(path).num_samples == 3
    for length in (*range(0, len(GOOD + END), 64), *range(511, len(GOOD + END), 512), *range(1, len(GOOD + END), 512)):
        message = refusal(path, (GOOD + END)[:length])
        assert "truncated" in message or "empty" in message


@pytest.mark.parametrize("at", [len(FIRST), len(GOOD)])
def test_cut_between_two_members_says_how_many_samples_and_the_way_out(tmp_path: Path, at: int) -> None:
    message = refusal(tmp_path / "s.tar", GOOD[:at])
    assert f"(at byte {at:,}); {1 if at == len(FIRST) else 3} samples begin before that place" in message
    assert "copy or pack the shard again" in message
    assert "--allow-missing-end" in message
    index = index_shard(tmp_path / "s.tar", allow_missing_end=True)
    assert index.num_samples == (1 if at == len(FIRST) else 3)
    assert not index.has_end_marker


@pytest.mark.parametrize("length", [1, 511, 513, len(FIRST) + 100, len(FIRST) - 512, len(FIRST) + 1024])
def test_a_missing_end_is_all_that_is_forgiven(tmp_path: Path, length: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(GOOD[:length])
    with pytest.raises(ShardError, match="truncated"):
        index_shard(path, allow_missing_end=True)


def test_padding_after_the_end_marker_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    for padding in (0, 512, 10240, 3 << 20):
        path.write_bytes(GOOD + END + bytes(padding))
        index = index_shard(path)
        assert index.num_samples == 3
        assert index.has_end_marker
    assert "truncated" in refusal(path, GOOD + END + bytes(100))


def test_every_changed_header_byte(tmp_path: Path) -> None:
    for offset in range(BLOCK):
        if not 148 <= offset < 156:  # the checksum itself: its terminator may be a space or a zero
            content = bytearray(GOOD + END)
            content[len(member("a.cls", b"1")) + offset] ^= 0x15
            assert "bad checksum" in refusal(tmp_path / "s.tar", bytes(content))


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_zero_blocks_in_mid_file(tmp_path: Path, num_blocks: int) -> None:
    message = refusal(tmp_path / "s.tar", FIRST + bytes(num_blocks * BLOCK) + SECOND + END)
    assert ("a zero block in mid-file" if num_blocks == 1 else "data behind the end marker") in message
    assert "stock readers silently drop everything from byte 2,560" in message


def test_garbage_behind_the_end(tmp_path: Path) -> None:
    assert "data behind the end marker" in refusal(tmp_path / "s.tar", GOOD + END + bytes(2 << 20) + b"x" * BLOCK)
    assert "no valid tar header" in refusal(tmp_path / "s.tar", GOOD + b"x" * BLOCK + END)
    assert "no valid tar header" in refusal(tmp_path / "s.tar", b"\xff\xd8\xff\xe0 a JPEG".ljust(2048, b"?"))


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../a.jpg", "a/../../b.jpg", "..", "a/..", "/a.jpg"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_lead_out(tmp_path: Path, name: str, form: int) -> None:
    assert "leads out of the shard" in refusal(tmp_path / "s.tar", FIRST + member(name, b"x", form=form) + END)
    assert not list(tmp_path.glob("**/passwd*"))


def test_a_long_name_that_leads_out(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = member("../" + "n" * 200 + ".jpg", b"x", form=form) + END
        assert "leads out of the shard" in refusal(tmp_path / "s.tar", content)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"V", "of the unknown kind"),
    ],
)
def test_members_that_are_no_files(tmp_path: Path, kind: bytes, found: str) -> None:
    content = FIRST + member("b.jpg", type=kind, linkname="/etc/passwd") + END
    assert found in refusal(tmp_path / "s.tar", content)
    assert "a symbolic link" in refusal(tmp_path / "s.tar", member("l" * 200, type=b"2", linkname="k" * 200) + END)


def test_sizes_that_no_file_has(tmp_path: Path) -> None:
    for size in (1 << 20, 1 << 40, (1 << 87) - 1):
        message = refusal(tmp_path / "s.tar", FIRST + sized(member("b.jpg"), size) + END)
        assert f"inside the data of 'b.jpg', which says it has {size:,} bytes" in message
    negative = bytearray(sized(member("b.jpg"), 0))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    assert "a negative size (-1)" in refusal(tmp_path / "s.tar", FIRST + bytes(negative) + END)
    folder = sized(member("folder", type=tarfile.DIRTYPE), 512) + bytes(BLOCK)
    assert "the folder 'folder' says it has 512 bytes" in refusal(tmp_path / "s.tar", folder + FIRST + END)


def pax(payload: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", payload, type=kind)


@pytest.mark.parametrize(
    ("extended", "found"),
    [
        (pax(b"14 size=99999\n"), "truncated"),
        (pax(b"11 size=-9\n"), "with the size"),
        (pax(b"11 size=1_\n"), "with the size"),
        (pax(b"11 size=10\n11 size=10\n"), "with the size"),
        (pax(b"99 path=a.jpg\n"), "malformed PAX"),
        (pax(b"3 path=a.jpg\n"), "malformed PAX"),
        (pax(b"0 path=a.jpg\n"), "malformed PAX"),
        (pax(b"path=a.jpg\n"), "malformed PAX"),
        (pax(b"15 path=../a.jp\n"), "malformed PAX"),
        (pax(b"17 path=../a.jpg\n"), "leads out"),
        (pax(b"15 path=a.\x00jpg\n"), "zero byte"),
        (pax(b"8 path=\n"), "is empty"),
        (pax(b"5011 path=" + b"n" * 5000 + b"\n"), "a name of 5,000 characters"),
        (pax(b"22 GNU.sparse.major=1\n"), "a sparse file"),
        (pax(b"14 path=a.jpg\n", tarfile.XGLTYPE), "global header that sets the path"),
        (pax(b"11 size=10\n", tarfile.XGLTYPE), "global header that sets the size"),
        (pax(b"14 path=a.jpg\n") * 2, "two extended headers name the same member"),
        (sized(pax(b""), MAX_EXTENDED_HEADER_BYTES + 1), "an extended header of 1,048,577 bytes"),
        (sized(pax(b""), 1 << 60), "an extended header of"),
    ],
)
def test_hostile_extended_headers(tmp_path: Path, extended: bytes, found: str) -> None:
    assert found in refusal(tmp_path / "s.tar", FIRST + extended + member("b.jpg", b"x") + END)


def test_harmless_extended_headers(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    comment = pax(b"52 comment=0123456789012345678901234567890123456789\n", tarfile.XGLTYPE)
    times = pax(b"24 mtime=1700000000.125\n" + bytes(100))
    path.write_bytes(comment + times + member("b.jpg", b"x") + END)
    assert index_shard(path).keys == ["b"]


def test_an_extended_header_without_its_member(tmp_path: Path) -> None:
    assert "an extended header without its member" in refusal(tmp_path / "s.tar", pax(b"14 path=a.jpg\n") + END)
    path = tmp_path / "t.tar"
    path.write_bytes(FIRST + pax(b"14 path=b.jpg\n"))
    with pytest.raises(ShardError, match="truncated"):
        index_shard(path, allow_missing_end=True)


def test_samples_that_stock_webdataset_would_tear_apart(tmp_path: Path) -> None:
    content = member("a.jpg") + member("b.jpg") + member("a.cls") + END
    assert "the members of the sample 'a' are not adjacent" in refusal(tmp_path / "s.tar", content)
    content = member("a.jpg") + member("a.JPG") + END
    assert "two members with the extension 'jpg'" in refusal(tmp_path / "s.tar", content)


def test_shards_without_a_sample(tmp_path: Path) -> None:
    assert "empty (0 bytes)" in refusal(tmp_path / "s.tar", b"")
    assert "holds no sample" in refusal(tmp_path / "s.tar", END)
    assert "holds no sample" in refusal(tmp_path / "s.tar", bytes(10240))
    message = refusal(tmp_path / "s.tar", member("README") + member("x", type=tarfile.DIRTYPE) + END)
    assert "holds no sample (2 members were skipped)" in message


@pytest.mark.parametrize(
    ("compress", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_compressed_shards_are_refused_by_content(tmp_path: Path, compress: object, name: str) -> None:
    assert callable(compress)
    message = refusal(tmp_path / "s.tar", compress(GOOD + END))
    assert f"compressed with {name}" in message
    assert "unpack it to a plain .tar" in message


def test_things_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    for path in (tmp_path, tmp_path / "fifo.tar", tmp_path / "none.tar"):
        with pytest.raises(ShardError, match=r"cannot be opened|not a regular file"):
            index_shard(path)


def test_stock_readers_really_lose_these_samples(tmp_path: Path) -> None:
    """Why the walk is strict: tarfile reads the first sample and reports nothing."""
    for content in (FIRST, FIRST + SECOND[:100], FIRST + bytes(BLOCK) + SECOND + END):
        with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as tar:
            assert [info.name for info in tar] == ["a.cls", "a.jpg"]
        refusal(tmp_path / "s.tar", content)
