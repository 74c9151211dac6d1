"""DC-AE beside the oracle: sizes, precision, freezing, checkpointing, compilation, tiling, FLOPs, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.norms import BatchNorm, RMSNorm
from pretrain.models.tokenizers import linear_attention
from pretrain.models.tokenizers.dc_ae import DCAE, dc_ae_flops
from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS, DCAEConfig, dc_ae_config
from pretrain.models.tokenizers.dc_ae_tiling import decode_tiled, encode_tiled, map_tiles
from pretrain.models.tokenizers.linear_attention import LiteMLA, attend, attention_flops


def make(**changes: object) -> DCAE:
    torch.manual_seed(0)
    return DCAE(dc_ae_config("tiny", **changes))


def literal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[d, N] each: a loop over queries and keys, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    result = torch.zeros_like(value)
    for n in range(query.shape[1]):
        weights = torch.stack([key[:, m].relu() @ query[:, n].relu() for m in range(key.shape[1])])
        result[:, n] = sum(value[:, m] * weights[m] for m in range(key.shape[1])) / (weights.sum() + 1e-15)
    return result


# -- linear attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [7, 32, 33, 50], ids=["7-quadratic", "32-quadratic", "33-linear", "50-linear"])
def test_attention_is_a_loop_over_tokens(tokens: int) -> None:
    qkv = torch.randn(2, 2 * 96, tokens)
    actual = attend(qkv)
    for sample in range(2):
        for head in range(2):
            query, key, value = qkv[sample, head * 96 : (head + 1) * 96].split(32)
            expected = literal_attention(query, key, value)
            torch.testing.assert_close(
                actual[sample, head * 32 : (head + 1) * 32].double(), expected, rtol=1e-4, atol=1e-5
            )


def test_both_forms_of_attention_agree() -> None:
    query, key = torch.rand(2, 2, 3, 32, 40)
    value = torch.randn(2, 3, 32, 40)
    linear = linear_attention.linear_attention(query, key, value)
    torch.testing.assert_close(linear, linear_attention.quadratic_attention(query, key, value))


def test_the_form_follows_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("linear_attention", "quadratic_attention"):
        form = getattr(linear_attention, name)
        monkeypatch.setattr(linear_attention, name, lambda *x, n=name, f=form: (used.append(n), f(*x))[1])
    for tokens in (32, 33):
        attend(torch.randn(1, 96, tokens))
    assert used == ["quadratic_attention", "linear_attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [16, 128 * 128])
def test_sums_over_tokens_are_float32(dtype: torch.dtype, tokens: int) -> None:
    """Defect 7: sums over 16,384 tokens of size 10 pass 65,504, where float16 ends; an epsilon of 1e-15 is 0 in it."""
    torch.manual_seed(0)
    qkv = (10.0 * torch.rand(1, 96, tokens)).to(dtype)
    qkv[:, :32, 0] = -1.0  # a query that attends to nothing
    mixed = attend(qkv)
    assert mixed.dtype == torch.float32
    assert mixed.isfinite().all()
    assert (mixed[:, :, 0] == 0).all()
    torch.testing.assert_close(mixed, attend(qkv.double()).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 8), (8, 8)])
def test_autocast_does_not_reach_the_sums(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LiteMLA(64, (5,)), torch.randn(2, 64, *size)
    seen: list[tuple[bool, Tensor, Tensor]] = []

    def recorded(qkv: Tensor) -> Tensor:
        mixed = attend(qkv)
        seen.append((torch.is_autocast_enabled("cpu"), qkv, mixed))
        return mixed

    monkeypatch.setattr(linear_attention, "attend", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    ((enabled, qkv, mixed),) = seen
    assert not enabled
    assert qkv.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), attend(qkv.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(124, 4), (128, 4), (132, 4)], ids=["31", "32", "33"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_both_forms_run_in_bfloat16(size: tuple[int, int], weights: torch.dtype) -> None:
    """Defect 8: 31, 32 and 33 tokens, under autocast and with bfloat16 weights."""
    model, images = make(), torch.randn(2, 3, *size)
    expected = model(images).reconstruction
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        output = model.to(weights)(images.to(weights))
    assert output.reconstruction.dtype == torch.bfloat16
    output.reconstruction.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (output.reconstruction - expected).norm() < 0.05 * expected.norm()


# -- norms -----------------------------------------------------------------------------------------------------------


def test_rms_norm_is_its_formula_in_any_layout_and_type() -> None:
    norm, x = RMSNorm(6), torch.randn(2, 6, 3, 5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    exact = x.double() / (x.double().square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    exact = exact * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), norm(x))
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0.03, atol=0.03)
    assert (norm(torch.zeros(1, 6, 1, 1)).flatten() == norm.bias).all()


def test_batch_statistics_count_once_when_blocks_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recomputed, images = make(), make(), torch.randn(2, 3, 16, 16)
    for block in recomputed.blocks():
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False))
    for model in (plain, recomputed):
        for _ in range(2):
            model(images).reconstruction.square().mean().backward()
    expected = plain.state_dict()
    assert expected["decoder.stages.1.1.norm.num_batches_tracked"] == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in recomputed.state_dict().items())
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, msg=name)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(1, 1), (5, 30), (32, 32), (33, 47)])
def test_any_size_and_number_of_channels(channels: int, size: tuple[int, int]) -> None:
    """Defects 9 and 11: padded on the right and at the bottom with the last pixel, and cropped."""
    model, images = make(in_channels=channels).eval(), torch.randn(2, channels, *size)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    rows = torch.arange(-(-size[0] // 4) * 4).clamp(max=size[0] - 1)
    columns = torch.arange(-(-size[1] // 4) * 4).clamp(max=size[1] - 1)
    padded = images[:, :, rows][:, :, :, columns]
    whole = model(padded).reconstruction
    torch.testing.assert_close(output.reconstruction, whole[..., : size[0], : size[1]])
    torch.testing.assert_close(model.decode(model.encode(images), size), output.reconstruction)
    assert output.latent.shape == (2, 8, len(rows) // 4, len(columns) // 4)


def test_memory_is_channels_last_all_the_way() -> None:
    model = make()
    inputs: list[Tensor] = []
    for step in model.steps():
        step.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model(torch.randn(2, 3, 24, 16))
    assert len(inputs) == len(model.steps())
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


# -- training --------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter() -> None:
    model = make()
    model(torch.randn(2, 3, 32, 32)).reconstruction.sub(1.0).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name != "decoder.stages.1.1.conv1.bias":  # see the oracle: nothing follows but a norm over the batch
            assert parameter.grad.abs().max() > 0, name


def test_frozen_parts_run_without_gradients_and_keep_their_statistics() -> None:
    model, images = make(), torch.randn(2, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train_only([r"decoder\.project_in\..*", r"decoder\.stages\.2\..*"])
    assert model.num_frozen_steps == len(model.encoder.steps())
    graph: dict[str, bool] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for step in model.steps():
        step.register_forward_hook(lambda m, _, out: graph.update({names[id(m)]: out.requires_grad}))
    model(images.requires_grad_()).reconstruction.square().mean().backward()  # even though the images ask for one
    assert {name for name, tracked in graph.items() if not tracked} == {names[id(m)] for m in model.encoder.steps()}
    assert images.grad is None
    for name, parameter in model.named_parameters():
        trained = name.startswith(("decoder.project_in.", "decoder.stages.2."))
        assert parameter.requires_grad == (parameter.grad is not None) == trained, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(norm.frozen for norm in model.modules() if isinstance(norm, BatchNorm))
    expected = model.eval()(images).reconstruction
    torch.testing.assert_close(model.train()(images).reconstruction, expected)  # the running statistics, both times


def test_everything_frozen_but_the_head_saves_the_trunk() -> None:
    model = make()
    model.train_only([r"decoder\.project_out\..*"])
    assert model.num_frozen_steps == len(model.steps()) - 1
    model.train_only([".*"])
    assert model.num_frozen_steps == 0
    assert not any(norm.frozen for norm in model.modules() if isinstance(norm, BatchNorm))
    with pytest.raises(ValueError, match=r"'decoder\.project_on\.\*' matches"):
        model.train_only(["decoder.project_on.*"])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at a block's input
def test_compiled_blocks_change_nothing() -> None:
    """In float64, whose rounding takes no value over the kink of ReLU."""
    model, images = make(blocks=("res", "res", "multiscale")).double(), torch.randn(2, 3, 24, 24).double()
    expected = model(images).reconstruction
    gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    actual = model(images).reconstruction
    torch.testing.assert_close(actual, expected)
    again = torch.autograd.grad(actual.square().mean(), list(model.parameters()))
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert model.state_dict()["decoder.stages.1.1.norm.num_batches_tracked"] == 2


def test_gaussian_latents() -> None:
    model, images = make(gaussian=True), torch.randn(2, 3, 16, 16)
    assert model.encoder.project_out.conv.out_channels == 16
    output = model(images, torch.zeros(2, 8, 4, 4))
    torch.testing.assert_close(output.latent, model.encode(images))
    x = images.contiguous(memory_format=torch.channels_last)
    for step in model.encoder.steps():
        x = step(x)
    mean, log_variance = x.chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(output.kl, expected.sum(dim=(1, 2, 3)))
    noise = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(model(images, noise).latent, mean + normal.scale * noise)
    assert make()(images).kl is None


def test_initialisation_from_meta_fills_everything_and_follows_the_seed() -> None:
    expected = make()
    with torch.device("meta"):
        model = DCAE(dc_ae_config("tiny"))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    expected.init_weights()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


# -- tiling ----------------------------------------------------------------------------------------------------------

CONVOLUTIONAL = {"blocks": ("res", "res", "res"), "decoder_norms": ("batch", "rms", "rms")}


def test_tiles_of_a_convolutional_model_give_the_untiled_result() -> None:
    """To 1e-5 everywhere: a quarter of the overlap, 32 pixels, is more than its receptive radius of 28 pixels."""
    model, images = make(**CONVOLUTIONAL).eval(), torch.randn(1, 3, 250, 330)
    latent = model.encode(images)
    torch.testing.assert_close(encode_tiled(model, images, 192, 128), latent, rtol=1e-5, atol=1e-5)
    expected = model.decode(latent, (250, 330))
    actual = decode_tiled(model, latent, (250, 330), 192, 128)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # With too little overlap the seams show, and only they.
    rough = (decode_tiled(model, latent, (250, 330), 192, 0) - expected).abs().amax(dim=(0, 1))
    assert rough[:, 192 - 4 : 192 + 4].max() > 1e-2
    assert rough[: 60 - 28, : 140 - 28].max() < 1e-5  # the last tiles begin at 252 - 192 and 332 - 192


def test_tiles_of_a_model_with_attention_are_close() -> None:
    """Within 10% of the signal, for noise at random weights: attention averages over the tile, not the picture."""
    model, images = make().eval(), torch.randn(1, 3, 256, 192)
    latent = model.encode(images)
    tiled = encode_tiled(model, images, 128, 64)
    assert (tiled - latent).norm() < 0.1 * latent.norm()
    expected, actual = model.decode(latent), decode_tiled(model, latent, None, 128, 64)
    assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("size", [(8, 8), (24, 8), (25, 40), (100, 31)])
@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_tiles_join_without_a_seam_or_a_gap(size: tuple[int, int], overlap: int) -> None:
    x = torch.randn(1, 2, *size)
    double = lambda tile: tile.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(map_tiles(double, x, 16, overlap, (2, 1)), double(x))


def test_impossible_tiles_are_refused() -> None:
    model = make()
    for tile, overlap in ((30, 8), (32, 6), (32, 32)):
        with pytest.raises(ValueError, match="multiples of the model's factor 4"):
            encode_tiled(model, torch.randn(1, 3, 64, 64), tile, overlap)


# -- cost and configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"blocks": ("res", "res", "multiscale")}, {"gaussian": True}])
@pytest.mark.parametrize("size", [(16, 24), (32, 40)])
def test_flops_are_those_counted(changes: dict, size: tuple[int, int]) -> None:
    config = dc_ae_config("tiny", **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        DCAE(config).eval()(torch.randn(1, 3, *size))
    forward = counter.get_total_flops()
    assert dc_ae_flops(config, size, [".*"]) == 3 * forward
    head = 2.0 * DCAE(config).decoder.project_out.conv.weight.numel() * size[0] * size[1] / 4
    assert dc_ae_flops(config, size, [r"decoder\.project_out\..*"]) == forward + 2 * head


@pytest.mark.parametrize("tokens", [16, 40])
def test_attention_flops_are_those_counted(tokens: int) -> None:
    with FlopCounterMode(display=False) as counter:
        attend(torch.randn(1, 96 * 2, tokens))
    assert counter.get_total_flops() == attention_flops(64, tokens)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("f32c32", 607), ("f64c128", 613), ("f128c512", 615), ("f32c32-sana", 423), ("1.5-f64c128", 716)],
)
def test_published_costs(name: str, gmacs: int) -> None:
    assert dc_ae_flops(DCAE_PRESETS[name], (256, 256), [".*"]) / 6e9 == pytest.approx(gmacs, abs=0.6)


def test_named_configurations() -> None:
    assert [dc_ae_config(name).factor for name in ("f32c32", "f64c128", "f128c512", "tiny")] == [32, 64, 128, 4]
    assert dc_ae_config("f32c32", in_channels=1).in_channels == 1
    with pytest.raises(ValueError, match="no DC-AE called 'f16'"):
        dc_ae_config("f16")


def test_without_shortcuts_the_parameters_are_the_same() -> None:
    with_shortcuts, without = make(), make(shortcuts=False, latent_shortcuts=False)
    without.load_state_dict(with_shortcuts.state_dict(), strict=True)
    images = torch.randn(1, 3, 16, 16)
    assert not torch.allclose(with_shortcuts.eval()(images).latent, without.eval()(images).latent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_depths": (1, 1)}, "encoder_depths has 2 values and widths 3"),
        ({"decoder_depths": (0, 0, 1)}, "decoder_depths is"),
        ({"blocks": ("res", "res", "vit")}, "block 'vit'"),
        ({"decoder_norms": ("batch", "batch", "batch")}, 'expected the norm "rms"'),
        ({"widths": (16, 32, 48)}, "multiple of 32"),
        ({"widths": (16, 40, 64)}, "to divide 4 x 40"),
        ({"latent_channels": 7}, "divisor of the width"),
        ({"widths": (16, 15, 30), "blocks": ("res",) * 3}, "multiples of 4"),
        ({"in_channels": 0}, "0 image channels"),
    ],
)
def test_impossible_autoencoders_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dc_ae_config("tiny", **fields)


def test_a_yaml_file_gives_lists() -> None:
    assert DCAEConfig(widths=[128, 256, 512, 512, 1024, 1024]) == DCAEConfig()
    assert isinstance(make().encoder.stages[0], nn.Sequential)
