"""Every tokenizer behind the one objective: it learns, is equal to the bit, resumes, freezes, and its YAML loads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pretrain.config import load_config
from pretrain.losses.config import AdversarialConfig
from pretrain.models.tokenizers.config import (
    DiscriminatorConfig,
    LiteVAEConfig,
    QuantisedDCAEConfig,
    QuantiserConfig,
    ViTAutoencoderConfig,
)
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.objectives.table import OBJECTIVES
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import (
    ChannelPrefixConfig,
    EquivarianceConfig,
    QuantisedTokenizerConfig,
    TokenizerConfig,
    ViTTokenizerConfig,
    WaveletTokenizerConfig,
)
from pretrain.objectives.tokenizer_variants import (
    quantised_tokenizer_objective,
    vit_tokenizer_objective,
    wavelet_tokenizer_objective,
)
from tests.pretrain.tokenizer_steps import batch, gradients, play

CONFIGS = Path(__file__).parents[3] / "configs"
NEW = {
    "quantised_tokenizer": (QuantisedTokenizerConfig, quantised_tokenizer_objective),
    "vit_tokenizer": (ViTTokenizerConfig, vit_tokenizer_objective),
    "wavelet_tokenizer": (WaveletTokenizerConfig, wavelet_tokenizer_objective),
}
YAMLS = [
    "dcae/structured.yaml",
    "dcae/equivariant.yaml",
    "tokenizer/sim_vq.yaml",
    "tokenizer/fsq.yaml",
    "tokenizer/vit.yaml",
    "tokenizer/lite_vae.yaml",
]

TINY_DC_AE = dc_ae_config("tiny", decoder_norms=("batch", "rms", "rms"))
CODES = QuantiserConfig(num_codes=32)
GRID = QuantiserConfig(kind="fsq", levels=(5, 4))
VIT = ViTAutoencoderConfig(3, 4, 8, True, 16, 2, 2, 16, 2, 2)
WAVELETS = LiteVAEConfig(3, 4, True, 6, 1, 8, 1, (8, 16, 32), (0, 1, 1), ("res", "res", "res"), ("rms",) * 3)
GAME = AdversarialConfig(weight=0.1, lecam_weight=0.01)
PREFIX, MOVED = ChannelPrefixConfig(step=2, always_min_max=True), EquivarianceConfig(0.5, min_scale=0.5)

TOKENIZERS = {
    "structured": (TokenizerConfig, TokenizerObjective, {"model": TINY_DC_AE, "prefix": PREFIX}),
    "equivariant": (TokenizerConfig, TokenizerObjective, {"model": TINY_DC_AE, "equivariance": MOVED}),
    "sim_vq": (*NEW["quantised_tokenizer"], {"model": QuantisedDCAEConfig(TINY_DC_AE, CODES)}),
    "fsq": (*NEW["quantised_tokenizer"], {"model": QuantisedDCAEConfig(TINY_DC_AE, GRID)}),
    "vit": (*NEW["vit_tokenizer"], {"model": VIT, "kl_weight": 1e-6}),
    "vit-both-views": (*NEW["vit_tokenizer"], {"model": VIT, "prefix": PREFIX, "equivariance": MOVED}),
    "lite_vae": (*NEW["wavelet_tokenizer"], {"model": WAVELETS, "kl_weight": 1e-6}),
}
ALL = pytest.mark.parametrize("name", TOKENIZERS)


def make(name: str, **more: object) -> TokenizerObjective:
    objective = build(name, **more)
    objective.start(1)
    return objective


def build(name: str, **more: object) -> TokenizerObjective:
    config_class, build_objective, fields = TOKENIZERS[name]
    discriminator = DiscriminatorConfig(width=4, layers=1)
    return build_objective(
        config_class(**{"image_size": (16, 24), "discriminator": discriminator, **fields, **more}), 0
    )


@ALL
def test_learning_lowers_the_loss(name: str) -> None:
    objective, data = make(name), batch(size=(16, 24))
    before = objective.validate(data, 0)
    optimizer = torch.optim.Adam(objective.autoencoder.parameters(), lr=3e-3)
    for step in range(20):
        play(objective, data, step)
        optimizer.step()
        optimizer.zero_grad()
    objective.autoencoder.eval()
    after = objective.validate(data, 20)
    assert after["loss"] < 0.95 * before["loss"]
    if objective.config.prefix.step:
        assert after["psnr_2"] <= after["psnr_8"]


@ALL
def test_gradients_reach_all_that_is_trained(name: str) -> None:
    objective = make(name)
    for step in range(4):
        play(objective, batch(size=(16, 24)), step)
    found = gradients(objective, "autoencoder")
    for parameter_name, parameter in objective.autoencoder.named_parameters():
        assert parameter.requires_grad
        assert found[parameter_name].isfinite().all()
        if parameter_name != "decoder.stages.1.1.conv1.bias":  # before batch norm: no gradient
            assert found[parameter_name].abs().max() > 0, parameter_name


@ALL
def test_a_resume_between_any_two_steps_is_equal_to_the_bit(name: str) -> None:
    """Twice in the same process, and from state dicts taken before step 2; the global generator does not matter."""
    results = []
    for resumed_at in (None, 2):
        objective = make(name, adversarial=GAME)
        for step in range(4):
            if step == resumed_at:
                state = {name: copy.deepcopy(module.state_dict()) for name, module in objective.players.items()}
                with torch.device("meta"):
                    objective = build(name, adversarial=GAME)
                for player, module in objective.players.items():
                    module.to_empty(device="cpu")
                    objective.init_weights(player)
                    module.load_state_dict(state[player])
                torch.manual_seed(99)
            play(objective, batch(positions=(4 * step, 4 * step + 1), size=(16, 24)), step, lr=0.05)
        results.append({f"{p}.{n}": t for p, m in objective.players.items() for n, t in m.state_dict().items()})
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())


@ALL
@pytest.mark.parametrize("part", ["decoder", "latent", "latent+stage", "head", "head+stage"])
def test_named_parts_exist_in_every_architecture(name: str, part: str) -> None:
    objective = make(name, trained=(part,))
    trained = {n for n, p in objective.autoencoder.named_parameters() if p.requires_grad}
    halves = {n.partition(".")[0] for n in trained}
    assert halves == ({"encoder", "decoder"} if part.startswith("latent") else {"decoder"})
    alone = make(name, trained=(part.removesuffix("+stage"),))
    fewer = {n for n, p in alone.autoencoder.named_parameters() if p.requires_grad}
    assert fewer <= trained
    if part.endswith("+stage"):
        assert {n.partition(".")[0] for n in trained - fewer} == halves
    before = copy.deepcopy(objective.autoencoder.state_dict())
    play(objective, batch(size=(16, 24)), 0, lr=0.1)
    changed = {n for n, t in objective.autoencoder.state_dict().items() if not torch.equal(t, before[n])}
    buffers = {n for n, _ in objective.autoencoder.named_buffers()}
    assert changed - buffers <= trained
    assert changed


@ALL
def test_validation_pictures_cost_and_backbone(name: str) -> None:
    objective, data = make(name), batch(size=(16, 24))
    metrics = objective.validate(data, 0)
    assert all(value.ndim == 0 and value.isfinite() for value in metrics.values())
    assert ("code_perplexity" in metrics) == (name in ("sim_vq", "fsq"))
    assert objective.pictures(data)["reconstruction"].shape == (4, 3, 16, 24)
    assert objective.flops_per_sample() > 0
    with torch.device("meta"):
        backbone = objective.build_backbone()
    backbone.load_state_dict(objective.autoencoder.state_dict(), strict=True)
    objective.autoencoder.eval()
    images = objective.normalise(data.images)
    assert torch.equal(backbone.eval()(images).reconstruction, objective.autoencoder(images).reconstruction)
    assert backbone.config.latent_channels == objective.config.model.latent_channels


def test_the_commitment_counts() -> None:
    objective, data = make("sim_vq"), batch(size=(16, 24))
    turn = play(objective, data, 0)["autoencoder"]
    torch.testing.assert_close(turn.loss, turn.metrics["l1"] + turn.metrics["commitment"])
    assert 0 < turn.metrics["code_usage"] <= 1
    assert 1 <= turn.metrics["code_perplexity"] <= 32


@pytest.mark.parametrize("fields", [{"prefix": PREFIX}, {"equivariance": MOVED}])
def test_codes_are_not_cut_or_mixed(fields: dict) -> None:
    with pytest.raises(ValueError, match="neither a part of a code nor a mixture"):
        make("sim_vq", **fields)


@pytest.mark.parametrize("name", YAMLS)
def test_shipped_configurations_build(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for objective, entry in NEW.items():
        monkeypatch.setitem(OBJECTIVES, objective, entry)
    config = load_config(CONFIGS / name, ["data.train=train", "data.val=val"])
    with torch.device("meta"):
        objective = config.build_objective()
    assert objective.flops_per_sample() > 1e9
    resolved = tmp_path / "config.yaml"  # as a run saves it
    resolved.write_text(config.to_yaml())
    assert load_config(resolved).objective == config.objective
