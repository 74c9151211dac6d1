"""The tokenizer objective: both turns, the three phases, weights, noise from positions, and two processes."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pretrain.losses import adversarial
from pretrain.losses.config import AdversarialConfig, PerceptualConfig
from pretrain.losses.perceptual import LPIPS, PerceptualWeightsError
from pretrain.models.tokenizers.config import DiscriminatorConfig
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.objectives.tokenizer import TokenizerObjective, position_normal
from pretrain.objectives.tokenizer_config import TokenizerConfig
from tests.pretrain.exact import StaysDouble
from tests.pretrain.tokenizer_steps import batch, gradients, play
from tests.process_server import ProcessServer

GAME = AdversarialConfig(weight=0.5)


def config(**fields: object) -> TokenizerConfig:
    """A tiny model on 24 x 32 pixels, without batch norm unless asked for, so that samples stay apart."""
    model = fields.pop("model", None) or dc_ae_config("tiny", decoder_norms=("rms", "rms", "rms"))
    discriminator = fields.pop("discriminator", DiscriminatorConfig(width=4, layers=1))
    return TokenizerConfig(**{"image_size": (24, 32), **fields}, model=model, discriminator=discriminator)


def make(seed: int = 0, **fields: object) -> TokenizerObjective:
    torch.manual_seed(0)
    return TokenizerObjective(config(**fields), seed)


def in_double(objective: TokenizerObjective) -> TokenizerObjective:
    """Two computations of one gradient agree in float64; in float32 rounding takes values over the kinks of ReLU."""
    normalise = objective.normalise
    objective.normalise = lambda images: normalise(images).double()
    for player in objective.players.values():
        player.double()
    return objective


class Recorder(nn.Module):
    """Stands where a strategy puts its wrapper, and keeps what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[Tensor | None, ...]] = []

    def forward(self, *inputs: Tensor | None) -> object:
        self.calls.append(inputs)
        return self.model(*inputs)


# -- turns -----------------------------------------------------------------------------------------------------------


def test_without_a_discriminator_there_is_one_player() -> None:
    objective, data = make(), batch()
    assert list(objective.players) == ["autoencoder"]
    (turn,) = objective.turns(data, 0)
    images = data.images / 255.0 * 2.0 - 1.0
    expected = (objective.autoencoder(images).reconstruction - images).abs().mean()
    torch.testing.assert_close(turn.loss, expected)
    assert turn.metrics["l1"] == turn.metrics["loss"] == turn.loss
    assert not turn.metrics["loss"].requires_grad
    with pytest.raises(ValueError, match="no player 'discriminator'; this tokenizer has autoencoder"):
        objective.blocks("discriminator")


def test_both_turns_go_through_the_prepared_players() -> None:
    """Defects 2 and 3: nothing calls a module behind its wrapper; what the discriminator sees is detached."""
    objective, data = make(adversarial=GAME), batch()
    recorders = {name: Recorder(module) for name, module in objective.players.items()}
    objective.players.update(recorders)
    turns = play(objective, data, 0)
    assert list(turns) == ["autoencoder", "discriminator"]
    assert [len(recorder.calls) for recorder in recorders.values()] == [1, 2]
    ((judged, *nothing), (fake, real)) = recorders["discriminator"].calls
    assert not nothing
    assert judged.requires_grad
    assert not fake.requires_grad
    assert not real.requires_grad
    assert torch.equal(judged, fake)
    torch.testing.assert_close(real, data.images / 255.0 * 2.0 - 1.0)


def test_each_turn_fills_the_gradients_of_its_player_alone() -> None:
    """Defect 3."""
    objective = make(adversarial=GAME)
    turns = objective.turns(batch(), 0)
    next(turns).loss.backward()
    assert gradients(objective, "autoencoder")
    assert not gradients(objective, "discriminator")
    before = gradients(objective, "autoencoder")
    next(turns).loss.backward()
    assert all(torch.equal(g, before[name]) for name, g in gradients(objective, "autoencoder").items())
    assert all(p.grad is not None for p in objective.discriminator.parameters())


def test_the_losses_are_what_the_configuration_says() -> None:
    objective, data = make(adversarial=GAME), batch()
    images = data.images / 255.0 * 2.0 - 1.0
    fake = objective.autoencoder(images).reconstruction
    distance, judged = (fake - images).abs().mean(), -objective.discriminator(fake).fake.mean()
    turns = play(objective, data, 0)
    torch.testing.assert_close(turns["autoencoder"].loss, distance + 0.5 * judged)
    torch.testing.assert_close(turns["autoencoder"].metrics["adversarial"], judged.detach())
    metrics = turns["discriminator"].metrics
    torch.testing.assert_close(metrics["logit_gap"], metrics["logit_real"] - metrics["logit_fake"])


def test_the_game_begins_step_by_step() -> None:
    """Defect 10: first no discriminator, then one that learns alone, then a ramp."""
    game = AdversarialConfig(weight=0.5, start_step=2, warmup_steps=1, ramp_steps=1)
    objective, alone = make(adversarial=game), make()
    expected = play(alone, batch(), 0)["autoencoder"].loss
    assert list(play(objective, batch(), 0)) == ["autoencoder"]
    learning = play(objective, batch(), 2)
    assert list(learning) == ["autoencoder", "discriminator"]
    assert learning["autoencoder"].loss == expected
    full = play(objective, batch(), 4)["autoencoder"]
    objective.discriminator.load_state_dict(make(adversarial=game).discriminator.state_dict())
    half = play(objective, batch(), 3)["autoencoder"]
    assert half.loss != expected
    torch.testing.assert_close(half.loss, expected + 0.25 * half.metrics["adversarial"])
    torch.testing.assert_close(full.loss, expected + 0.5 * full.metrics["adversarial"])


def test_adaptive_weights_join_the_gradients_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "GRADIENT_EPS", 0.0)
    objective, data = in_double(make(adversarial=replace(GAME, adaptive=True))), batch()
    with StaysDouble():
        play(objective, data, 0)
    actual = gradients(objective, "autoencoder")
    plain = in_double(make(adversarial=GAME))
    images = plain.normalise(data.images)
    fake = plain.autoencoder(images).reconstruction
    total = torch.zeros_like(fake)
    for sample in range(4):
        pixels = fake[sample : sample + 1].detach().requires_grad_()
        with StaysDouble():
            judged = -plain.discriminator(pixels).fake.mean()
        (wanted,) = torch.autograd.grad((pixels - images[sample]).abs().mean(), pixels)
        (given,) = torch.autograd.grad(judged, pixels)
        total[sample] = (wanted + 0.5 * wanted.norm() / given.norm() * given)[0] / 4
    fake.backward(total)
    for name, gradient in gradients(plain, "autoencoder").items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
    assert not [p for p in objective.discriminator.layers[0].parameters() if p.grad is None]


@pytest.mark.parametrize("adaptive", [False, True])
def test_micro_batches_average_to_the_whole_batch(adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "GRADIENT_EPS", 0.0)  # weighs more beside the gradient of a larger mean
    game = replace(GAME, adaptive=adaptive, r1_weight=1.0, r1_every=1, lecam_weight=0.1)
    objectives = [in_double(make(adversarial=game)), in_double(make(adversarial=game))]
    for objective, groups in zip(objectives, ([(0, 1, 2, 3)], [(0, 1), (2, 3)]), strict=True):
        objective.discriminator.eval()  # spectral norm moves with each pass in training
        for positions in groups:
            with StaysDouble():
                play(objective, batch(positions=positions), 0)
    for player in ("autoencoder", "discriminator"):
        whole, halves = (gradients(objective, player) for objective in objectives)
        for name, gradient in whole.items():
            torch.testing.assert_close(halves[name] / 2, gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_r1_and_lecam_enter_the_discriminators_loss() -> None:
    penalties = [replace(GAME, r1_weight=1.0), replace(GAME, lecam_weight=1.0)]
    plain = play(make(adversarial=GAME), batch(), 0)["discriminator"]
    for game in penalties:
        turn = play(make(adversarial=game), batch(), 0)["discriminator"]
        assert turn.loss > plain.loss
        assert turn.metrics["game"] == plain.metrics["game"]
    lazy = play(make(adversarial=penalties[0]), batch(), 1)["discriminator"]
    assert lazy.loss == plain.loss


def test_a_resume_between_any_two_steps_is_equal_to_the_bit() -> None:
    """Defect 5: spectral directions, LeCam's averages and running statistics are all in the players' state dicts."""
    game = replace(GAME, lecam_weight=0.1, r1_weight=0.1, r1_every=2, warmup_steps=1)
    fields = {"adversarial": game, "model": dc_ae_config("tiny", gaussian=True), "kl_weight": 1.0}
    results = []
    for resumed_at in range(4):
        objective = make(**fields)
        for step in range(4):
            if step == resumed_at:
                state = {name: copy.deepcopy(module.state_dict()) for name, module in objective.players.items()}
                objective = make(**fields)
                for name, module in objective.players.items():
                    module.load_state_dict(state[name])
            play(objective, batch(positions=(4 * step, 4 * step + 1)), step, lr=0.05)
        results.append({f"{p}.{n}": t for p, m in objective.players.items() for n, t in m.state_dict().items()})
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())


# -- latents, pictures, channels -------------------------------------------------------------------------------------


def test_noise_follows_position_and_seed() -> None:
    noise = position_normal(torch.arange(64), 1000, seed=3)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1.0) < 0.02
    assert torch.equal(position_normal(torch.tensor([7]), 1000, seed=3)[0], noise[7])
    fields = {"model": dc_ae_config("tiny", gaussian=True), "kl_weight": 0.5}
    one, other = make(seed=0, **fields), make(seed=1, **fields)
    turn = play(one, batch(), 0)["autoencoder"]
    assert turn.loss != play(other, batch(), 0)["autoencoder"].loss
    torch.testing.assert_close(turn.loss, turn.metrics["l1"] + 0.5 * turn.metrics["kl"])
    for objective in (one, other):
        objective.autoencoder.load_state_dict(make(**fields).autoencoder.state_dict())
        objective.autoencoder.eval()
    assert one.validate(batch(), 0)["loss"] == other.validate(batch(), 9)["loss"]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_any_number_of_channels_and_both_stored_types(channels: int, dtype: torch.dtype) -> None:
    """Defect 11."""
    objective = make(model=dc_ae_config("tiny", in_channels=channels), adversarial=GAME)
    for module in objective.players.values():
        module.eval()  # running statistics and spectral norm move in training
    data = batch(channels, dtype=dtype)
    turns = play(objective, data, 0)
    torch.testing.assert_close(turns["autoencoder"].loss, play(objective, batch(channels), 0)["autoencoder"].loss)
    metrics = objective.validate(data, 0)
    assert metrics["loss"] > 0
    assert 0 < metrics["psnr"] < 30
    for picture in objective.pictures(data).values():
        assert picture.shape == (4, 3 if channels >= 3 else 1, 24, 32)
        assert picture.dtype == torch.uint8


def test_pictures_and_metrics_show_what_they_say() -> None:
    objective, data = make(), batch()
    pictures = objective.pictures(data)
    assert torch.equal(pictures["input"], data.images)
    reconstruction = objective.autoencoder(data.images / 255.0 * 2.0 - 1.0).reconstruction
    shown = ((reconstruction + 1.0) * 127.5).round().clamp(0, 255)
    assert (pictures["reconstruction"] - shown).abs().max() <= 1
    error = (pictures["reconstruction"].double() - data.images.double()).square().mean(dim=(1, 2, 3))
    expected = (10 * torch.log10(255.0**2 / error)).mean().float()
    torch.testing.assert_close(objective.validate(data, 0)["psnr"], expected)


def saved_lpips(folder: Path) -> PerceptualConfig:
    """AlexNet's shape with random weights."""
    torch.manual_seed(1)
    state = {name: torch.randn(t.shape) * 0.05 for name, t in LPIPS("alex").state_dict().items() if "features" in name}
    linear = {f"lin{layer}.model.1.weight": torch.rand(1, c, 1, 1) for layer, c in enumerate((64, 192, 384, 256, 256))}
    sums = {}
    for name, tensors in (("backbone", state), ("linear", linear)):
        torch.save(tensors, folder / f"{name}.pth")
        sums[name] = hashlib.sha256((folder / f"{name}.pth").read_bytes()).hexdigest()
    return PerceptualConfig(
        weight=0.25,
        network="alex",
        backbone_path=str(folder / "backbone.pth"),
        backbone_sha256=sums["backbone"],
        linear_path=str(folder / "linear.pth"),
        linear_sha256=sums["linear"],
    )


def test_the_perceptual_loss_sees_pictures_between_minus_one_and_one(tmp_path: Path) -> None:
    """Defect 1 in the objective: the gradient of the loss changes with the perceptual weight."""
    perceptual = saved_lpips(tmp_path)
    model = dc_ae_config("tiny", decoder_norms=("rms",) * 3)
    size = (36, 40)
    fields = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "model": model, "image_size": size}
    objective, without, data = make(perceptual=perceptual, **fields), make(**fields), batch(positions=(0, 1), size=size)
    images = data.images / 255.0
    reconstruction = objective.autoencoder(objective.normalise(data.images)).reconstruction
    mean, std = (torch.tensor(fields[name])[:, None, None] for name in ("mean", "std"))
    shown = reconstruction * std + mean
    turn = play(objective, data, 0)["autoencoder"]
    with torch.no_grad():
        expected = objective.lpips(2.0 * shown - 1.0, 2.0 * images - 1.0).mean()
    torch.testing.assert_close(turn.metrics["perceptual"], expected)
    plain = play(without, data, 0)["autoencoder"]
    torch.testing.assert_close(turn.loss, plain.loss + 0.25 * expected)
    ours, theirs = gradients(objective, "autoencoder"), gradients(without, "autoencoder")
    assert any(not torch.allclose(ours[name], theirs[name]) for name in ours)
    assert not any("lpips" in name for name in objective.players["autoencoder"].state_dict())
    assert "perceptual" in objective.validate(data, 0)
    grey = make(perceptual=perceptual, model=replace(model, in_channels=1), image_size=size)
    assert play(grey, batch(1, positions=(0,), size=size), 0)["autoencoder"].loss.isfinite()


def test_missing_perceptual_weights_stop_before_the_start(tmp_path: Path) -> None:
    perceptual = PerceptualConfig(weight=1.0, backbone_path=str(tmp_path / "gone.pth"))
    with pytest.raises(PerceptualWeightsError, match=r"gone\.pth"):
        make(perceptual=perceptual)
    with torch.device("meta"):
        TokenizerObjective(config(perceptual=perceptual), 0)  # only a shape is asked for


# -- phases ----------------------------------------------------------------------------------------------------------

EXPECTED = {
    "all": r"",
    "latent": "encoder.project_out. decoder.project_in.",
    "latent+stage": "encoder.project_out. encoder.stages.2. decoder.project_in. decoder.stages.2.",
    "head": "decoder.project_out.",
    "head+stage": "decoder.project_out. decoder.stages.1.",
    "decoder": "decoder.",
}


@pytest.mark.parametrize("part", EXPECTED)
def test_a_phase_trains_its_part_and_nothing_else(part: str) -> None:
    objective = make(trained=(part,), model=dc_ae_config("tiny"), adversarial=GAME)
    before = copy.deepcopy(objective.autoencoder.state_dict())
    play(objective, batch(), 0, lr=0.1)
    prefixes = tuple(EXPECTED[part].split()) or ("",)
    for name, tensor in objective.autoencoder.state_dict().items():
        if name != "decoder.stages.1.1.conv1.bias":  # before batch norm: no gradient
            assert torch.equal(tensor, before[name]) != name.startswith(prefixes), name


def test_phases_by_pattern_and_their_cost() -> None:
    objective = make(trained=("head", r"encoder\.project_in\.conv\.bias"))
    trained = [name for name, p in objective.autoencoder.named_parameters() if p.requires_grad]
    assert trained[0] == "encoder.project_in.conv.bias"
    assert all(name.startswith("decoder.project_out.") for name in trained[1:])
    costs = [make(trained=(part,)).flops_per_sample() for part in ("head", "latent", "all")]
    assert costs == sorted(costs)
    with pytest.raises(ValueError, match=r"'encoder\.project' matches"):
        make(trained=("encoder.project",))


def test_blocks_weights_and_backbone() -> None:
    with torch.device("meta"):
        objective = TokenizerObjective(config(adversarial=GAME), seed=0)
    assert len(objective.blocks("autoencoder")) == 6
    assert objective.blocks("discriminator") == []
    for player, module in objective.players.items():
        module.to_empty(device="cpu")
        objective.init_weights(player)
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    with torch.device("meta"):
        backbone = objective.build_backbone()
    backbone.load_state_dict(objective.players[objective.backbone_player].state_dict(), strict=True)
    assert (objective.image_size, objective.in_channels, objective.mean) == ((24, 32), 3, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_weight": 1.0}, "model.gaussian is False"),
        ({"trained": ()}, "trained is empty"),
        ({"mean": (0.5,)}, "mean has 1 numbers and the model 3"),
        ({"std": (0.5, 0.0, 0.5)}, "expected positive"),
        ({"perceptual": PerceptualConfig(weight=1.0, channels=(0, 1, 3))}, "channels is \\[0, 1, 3\\]"),
        ({"perceptual": PerceptualConfig(weight=1.0, network="alex")}, "at least 31 pixels"),
        (
            {"adversarial": replace(GAME, r1_weight=1.0), "discriminator": DiscriminatorConfig(norm="batch")},
            "mixes samples",
        ),
    ],
)
def test_impossible_tokenizers_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


# -- two processes ---------------------------------------------------------------------------------------------------


def ddp_worker(folder: str) -> None:
    """Two steps on half of the batch each under DDP; rank 0 saves everything."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    objective = make(**DISTRIBUTED)
    for name, module in objective.players.items():
        objective.players[name] = DistributedDataParallel(module, broadcast_buffers=False)
    for step in range(3):
        play(objective, batch(positions=(4 * step + 2 * rank, 4 * step + 2 * rank + 1)), step, lr=0.05)
    state = {f"{p}.{n}": t for p, m in objective.players.items() for n, t in m.module.state_dict().items()}
    torch.save(state, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


DISTRIBUTED = {
    "adversarial": replace(GAME, lecam_weight=0.1, r1_weight=0.1, r1_every=2, warmup_steps=1, adaptive=True),
    "model": dc_ae_config("tiny"),
}


@pytest.mark.distributed
def test_two_processes_agree_and_are_close_to_one(tmp_path: Path, process_server: ProcessServer) -> None:
    """Everything that ranks share is equal to the bit, running statistics and LeCam's averages included."""
    process_server.run_ranks(2, "tests.pretrain.objectives.test_tokenizer:ddp_worker", str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    alone = make(**DISTRIBUTED)
    for step in range(3):
        play(alone, batch(positions=tuple(range(4 * step, 4 * step + 4))), step, lr=0.05)
    for name, tensor in alone.discriminator.state_dict().items():
        # Batch norm of half a batch gives other reconstructions, and only a little.
        torch.testing.assert_close(first[f"discriminator.{name}"], tensor, rtol=0.2, atol=0.02, msg=name)
