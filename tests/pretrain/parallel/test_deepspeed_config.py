"""A user's ds_config.json: what Tessera decides may not differ, the harmless passes through, nothing is ignored."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.optim_config import OptimConfig
from pretrain.parallel.choose import check_strategy
from pretrain.parallel.config import DeepSpeedConfig, ParallelConfig
from pretrain.parallel.deepspeed_config import check_ds_config
from pretrain.parallel.launch import Launch

OPTIM = OptimConfig(clip_norm=1.0)
BATCH = {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2}


def check(folder: Path, fields: dict[str, Any], *, strategy: str = "zero2", bf16: bool = False) -> dict[str, Any]:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(fields))
    parallel = ParallelConfig(strategy=strategy, deepspeed=DeepSpeedConfig(ds_config=str(path)))  # type: ignore[arg-type]
    return check_ds_config(parallel, OPTIM, bf16=bf16, batch=BATCH)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train_batch_size": 128}, r"train_batch_size is 128, but this run has 256; set train\.global_batch"),
        ({"train_micro_batch_size_per_gpu": 4}, r"is 4, but this run has 16; set train\.micro_batch"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, but this run has 2"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, but this run has 1.0; set optim\.clip_norm"),
        ({"zero_optimization": {"stage": 3}}, r"stage is 3, but this run has 2; set parallel\.strategy"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"device is \"cpu\", but .* \"none\""),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "other devices than cpu"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled is true, but this run has false; set parallel\.precision"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled is true"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, r"torch_autocast\.enabled is true"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, r"optimizer is set, but .* set optim\.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler is set, but .* set optim\.schedule"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, r"set parallel\.activation_checkpointing"),
        ({"zero_optimization": {"cpu_offload": True}}, r"old name; set parallel\.deepspeed\.offload_optimizer"),
        ({"zero_optimization": {"reduce_bucket_sizes": 1}}, r"did you mean zero_optimization\.reduce_bucket_size\?"),
        ({"curriculum_learning": {"enabled": True}}, "does not support this field"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "does not support this field"),
    ],
)
def test_conflicts_are_errors(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        check(tmp_path, fields)
    assert str(tmp_path / "ds_config.json") in str(raised.value)


def test_what_agrees_and_what_is_harmless_is_merged(tmp_path: Path) -> None:
    merged = check(
        tmp_path,
        {
            **BATCH,
            "gradient_clipping": 1.0,
            "fp16": {"enabled": False, "loss_scale": "auto"},
            "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
            "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
            "optimizer": "auto",
        },
    )
    zero = merged["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, True, 1000)
    assert zero["offload_optimizer"] == {"device": "none"}
    assert merged["comms_logger"] == {"enabled": True, "prof_ops": ["all_reduce"]}
    assert merged["gradient_clipping"] == 1.0
    # The loop announces each boundary and divides the losses itself, so DeepSpeed counts single passes.
    assert merged["gradient_accumulation_steps"] == 1
    assert "train_batch_size" not in merged
    assert "optimizer" not in merged


def test_bf16_is_autocast(tmp_path: Path) -> None:
    merged = check(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, bf16=True)
    assert merged["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert merged["bf16"] == {"enabled": False}


def test_without_a_file() -> None:
    parallel = ParallelConfig(strategy="zero3", deepspeed=DeepSpeedConfig(offload_param=True))
    merged = check_ds_config(parallel, OptimConfig(), bf16=False)
    assert merged["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert merged["gradient_clipping"] == 0.0


def test_selective_checkpointing_turns_the_linear_layer_off_that_it_breaks() -> None:
    parallel = ParallelConfig(strategy="zero3", activation_checkpointing="selective")
    assert check_ds_config(parallel, OPTIM, bf16=False)["zero_optimization"]["memory_efficient_linear"] is False


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(strategy="zero2", deepspeed=DeepSpeedConfig(offload_param=True)), "only zero3 partitions"),
        (ParallelConfig(strategy="zero3", compile="blocks"), "set parallel.compile=off, or use zero2"),
        (ParallelConfig(strategy="fsdp2", deepspeed=DeepSpeedConfig(offload_optimizer=True)), "which does not read it"),
        (ParallelConfig(strategy="zero1"), "was not started by torchrun"),
        (ParallelConfig(strategy="zero1", deepspeed=DeepSpeedConfig(ds_config="none.json")), "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(parallel: ParallelConfig, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=words):
        check_strategy(parallel, OPTIM, Launch(), device_type="cpu")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds_config.json").write_text(text)
    deepspeed = DeepSpeedConfig(ds_config=str(tmp_path / "ds_config.json"))
    with pytest.raises(ValueError, match=r"not valid JSON|expected an object"):
        check_ds_config(ParallelConfig(strategy="zero1", deepspeed=deepspeed), OPTIM, bf16=False)


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tessera-pretrain\[deepspeed\]"):
        check_strategy(ParallelConfig(strategy="zero2"), OPTIM, Launch(), device_type="cpu")


def test_the_check_imports_no_deepspeed(tmp_path: Path) -> None:
    before = "deepspeed" in sys.modules
    check(tmp_path, {})
    assert ("deepspeed" in sys.modules) == before
