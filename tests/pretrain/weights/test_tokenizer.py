"""Loading a tokenizer: from runs and checkpoints, with and without the moving average, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.backbone import weights_digest
from pretrain.weights.dc_ae_names import diffusers_config, to_diffusers
from pretrain.weights.tokenizer import load_tokenizer
from tests.pretrain.runs import overrides_of, run_here
from tests.pretrain.tiny_tokenizer import random_tokenizer, train_tokenizer, write_photos


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_photos(folder / "data", [8], ((16, 16),))
    return train_tokenizer(folder / "data", folder, "run").run_dir


def test_a_run_gives_the_moving_average_of_its_newest_checkpoint(run_dir: Path) -> None:
    loaded, plain = load_tokenizer(run_dir), load_tokenizer(run_dir, ema=False)
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    assert isinstance(loaded.model, DCAE)
    assert loaded.source == str(checkpoint) == str(run_dir / "checkpoints" / "step-00000002")
    assert (loaded.label, plain.label) == ("step-00000002-ema", "step-00000002")
    assert (loaded.weights, plain.weights) == ("ema", "trained")
    for tokenizer, ema in ((loaded, True), (plain, False)):
        expected = load_weights(checkpoint, "autoencoder", ema=ema)
        found = tokenizer.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert tokenizer.digest == weights_digest(expected)
    assert loaded.digest != plain.digest
    assert loaded.step == 2
    assert not loaded.model.training
    assert (loaded.mean, loaded.std) == ((0.4, 0.5, 0.6), (0.5, 0.4, 0.3))
    assert loaded.config is not None
    assert loaded.config.objective_name == "tokenizer"
    assert loaded.run_dir == run_dir


def test_a_loaded_tokenizer_encodes_and_decodes(run_dir: Path) -> None:
    tokenizer = load_tokenizer(run_dir / "checkpoints" / "step-00000002", verify=True).model
    images = torch.randn(2, 3, 14, 18)
    with torch.no_grad():
        latents = tokenizer.encode(images)
        decoded = tokenizer.decode(latents, (14, 18))
    assert latents.shape == (2, tokenizer.config.latent_channels, 4, 5)
    assert decoded.shape == images.shape


def test_without_a_moving_average_the_weights_themselves_are_taken(run_dir: Path, tmp_path: Path) -> None:
    config = train_tokenizer(run_dir.parent / "data", tmp_path, "plain", "optim.ema_decay=null")
    assert load_tokenizer(config.run_dir).weights == "trained"
    with pytest.raises(ValueError, match="holds no moving average of player 'autoencoder'"):
        load_tokenizer(config.run_dir, ema=True)


def test_the_losses_networks_need_not_be_here(run_dir: Path, tmp_path: Path) -> None:
    """Whoever encodes with a tokenizer has no use for the VGG weights that it was trained with."""
    shutil.copytree(run_dir, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "config.yaml"
    before = file.read_text()
    changed = before.replace("backbone_path: null", "backbone_path: /not/here.pth")
    changed = changed.replace("perceptual:\n    weight: 0.0", "perceptual:\n    weight: 0.3")  # as many bytes
    assert changed.count("/not/here.pth") == 1
    assert "weight: 0.3" in changed
    file.write_text(changed)
    complete = file.with_name("COMPLETE")
    complete.write_text(
        complete.read_text().replace(str(len(before)), str(len(changed)))  # the size is checked, its hash is not
    )
    assert load_tokenizer(tmp_path / "run").step == 2


def test_a_folder_in_diffusers_layout(tmp_path: Path) -> None:
    """Its pictures lie in [-1, 1]; architecture, weights and scaling factor come from its files."""
    model = random_tokenizer().model
    assert isinstance(model, DCAE)
    described = diffusers_config(model.config) | {"scaling_factor": 0.41}
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(to_diffusers(model.state_dict()), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_tokenizer(tmp_path)
    images = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode(images), model.encode(images))
    assert (loaded.mean, loaded.std, loaded.scaling_factor) == ((0.5,) * 3, (0.5,) * 3, 0.41)
    assert (loaded.weights, loaded.step, loaded.run_dir, loaded.image_size) == ("imported", None, None, None)
    assert loaded.digest == random_tokenizer().digest
    with pytest.raises(ValueError, match="has no moving average"):
        load_tokenizer(tmp_path, ema=True)


def test_what_is_no_tokenizer(run_dir: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    run_here(overrides_of(tiny_dataset, tmp_path, "mae", "train.steps=1"))
    with pytest.raises(ValueError, match=r"holds a ViT of objective 'image_mae', which is no tokenizer"):
        load_tokenizer(tmp_path / "mae")


def test_a_damaged_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", tmp_path / "step-00000002")
    shard = next((tmp_path / "step-00000002").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged .*another sha256"):
        load_tokenizer(tmp_path / "step-00000002", verify=True)
