"""Exports to diffusers: latents and reconstructions equal ours, and nothing is published otherwise."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.export import diffusers as diffusers_export
from pretrain.export.diffusers import compare, example_images, export_diffusers, load_strictly
from pretrain.export.publish import ExportError
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.tokenizer import load_tokenizer
from tests.pretrain.weights.tiny_dc_ae import KINDS, make_model, make_tokenizer, tiny

diffusers = pytest.importorskip("diffusers", minversion="0.32")


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_computes_our_latents_and_reconstructions(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer(KINDS[kind])
    exported = export_diffusers(tokenizer, tmp_path / "deep/out", scaling_factor=0.4)
    assert 0.0 < exported.latent_error <= 1e-5
    assert 0.0 < exported.reconstruction_error <= 1e-5
    theirs = diffusers.AutoencoderDC.from_pretrained(exported.folder).eval()
    images = torch.randn(2, KINDS[kind].in_channels, 24, 40)
    with torch.no_grad():
        latent = theirs.encode(images).latent
        torch.testing.assert_close(latent, tokenizer.model.encode(images), atol=1e-5, rtol=1e-4)
        expected = tokenizer.model.decode(latent)
        torch.testing.assert_close(theirs.decode(latent).sample, expected, atol=1e-5, rtol=1e-4)
    assert theirs.config.scaling_factor == 0.4
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]  # no temporary folder stays
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in exported.folder.iterdir()) == names


def test_an_export_is_loaded_back_as_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(KINDS["batch-norm"])
    loaded = load_tokenizer(export_diffusers(tokenizer, tmp_path / "out", scaling_factor=0.25).folder)
    assert loaded.digest == tokenizer.digest
    assert (loaded.mean, loaded.std, loaded.scaling_factor) == (tokenizer.mean, tokenizer.std, 0.25)
    again = export_diffusers(loaded, tmp_path / "again")
    assert again.scaling_factor == 0.25  # kept
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_the_scaling_factor_says_where_it_comes_from(tmp_path: Path) -> None:
    bare, configured = make_tokenizer(tiny()), make_tokenizer(tiny(scaling_factor=0.5))
    cases = {
        "given": (bare, 0.3, 0.3, "0.3 (given when it was exported)"),
        "folder": (replace(bare, scaling_factor=0.7), None, 0.7, "0.7 (read from random)"),
        "configured": (configured, None, 0.5, "0.5 (from the configuration, not measured on this run's latents)"),
        "none": (bare, None, 1.0, "1 (latents are not scaled; measure 1 / RMS over the data"),
    }
    for name, (tokenizer, given, expected, text) in cases.items():
        exported = export_diffusers(tokenizer, tmp_path / name, scaling_factor=given)
        assert exported.scaling_factor == expected
        assert json.loads((tmp_path / name / "config.json").read_text())["scaling_factor"] == expected
        assert text in (tmp_path / name / "README.md").read_text()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected 1 / RMS of the latents, a positive number"):
            export_diffusers(bare, tmp_path / "out", scaling_factor=wrong)


def test_the_card_has_the_measured_errors_and_its_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(tiny())
    exported = export_diffusers(tokenizer, tmp_path / "out", scaling_factor=0.5)
    card = (exported.folder / "README.md").read_text()
    assert f"| weights sha256 | {tokenizer.digest} |" in card
    assert f"of latents: {exported.latent_error:.3g}, of reconstructions: {exported.reconstruction_error:.3g}" in card
    assert "allowed: 1e-05" in card
    assert "Pixels lie in [-1, 1]: stored values on the scale [0, 1], minus 0.5, divided by 0.5" in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": torch.randn(1, 3, 16, 16)}
    exec(card.split("```python\n")[1].split("```")[0], names)
    latent = tokenizer.model.encode(names["images"])
    assert torch.allclose(names["latents"], 0.5 * latent, atol=1e-5)
    assert torch.allclose(names["reconstructions"], tokenizer.model.decode(latent), atol=1e-5)


def test_the_pictures_of_the_comparison_see_both_forms_of_attention() -> None:
    model = make_model(KINDS["attention"])
    tokens = [(images.shape[2] // 4) * (images.shape[3] // 4) for images in example_images(model)]
    assert min(tokens) <= 32 < max(tokens)
    assert all(images.min() >= -1.0 and images.max() <= 1.0 for images in example_images(model))


def spoil_after_loading(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    """A number moves by a thousandth of itself between the file and what diffusers computes with."""

    def load(*arguments: Any) -> Any:
        loaded = load_strictly(*arguments)
        with torch.no_grad():
            loaded.get_parameter(tensor).mul_(1.001)
        return loaded

    monkeypatch.setattr(diffusers_export, "load_strictly", load)


@pytest.mark.parametrize(
    ("tensor", "what"),
    [("encoder.down_blocks.0.0.conv1.weight", "latents"), ("decoder.up_blocks.0.1.norm.bias", "reconstructions")],
)
def test_a_model_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, what: str
) -> None:
    spoil_after_loading(monkeypatch, tensor)
    with pytest.raises(ExportError, match=rf"the exported model's {what} differ from ours by .* more than 1e-05"):
        export_diffusers(make_tokenizer(tiny()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tiny())
    with torch.no_grad():
        tokenizer.model.get_parameter("decoder.project_out.norm.weight")[0] = float("nan")
    with pytest.raises(ExportError, match="reconstructions differ from ours by inf"):
        export_diffusers(tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.conv_in.bias"), r"missing_keys.*encoder\.conv_in\.bias"),
        (lambda state: state.update({"encoder.extra": torch.ones(1)}), r"unexpected_keys.*encoder\.extra"),
        (lambda state: state.update({"encoder.conv_in.bias": torch.ones(5)}), r"encoder\.conv_in\.bias"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_what_diffusers_only_warns_about_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = to_diffusers(state)
        change(result)
        return result

    to_diffusers = diffusers_export.to_diffusers
    monkeypatch.setattr(diffusers_export, "to_diffusers", renamed)
    diffusers.utils.logging.get_logger("diffusers").setLevel(logging.ERROR)
    with pytest.raises((ExportError, ValueError), match=message):
        export_diffusers(make_tokenizer(tiny()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_diffusers_does_not_take_over_is_an_error(tmp_path: Path) -> None:
    folder = export_diffusers(make_tokenizer(tiny()), tmp_path / "out").folder
    described = json.loads((folder / "config.json").read_text())
    with pytest.raises(ExportError, match=r"diffusers reads scaling_factor as 1\.0; 2\.0 was written"):
        load_strictly(folder, described | {"scaling_factor": 2.0})


class Other(DCAE):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Other(tiny())}, "it is a Other, and only a DC-AE has a counterpart"),
        ({"model": make_model(tiny(gaussian=True))}, "gaussian is True"),
        ({"model": make_model(tiny(shortcuts=False))}, "shortcuts is False"),
        ({"mean": (0.4, 0.5, 0.5)}, r"normalised with mean \[0\.4, 0\.5, 0\.5\].*pixels in \[-1, 1\]"),
        ({"std": (0.5, 0.5, 0.25)}, r"std \[0\.5, 0\.5, 0\.25\]"),
    ],
    ids=["class", "gaussian", "shortcuts", "mean", "std"],
)
def test_what_diffusers_cannot_express_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tokenizer = replace(make_tokenizer(tiny()), **change)
    with pytest.raises(ValueError, match=f"AutoencoderDC cannot express this tokenizer: .*{message}"):
        export_diffusers(tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_older_diffusers_refuses_only_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {"encoder_out_shortcut", "decoder_in_shortcut", "decoder_conv_act_fn"}
    known = diffusers_export._known_settings()
    assert newer < known
    monkeypatch.setattr(diffusers_export, "_known_settings", lambda: known - newer)
    assert diffusers_export.why_not(make_tokenizer(tiny())) is None
    refusal = diffusers_export.why_not(make_tokenizer(KINDS["no-latent-shortcuts"]))
    assert refusal is not None
    assert "has no encoder_out_shortcut, decoder_in_shortcut, decoder_conv_act_fn: install a newer version" in refusal


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exports are never overwritten"):
        export_diffusers(make_tokenizer(tiny()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_comparison_is_of_our_own_weights(tmp_path: Path) -> None:
    """Another seed's model is far away: the error is a relative one."""
    folder = export_diffusers(make_tokenizer(tiny()), tmp_path / "out").folder
    theirs = load_strictly(folder, {})
    assert max(compare(make_model(tiny()), theirs)) < 1e-5
    assert min(compare(make_model(tiny(), seed=1), theirs)) > 0.1
