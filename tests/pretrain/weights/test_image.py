"""Import of the original MAE's layout and of timm's: round trips, strictness, and files that try to run something."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.mae import MAE
from pretrain.models.positions import sincos_position_embedding
from pretrain.weights.files import WeightsError, read_state, read_tensor_file
from pretrain.weights.image import (
    is_fixed_position_embedding,
    load_encoder,
    load_initial_weights,
    parse_architecture,
)
from pretrain.weights.image_names import canonical_names

ENCODER = ViTConfig(image_size=(16, 16), patch_size=(4, 4), width=16, depth=2, heads=2)
CONFIG = MAEConfig(encoder=ENCODER, decoder_width=8, decoder_depth=1, decoder_heads=2)


def mae(seed: int, config: MAEConfig = CONFIG) -> MAE:
    """A MAE with random numbers in every parameter."""
    torch.manual_seed(seed)
    model = MAE(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def original_layout(model: MAE, *, decoder: bool = True) -> dict[str, Tensor]:
    """The names of the original's files."""
    state = {}
    for name, tensor in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "encoder":
            state[rest] = tensor
        elif decoder:
            state[rest if rest == "mask_token" else f"decoder_{rest}"] = tensor
    return state


def equal(first: MAE, second: MAE) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_the_original_layout_has_the_originals_names() -> None:
    """The fixture itself, against the names written down from the original's files."""
    names = set(original_layout(mae(0)))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.bias", "norm.weight"} <= names
    assert {"mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.bias"} <= names
    assert {"decoder_norm.weight", "decoder_pred.bias"} <= names


def save_torch(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"model": state, "epoch": 799, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1.0)},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()},
    ],
    ids=["original", "original-training-file", "ddp", "compiled", "compiled-blocks"],
)
def test_a_full_file_fills_encoder_and_decoder(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    saved, loaded = mae(1), mae(2)
    assert load_initial_weights(save_torch(wrap(original_layout(saved)), tmp_path), loaded) == []
    assert equal(saved, loaded)


def test_our_own_names_and_safetensors_are_read_too(tmp_path: Path) -> None:
    saved, loaded = mae(1), mae(2)
    save_file(saved.state_dict(), tmp_path / "ours.safetensors")
    assert load_initial_weights(tmp_path / "ours.safetensors", loaded) == []
    assert equal(saved, loaded)


def test_an_encoder_only_file_leaves_the_decoder_and_names_it(tmp_path: Path) -> None:
    saved, loaded, before = mae(1), mae(2), mae(2)
    path = save_torch({"model": original_layout(saved, decoder=False)}, tmp_path)
    missing = load_initial_weights(path, loaded)
    assert missing == sorted(name for name in loaded.state_dict() if name.startswith("decoder."))
    for name, tensor in loaded.state_dict().items():
        source = saved if name.startswith("encoder.") else before
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_half_a_decoder_is_an_error_and_loads_nothing(tmp_path: Path) -> None:
    state = original_layout(mae(1))
    del state["decoder_pred.bias"], state["mask_token"]
    loaded = mae(2)
    with pytest.raises(WeightsError, match=r"2 missing: decoder\.mask_token, decoder\.pred\.bias"):
        load_initial_weights(save_torch(state, tmp_path), loaded)
    assert equal(loaded, mae(2))


def test_unexpected_names_and_other_shapes_are_named(tmp_path: Path) -> None:
    state = original_layout(mae(1)) | {"blocks.0.gamma": torch.ones(16)}
    state["norm.weight"] = torch.ones(5)
    with pytest.raises(WeightsError, match=r"unexpected: encoder\.blocks\.0\.gamma; .*encoder\.norm\.weight is \[5\]"):
        load_initial_weights(save_torch(state, tmp_path), mae(2))


def test_another_width_says_what_the_file_holds(tmp_path: Path) -> None:
    wide = MAEConfig(
        encoder=ViTConfig(image_size=(16, 16), patch_size=(4, 4), width=32, depth=3, heads=2),
        decoder_width=8,
        decoder_depth=1,
        decoder_heads=2,
    )
    path = save_torch(original_layout(mae(1, wide)), tmp_path)
    with pytest.raises(
        WeightsError, match=r"a ViT encoder of width 32 and depth 3 with 16 patches of 4 x 4 pixels and 3"
    ):
        load_initial_weights(path, mae(2))


def test_fixed_positions_of_another_image_size_are_recomputed(tmp_path: Path) -> None:
    larger = MAEConfig(
        encoder=ViTConfig(image_size=(16, 32), patch_size=(4, 4), width=16, depth=2, heads=2),
        decoder_width=8,
        decoder_depth=1,
        decoder_heads=2,
    )
    saved, loaded = mae(1), mae(2, larger)
    assert load_initial_weights(save_torch(original_layout(saved), tmp_path), loaded) == []
    assert torch.equal(loaded.encoder.pos_embed, sincos_position_embedding((4, 8), 16))
    assert torch.equal(loaded.decoder.pos_embed, sincos_position_embedding((4, 8), 8))
    assert torch.equal(loaded.encoder.cls_token, saved.encoder.cls_token)


def test_learned_positions_of_another_image_size_are_refused(tmp_path: Path) -> None:
    state = original_layout(mae(1), decoder=False)
    state["pos_embed"] = torch.randn(1, 10, 16)
    with pytest.raises(WeightsError, match=r"encoder\.pos_embed was learned for 9 patches, the model has 16"):
        load_initial_weights(save_torch(state, tmp_path), mae(2))


def test_fixed_positions_are_recognised_on_any_grid_and_in_half_precision() -> None:
    for grid in ((4, 4), (2, 8), (1, 7)):
        assert is_fixed_position_embedding(sincos_position_embedding(grid, 16).half())
    assert not is_fixed_position_embedding(torch.randn(1, 17, 16))


def timm_model(**arguments: Any) -> Any:
    return timm.create_model(
        "vit_base_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, **arguments
    ).eval()


@pytest.mark.parametrize("arguments", [{"num_classes": 7}, {"num_classes": 0}])
def test_a_timm_model_gives_the_same_tokens(tmp_path: Path, arguments: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = timm_model(**arguments)  # with learned positions, which are kept
    torch.nn.init.normal_(theirs.pos_embed)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = load_encoder(tmp_path / "timm.safetensors", ENCODER).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs.forward_features(images), atol=1e-6)


def test_the_norm_of_an_average_pooled_timm_model_is_ours(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = timm_model(num_classes=0, global_pool="avg")
    torch.nn.init.normal_(theirs.fc_norm.weight)
    ours = load_encoder(save_torch(theirs.state_dict(), tmp_path), ENCODER)
    assert torch.equal(ours.norm.weight, theirs.fc_norm.weight)


def test_the_encoder_of_a_full_file_is_taken_and_the_decoder_left_out(tmp_path: Path) -> None:
    saved = mae(1)
    ours = load_encoder(save_torch({"model": original_layout(saved)}, tmp_path), ENCODER)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in saved.encoder.state_dict().items())


def test_a_mask_token_without_a_decoder_is_dropped() -> None:
    assert set(canonical_names({"mask_token": torch.ones(1), "norm.bias": torch.ones(1)})) == {"encoder.norm.bias"}


def test_two_tensors_of_one_meaning_are_an_error() -> None:
    with pytest.raises(WeightsError, match=r"two tensors of the file both mean 'encoder\.norm\.bias'"):
        canonical_names({"norm.bias": torch.ones(1), "encoder.norm.bias": torch.ones(1)})


def test_a_wrappers_names_do_not_hide_a_tensor(tmp_path: Path) -> None:
    path = save_torch({"norm.bias": torch.ones(1), "module.norm.bias": torch.ones(1)}, tmp_path)
    with pytest.raises(WeightsError, match=r"two tensors both mean 'norm\.bias'"):
        read_state(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_pickle_in_the_file_is_refused_and_nothing_is_executed(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "bomb.pth"
    content = {"model": original_layout(mae(1)), "payload": Bomb(marker)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError, match=r"bomb\.pth .*(Only tensors are loaded|no readable weights file)") as caught:
        load_initial_weights(path, mae(2))
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def test_the_bomb_would_go_off_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def test_torchs_format_before_1_6_is_read(tmp_path: Path) -> None:
    path, saved, loaded = tmp_path / "old.pth", mae(1), mae(2)
    torch.save({"model": original_layout(saved)}, path, _use_new_zipfile_serialization=False)
    assert load_initial_weights(path, loaded) == []
    assert equal(saved, loaded)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name} (is no readable|holds)"):
        read_tensor_file(tmp_path / name)


def test_a_truncated_file_is_a_clear_error(tmp_path: Path) -> None:
    path = save_torch({"model": original_layout(mae(1))}, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        load_initial_weights(path, mae(2))


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1.0}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_a_clear_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="state dict"):
        load_initial_weights(save_torch(content, tmp_path), mae(2))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        load_initial_weights(tmp_path / "nothing.pth", mae(2))


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither a complete checkpoint nor model\.safetensors"):
        load_initial_weights(tmp_path, mae(2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224", (768, 12, 12, 16, 224)),
        ("vit_base_patch16_224.mae", (768, 12, 12, 16, 224)),
        ("mae_vit_huge_patch14", (1280, 32, 16, 14, 224)),
        ("vit_small_patch8_96", (384, 12, 6, 8, 96)),
        ("large", (1024, 24, 16, 16, 224)),
    ],
)
def test_architecture_names(name: str, expected: tuple[int, ...]) -> None:
    config = parse_architecture(name)
    assert (config.width, config.depth, config.heads, config.patch_size[0], config.image_size[0]) == expected


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match="'resnet50' is not known: expected a timm name"):
        parse_architecture("resnet50")
