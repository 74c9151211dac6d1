"""Configurations: overrides, errors that name the nearest key, and every shipped recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipes.open import open_collection
from pretrain.config import ConfigError, RunConfig, load_config

RECIPES = sorted(
    path.relative_to(Path(__file__).parents[2])
    for folder in ("demo", "mae", "dcae", "tokenizer", "video_mae")
    for path in (Path(__file__).parents[2] / "configs" / folder).rglob("*.yaml")
    if path.name != "pipeline.yaml"
)
DATA = ["data.train=/data/train", "data.val=/data/val"]


@pytest.fixture
def recipe(root: Path) -> Path:
    return root / "configs" / "mae" / "cifar10_tiny.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_builds_its_model(root: Path, path: Path) -> None:
    config = load_config(root / path, DATA)
    with torch.device("meta"):
        objective = config.build_objective()
    assert objective.flops_per_sample() > 0
    head = (root / path).read_text().split("\nname:")[0]
    for claim in ("command", "hardware", "hours", "expected"):
        assert f"# {claim} " in head, f"{path} does not state its {claim}"


def test_published_sizes(root: Path) -> None:
    """Parameters of encoder and decoder, in millions, as counted from the paper's shapes."""
    for size, encoder_m in (("base", 85.6), ("large", 303.1), ("huge", 630.4)):
        config = load_config(root / f"configs/mae/vit_{size}.yaml", DATA)
        assert config.optim.peak_lr(config.train.global_batch) == pytest.approx(2.4e-3)
        with torch.device("meta"):
            backbone = config.build_objective().players["model"].encoder
        count = sum(p.numel() for p in backbone.parameters()) / 1e6  # type: ignore[union-attr]
        assert count == pytest.approx(encoder_m, abs=0.3)


def test_overrides_and_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["train.steps=7", "train.epochs=null", "objective.model.encoder.depth=2"])
    assert (config.train.steps, config.train.epochs, config.objective.model.encoder.depth) == (7, None, 2)
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    again = load_config(saved)
    assert again == config
    assert again.digest() == config.digest()
    assert isinstance(again, RunConfig)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.base_ler=1e-3", "did you mean optim.base_lr"),
        ("objective.model.encoder.widht=64", "did you mean objective.model.encoder.width"),
        ("objective.name=image_mea", "did you mean image_mae"),
        ("traim.steps=3", "did you mean train"),
        ("train.steps=many", "train.steps"),
        ("parallel.strategy=fsdp3", "fsdp2"),
        ("objective.model.encoder.patch_size=[5,5]", "no multiple of the patch"),
        ("checkpoint.keep_last=1", "at least 2"),
        ("optim.lr", "key=value"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(recipe, [override])


def test_missing_and_unreadable(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"data\.train is missing: name the folder"):
        open_collection(load_config(root / "configs/mae/vit_base.yaml").data)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb: }")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(broken)
