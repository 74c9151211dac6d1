"""Evaluation's view of a data set: each sample once, in the order of the shards, nothing replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data_pipes.decode.picture import decode_image
from data_pipes.errors import SampleError
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.transforms.image import EvalTransform
from tests.data_pipes.tiny_shards import picture, write_shards


def test_each_sample_once_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path, [4, 1, 6])
    images = SequentialImages(tmp_path, EvalTransform((8, 8)))
    assert len(images) == 11
    for index in range(11):
        image, label = images[index]
        assert images.key(index) == f"{index:06d}"
        assert label == index % 7
        assert torch.equal(image, EvalTransform((8, 8))(decode_image(picture(index), 3)))
        assert image.is_contiguous()
    with pytest.raises(IndexError, match="sample 11 of a data set of 11"):
        images[11]


def test_the_same_in_worker_processes(tmp_path: Path) -> None:
    images = SequentialImages(write_shards(tmp_path, [5, 4]), EvalTransform((8, 8)), channels=1)
    loader = DataLoader(images, batch_size=4, num_workers=1, multiprocessing_context="forkserver")
    pictures, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(pictures), torch.stack([images[i][0] for i in range(9)]))
    assert torch.cat(labels).tolist() == [i % 7 for i in range(9)]


def test_a_bad_sample_is_an_error_with_its_name(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3], {3: {"png": picture(3)[:50]}, 4: {"png": picture(4)}})
    images = SequentialImages(tmp_path, EvalTransform((8, 8)))
    assert images[4][1] == -1
    with pytest.raises(SampleError, match=r"000003 in shard-000001\.tar: not a readable picture"):
        images[3]
    with pytest.raises(ValueError, match="bit_depth is 9"):
        SequentialImages(tmp_path, EvalTransform((8, 8)), bit_depth=9)
