"""Recomputing activations changes memory and nothing else: losses and gradients are equal to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from data_pipes.batch import Batch
from pretrain.config import ConfigError, load_config
from pretrain.memory.simulate import LiveBytes
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.parallel.blocks import checkpoint_blocks
from pretrain.parallel.config import ParallelConfig
from tests.pretrain.runs import CONFIG

MODEL = MAEConfig(ViTConfig((16, 16), (4, 4), 3, width=32, depth=2, heads=2), 16, 1, 2)


def _objective(mode: Any) -> ImageMAEObjective:
    objective = ImageMAEObjective(ImageMAEConfig(MODEL), seed=0)
    objective.start(0)
    checkpoint_blocks(objective.players["model"], objective.blocks("model"), mode)
    return objective


def _forward(objective: ImageMAEObjective, bf16: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(8, dtype=torch.int64), torch.arange(8), [""] * 8)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        return next(objective.turns(batch, 0)).loss


@pytest.mark.parametrize("bf16", [False, True])
def test_equal_to_the_bit(bf16: bool) -> None:
    kept = {}
    want_loss, want = None, dict[str, torch.Tensor]()
    for mode in ("none", "selective", "full"):
        objective = _objective(mode)
        with LiveBytes() as live:
            loss = _forward(objective, bf16)
            kept[mode] = live.now
            loss.backward()
        gradients = {
            name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
            for name, parameter in objective.model.named_parameters()
        }
        assert all(gradient is not None for gradient in gradients.values())
        if want_loss is None:
            want_loss, want = loss, gradients  # type: ignore[assignment]
        assert torch.equal(loss, want_loss), mode
        assert [name for name in want if not torch.equal(gradients[name], want[name])] == [], mode  # type: ignore[arg-type]
    assert kept["full"] < 0.7 * kept["selective"] < 0.7 * 0.9 * kept["none"]


def test_names_stay_canonical() -> None:
    assert _objective("selective").model.state_dict().keys() == _objective("none").model.state_dict().keys()


def test_selective_runs_no_matrix_product_twice() -> None:
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += func is torch.ops.aten.addmm.default  # forward only: the backward pass uses mm
            return func(*args, **(kwargs or {}))

    products = {}
    for mode in ("none", "selective", "full"):
        with Count() as count:
            _forward(_objective(mode)).backward()
        products[mode] = count.products
    assert products["selective"] == products["none"]
    assert (
        products["full"] == products["none"] + 3 * 3
    )  # of 4 products in each of 3 blocks, the last one's is not needed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at every input
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_compiles_in_every_mode() -> None:
    """The order is checkpoint -> compile; traced as a whole, by a backend that needs no C++ compiler."""
    want = None
    for mode in ("none", "full", "selective"):
        torch._dynamo.reset()
        objective = _objective(mode)
        for block in objective.blocks("model"):
            block.compile(fullgraph=True, backend="aot_eager")
        loss = _forward(objective)
        loss.backward()
        gradient = objective.model.encoder.patch_embed.proj.weight.grad
        assert gradient is not None
        want = want or (loss.detach(), gradient)
        torch.testing.assert_close((loss.detach(), gradient), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("key", ["activation_checkpointing", "reshard_after_forward"])
def test_the_old_values_are_refused_with_the_new_ones(key: str) -> None:
    words = "none.*full.*selective" if key == "activation_checkpointing" else "auto.*always.*never"
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**{key: True})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"parallel.{key}.*{words}"):
        load_config(CONFIG, [f"parallel.{key}=true"])


def test_a_module_may_hold_blocks_at_any_depth() -> None:
    inner = nn.Linear(2, 2)
    module = nn.Sequential(nn.Sequential(nn.ReLU(), inner), nn.ReLU())
    checkpoint_blocks(module, [inner], "full")
    assert type(module[0][1]).__name__ == "CheckpointWrapper"  # type: ignore[index]
    assert module.state_dict().keys() == {"0.1.weight", "0.1.bias"}
