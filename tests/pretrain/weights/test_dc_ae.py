"""Import of DC-AE weights: every layout, strictness, and errors that say which configuration fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS, DCAEConfig, dc_ae_config
from pretrain.weights.dc_ae import (
    DIFFUSERS_INDEX,
    fitting_preset,
    load_dc_ae_weights,
    read_dc_ae_folder,
    read_dc_ae_weights,
)
from pretrain.weights.dc_ae_names import config_from_diffusers, diffusers_config, to_diffusers, to_official
from pretrain.weights.files import WeightsError
from tests.pretrain.weights.tiny_dc_ae import KINDS, make_model, tiny

State = dict[str, Tensor]
LAYOUTS: dict[str, Callable[[DCAE], State]] = {
    "official": lambda model: to_official(model.state_dict(), model.config),
    "diffusers": lambda model: to_diffusers(model.state_dict()),
    "ours": lambda model: model.state_dict(),
}


def save(state: State, path: Path) -> Path:
    """As safetensors, or as torch saves it."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def write_folder(model: DCAE, folder: Path, **changes: Any) -> Path:
    """What diffusers' save_pretrained would write."""
    folder.mkdir()
    described = diffusers_config(model.config) | changes
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **described}))
    save(to_diffusers(model.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    return folder


def assert_equal(state: State, model: DCAE) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_every_kind_is_read(tmp_path: Path, kind: str, layout: str) -> None:
    saved, loaded = make_model(KINDS[kind]), make_model(KINDS[kind], seed=1)
    path = save(LAYOUTS[layout](saved), tmp_path / "weights.safetensors")
    assert_equal(read_dc_ae_weights(path, saved.config), saved)
    load_dc_ae_weights(path, loaded)
    assert_equal(loaded.state_dict(), saved)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["official", "ddp", "compiled"],
)
def test_torch_files_are_unwrapped(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    model = make_model(KINDS["batch-norm"])
    path = save(wrap(LAYOUTS["official"](model)), tmp_path / "weights.pth")
    assert_equal(read_dc_ae_weights(path, model.config), model)


def test_half_precision_becomes_float32_and_counters_stay_integers(tmp_path: Path) -> None:
    model = make_model(KINDS["batch-norm"])
    half = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    state = read_dc_ae_weights(save(half, tmp_path / "half.safetensors"), model.config)
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32", "torch.int64"}
    assert torch.equal(state["decoder.project_in.conv.bias"], half["decoder.project_in.conv.bias"].float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_diffusers_says_its_architecture(tmp_path: Path, kind: str) -> None:
    model = make_model(KINDS[kind])
    config, state, scaling_factor = read_dc_ae_folder(write_folder(model, tmp_path / "dc", scaling_factor=0.41))
    assert config == replace(model.config, scaling_factor=0.41)
    assert scaling_factor == 0.41
    assert_equal(state, model)
    assert_equal(read_dc_ae_weights(tmp_path / "dc", model.config), model)


@pytest.mark.parametrize("preset", DCAE_PRESETS)
def test_architectures_go_both_ways_through_json(preset: str) -> None:
    described = json.loads(json.dumps(diffusers_config(DCAE_PRESETS[preset])))
    assert config_from_diffusers(described) == DCAE_PRESETS[preset]


def test_configurations_of_older_versions_and_with_one_value_for_all_stages_are_read() -> None:
    described = diffusers_config(tiny()) | {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "encoder_qkv_multiscales": [[], [], [5]],  # no block here looks at it
    }
    for newer in ("encoder_out_shortcut", "decoder_in_shortcut", "decoder_conv_act_fn"):
        del described[newer]
    assert config_from_diffusers(described) == tiny()


@pytest.mark.parametrize(
    "entry",
    [
        {"decoder_block_out_channels": [16, 32, 32]},
        {"decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"]},
        {"upsample_block_type": "interpolate"},
        {"decoder_act_fns": ["relu", "silu", "silu"]},
        {"decoder_in_shortcut": False},
        {"attention_head_dim": 16},
        {"encoder_block_types": ["ResBlock", "ResBlock", "ViTBlock"]},
        {
            "encoder_qkv_multiscales": [[], [], [3, 5]],
            "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
        },
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_architectures_that_we_do_not_have_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = write_folder(make_model(tiny()), tmp_path / "dc", **entry)
    with pytest.raises(WeightsError, match=r"config\.json describes no DC-AE that can be built here: \w+ is "):
        read_dc_ae_folder(folder)


def test_another_model_of_diffusers_is_refused(tmp_path: Path) -> None:
    folder = write_folder(make_model(tiny()), tmp_path / "kl")
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "in_channels": 3}')
    with pytest.raises(WeightsError, match="missing; expected the configuration of an AutoencoderDC"):
        read_dc_ae_folder(folder)


def test_a_folder_in_parts_is_joined_and_names_of_other_folders_are_not_followed(tmp_path: Path) -> None:
    model = make_model(tiny())
    folder = write_folder(model, tmp_path / "dc")
    whole = folder / "diffusion_pytorch_model.safetensors"
    state = to_diffusers(model.state_dict())
    whole.unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save({name: state[name] for name in members}, folder / file)
    index = {name: file for file, members in parts.items() for name in members}
    (folder / DIFFUSERS_INDEX).write_text(json.dumps({"weight_map": index}))
    assert_equal(read_dc_ae_folder(folder)[1], model)
    (folder / DIFFUSERS_INDEX).write_text(json.dumps({"weight_map": index | {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names '\.\./elsewhere\.safetensors'; expected files of that folder"):
        read_dc_ae_folder(folder)


def test_folders_without_their_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        read_dc_ae_weights(tmp_path, tiny())
    folder = write_folder(make_model(tiny()), tmp_path / "dc")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors in"):
        read_dc_ae_folder(folder)
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        read_dc_ae_weights(tmp_path / "nothing.safetensors", tiny())


def spoil_missing(state: State) -> None:
    del state[next(name for name in state if name.endswith(("conv1.bias", "conv1.conv.bias")))]


def spoil_unexpected(state: State) -> None:
    state[next(name for name in state if "decoder" in name and "conv2" in name).replace("weight", "bias")] = torch.ones(
        3
    )


def spoil_shape(state: State) -> None:
    state[next(name for name in state if name.startswith("encoder.") and "conv1" in name)] = torch.ones(5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, r"1 missing: encoder\.stages\.0\.0\.conv1\.bias\. The file holds a DC-AE of 3 stages with 3"),
        (spoil_unexpected, r"1 unexpected: decoder\.stages\.\d\.\d\.conv2\.bias"),
        (spoil_shape, r"1 of another shape: encoder\.stages\.0\.0\.conv1\.\w+ is \[5\], expected"),
    ],
)
def test_a_file_that_fits_half_loads_nothing(
    tmp_path: Path, layout: str, spoil: Callable[[State], None], message: str
) -> None:
    model, before = make_model(tiny()), make_model(tiny())
    state = dict(LAYOUTS[layout](make_model(tiny(), seed=1)))
    spoil(state)
    with pytest.raises(WeightsError, match=message):
        load_dc_ae_weights(save(state, tmp_path / "weights.safetensors"), model)
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_other_models_are_refused(tmp_path: Path, layout: str) -> None:
    state = dict(LAYOUTS[layout](make_model(tiny()))) | {"encoder.mid_block.resnets.0.conv1.weight": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"encoder\.mid_block\.resnets\.0\.conv1\.weight"):
        read_dc_ae_weights(save(state, tmp_path / "weights.safetensors"), tiny())


def test_the_preset_that_fits_is_named(tmp_path: Path) -> None:
    model = make_model(dc_ae_config("tiny", in_channels=2))
    path = save(LAYOUTS["official"](model), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="the preset 'tiny' with in_channels 2 fits"):
        read_dc_ae_weights(path, dc_ae_config("f32c32"))
    path = save(LAYOUTS["official"](make_model(tiny())), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="3 stages with 3 image and 8 latent channels, which is no preset"):
        read_dc_ae_weights(path, dc_ae_config("f32c32"))


@pytest.mark.parametrize("preset", DCAE_PRESETS)
def test_each_preset_is_recognised_by_its_shapes(preset: str) -> None:
    with torch.device("meta"):
        assert fitting_preset(DCAE(DCAE_PRESETS[preset]).state_dict()) == preset


def test_networks_of_equal_shapes_are_told_apart_where_the_layout_says_it(tmp_path: Path) -> None:
    """Shortcuts and activations have no weights."""
    saved = make_model(tiny())
    official = save(LAYOUTS["official"](saved), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="latent_shortcuts is True there and False here"):
        read_dc_ae_weights(official, tiny(latent_shortcuts=False))
    with pytest.raises(WeightsError, match="shapes: shortcuts is True there and False here"):
        read_dc_ae_weights(official, tiny(shortcuts=False))
    plain = make_model(tiny(shortcuts=False, latent_shortcuts=False))
    official = save(LAYOUTS["official"](plain), tmp_path / "plain.pth")
    assert_equal(read_dc_ae_weights(official, plain.config), plain)
    folder = write_folder(saved, tmp_path / "dc")
    with pytest.raises(WeightsError, match=re.escape("output_act is relu there and silu here")):
        read_dc_ae_weights(folder, tiny(output_act="silu"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": {"encoder.project_in.conv.weight": Payload()}}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="Only tensors are loaded"):
        read_dc_ae_weights(tmp_path / "weights.pth", tiny())
    assert not (tmp_path / "executed").exists()


def test_the_scaling_factor_does_not_have_to_agree(tmp_path: Path) -> None:
    model = make_model(tiny())
    folder = write_folder(model, tmp_path / "dc", scaling_factor=0.3)
    assert_equal(read_dc_ae_weights(folder, DCAEConfig(**{**vars(tiny()), "scaling_factor": 2.0})), model)
