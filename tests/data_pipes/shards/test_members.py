"""Picture, label, caption and metadata of a sample; what hostile members may not do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_pipes.decode.picture import decode_image
from data_pipes.errors import SampleError
from data_pipes.shards.members import (
    MAX_CAPTION_BYTES,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    caption_of,
    encoded_picture,
    label_of,
    metadata_of,
)
from data_pipes.shards.reader import RawSample
from data_pipes.transforms.pictures import picture_of
from tests.data_pipes.tiny_shards import picture

CLASSES = ("cat", "dog", "größe")


def sample(**members: bytes) -> RawSample:
    return RawSample("key", members, (*members, "other"))


def refusal(call: Callable[[], object], cause: str) -> str:
    with pytest.raises(SampleError) as caught:
        call()
    assert caught.value.cause == cause
    return str(caught.value)


def test_the_preferred_picture() -> None:
    jpeg, png = picture(1, kind="JPEG"), picture(2)
    assert encoded_picture(sample(png=png, cls=b"1", jpg=jpeg)) == jpeg
    assert torch.equal(picture_of(sample(png=png), 3, torch.uint8, 10**6), decode_image(png, 3))
    message = refusal(lambda: encoded_picture(sample(cls=b"1")), "no_image")
    assert message == "no picture among the members ['cls', 'other']"


def test_bit_depth() -> None:
    wide = picture_of(sample(png=picture(2)), 3, torch.uint16, 10**6)
    assert torch.equal(wide.int(), decode_image(picture(2), 3).int() * 257)
    sixteen = b"P5 2 1 65535\n\x00\x01\xff\xfe"
    assert picture_of(sample(pgm=sixteen), 1, torch.uint16, 10**6).flatten().tolist() == [1, 65534]
    assert "data.bit_depth=16" in refusal(lambda: picture_of(sample(pgm=sixteen), 1, torch.uint8, 10**6), "bit_depth")


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"cls": b"2"}, 2),
        ({"cls": b" 1\n"}, 1),
        ({"cls": b"0", "json": b'{"label": 1}'}, 0),
        ({"json": b'{"label": 2}'}, 2),
        ({"json": b'{"label": "dog"}'}, 1),
        ({"json": '{"label": "größe"}'.encode()}, 2),
        ({"json": b'{"label": "gr\\u00f6\\u00dfe"}'}, 2),
        ({"json": b'{"label": null}'}, -1),
        ({"json": b'{"other": 1}'}, -1),
        ({"txt": b"no label"}, -1),
    ],
)
def test_labels(members: dict[str, bytes], label: int) -> None:
    assert label_of(sample(**members), CLASSES) == label
    assert label_of(sample(**{name: data.replace(b"label", b"target") for name, data in members.items()}), CLASSES) == (
        label if "cls" in members else -1
    )


def test_the_key_of_the_label() -> None:
    raw = sample(json=b'{"label": 0, "target": "dog"}')
    assert label_of(raw, CLASSES, "target") == 1
    assert label_of(raw, ["dog"], "target") == 0
    assert label_of(raw, 5) == label_of(raw, 0) == label_of(raw, ()) == 0


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"cls": b"3"}, "(.cls) is b'3'; expected 0 to 2"),
        ({"cls": b""}, "expected 0 to 2"),
        ({"cls": b"-1"}, "expected 0 to 2"),
        ({"cls": b"1.0"}, "expected 0 to 2"),
        ({"cls": "٣".encode()}, "expected 0 to 2"),
        ({"cls": b"9" * 5000}, "expected 0 to 2"),
        ({"cls": pickle.dumps(1)}, "expected 0 to 2"),
        ({"json": b'{"label": 3}'}, "(.json, 'label') is 3; expected 0 to 2 or the name of a class"),
        ({"json": b'{"label": -1}'}, "is -1"),
        ({"json": b'{"label": 1.0}'}, "is 'float'"),
        ({"json": b'{"label": true}'}, "is True"),
        ({"json": b'{"label": "bird"}'}, "is 'bird'"),
        ({"json": b'{"label": "1"}'}, "is '1'"),
        ({"json": b'{"label": [1]}'}, "is 'list'"),
    ],
)
def test_labels_that_are_none(members: dict[str, bytes], words: str) -> None:
    assert words in refusal(lambda: label_of(sample(**members), CLASSES), "label")


def test_labels_without_class_names() -> None:
    assert label_of(sample(cls=b"999999999"), 0) == 999_999_999
    assert "an integer in ASCII digits" in refusal(lambda: label_of(sample(cls=b"1000000000"), 0), "label")
    named = sample(json=b'{"label": "dog"}')
    assert "the data set names no classes" in refusal(lambda: label_of(named, 0), "label")
    assert "expected 0 to 4" in refusal(lambda: label_of(named, 5), "label")


def test_captions() -> None:
    assert caption_of(sample(cls=b"1")) is None
    assert caption_of(sample(txt=" größer\n".encode(), caption=b"x", json=b'{"caption": "y"}')) == "größer"
    assert caption_of(sample(caption=b"x", json=b'{"caption": "y"}')) == "x"
    assert caption_of(sample(json=b'{"caption": "y"}')) == "y"
    assert caption_of(sample(json=b'{"caption": null}')) is None
    assert caption_of(sample(json=b"{}")) is None
    assert caption_of(sample(txt=b"")) == ""
    assert caption_of(sample(txt=b"\xef\xbb\xbfmarked")) == "marked"
    assert caption_of(sample(txt=b"x" * MAX_CAPTION_BYTES)) == "x" * MAX_CAPTION_BYTES
    for members, words in (
        ({"txt": b"\xff\xfe"}, "(.txt) is no UTF-8 (invalid start byte at byte 0)"),
        ({"caption": b"x" * (MAX_CAPTION_BYTES + 1)}, "has 65,537 bytes; expected at most 65,536"),
        ({"json": b'{"caption": 3}'}, "is a int; expected a text"),
        ({"json": b'{"caption": "\\ud800"}'}, "(.json) is no UTF-8"),
    ):
        assert words in refusal(lambda members=members: caption_of(sample(**members)), "caption")  # type: ignore[misc]


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_metadata() -> None:
    assert metadata_of(sample(txt=b"x")) is None
    content: dict[str, Any] = {"a": [1, 2.5, "ü", None, True], "b": {"c": {}}}
    assert metadata_of(sample(json=json.dumps(content).encode())) == content
    assert metadata_of(sample(json=b"\xef\xbb\xbf{}")) == {}
    assert metadata_of(sample(json=nested(MAX_METADATA_DEPTH))) is not None
    wide = b'{"a": [' + b"{}," * 100 + b"[]]}"
    assert len((metadata_of(sample(json=wide)) or {})["a"]) == 101


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting value"),
        (b"[]", "it holds a list; expected an object"),
        (b'"x"', "it holds a str"),
        (b"null", "it holds a NoneType"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
        (b'{"x": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1} {}', "Extra data"),
        ('{"a": 1}'.encode("utf-16"), "UnicodeDecodeError"),
        (b'{"a": "\xff"}', "UnicodeDecodeError"),
        (nested(MAX_METADATA_DEPTH + 1), "deeper than 32 levels"),
        (nested(100_000), "RecursionError"),
        (b" " * (MAX_METADATA_BYTES + 1), "it has 1,048,577 bytes"),
        (pickle.dumps({"a": 1}), "the metadata (.json) cannot be used"),
    ],
)
def test_metadata_that_is_none(data: bytes, words: str) -> None:
    message = refusal(lambda: metadata_of(sample(json=data)), "metadata")
    assert words in message
    assert len(message) < 500
    assert refusal(lambda: label_of(sample(json=data), CLASSES), "metadata") == message
    assert refusal(lambda: caption_of(sample(json=data)), "metadata") == message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_none_are_null(number: str) -> None:
    """json.dumps writes NaN for a missing number: neither the metadata nor the picture are lost for it."""
    text = f'{{"similarity": {number}, "size": 1.5, "label": {number}, "caption": {number}, "in": [{number}, 2]}}'
    raw = RawSample("a", {"json": text.encode(), "png": b""}, ("png", "json"))
    found = metadata_of(raw)
    assert found == {"similarity": None, "size": 1.5, "label": None, "caption": None, "in": [None, 2]}
    json.dumps(found, allow_nan=False)
    assert label_of(raw, 10) == -1
    assert caption_of(raw) is None
