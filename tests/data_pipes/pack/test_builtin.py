"""The built-in sets: real pictures without a download, always the same."""

from __future__ import annotations

import importlib.util
import io
import socket
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.pack import builtin, builtin_pictures
from data_pipes.pack.builtin import load_builtin
from data_pipes.pack.listing import list_source
from data_pipes.pack.open_sources import open_source
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from data_pipes.pack.sources import MemorySource

has_scikit_image = importlib.util.find_spec("skimage") is not None


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    content = datasets.load_digits()
    source = load_builtin("digits")
    listing = list_source(source)
    assert listing.classes == tuple("0123456789")
    assert len(listing.entries) == 1797
    labels = Counter(picture.label for picture in listing.entries)
    assert labels == Counter(content.target.tolist())
    for picture in listing.entries[::200]:
        number = int(picture.key.split("/")[1])
        image = Image.open(io.BytesIO(source.read(picture.file.name)))
        assert (image.mode, image.size) == ("L", (8, 8))
        assert picture.label == content.target[number]
        assert np.array_equal(np.rint(np.asarray(image) / 255 * 16), content.images[number])
    manifest = pack("builtin:digits", tmp_path / "out", options=PackOptions(limit=30)).splits["train"]
    assert manifest.num_samples == 30


@pytest.mark.skipif(not has_scikit_image, reason="scikit-image is not installed (extra demo)")
def test_photos_are_rgb_crops_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(sys.modules, "skimage.data", None)  # importing it would fail
    source = load_builtin("photos")
    listing = list_source(source)
    assert len(listing.classes) == 8
    assert Counter(picture.label for picture in listing.entries) == dict.fromkeys(range(8), 48)
    crops = set()
    for picture in listing.entries:
        image = Image.open(io.BytesIO(source.read(picture.file.name)))
        assert (image.mode, image.size) == ("RGB", (96, 96))
        crops.add(image.tobytes())
    assert len(crops) == 384, "two crops are the same"
    assert list_source(load_builtin("photos")).digest() == listing.digest()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"need scikit-learn; install it with: pip install 'tessera-pretrain\[demo\]'"):
        load_builtin("digits")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need scikit-image; install it with"):
        load_builtin("photos")
    monkeypatch.setattr(builtin_pictures, "_photo_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"astronaut.png, which this scikit-image does not ship"):
        load_builtin("photos")


def test_a_path_wins_over_the_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(builtin.BUILTINS, "digits", lambda options: MemorySource("builtin:digits", {}))
    assert open_source("digits").title == "builtin:digits"
    (tmp_path / "digits").mkdir()
    assert open_source("digits").title == "digits"
    assert open_source("builtin:digits").title == "builtin:digits"
