"""Run by test_suite on two ranks: evaluates suites and saves what the main process has."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.evaluation.encoder.features import make_accelerator
from pretrain.evaluation.tokenizer import suite as tokenizer_suite
from pretrain.evaluation.tokenizer.suite import TokenizerSuiteConfig, TokenizerTaskConfig, evaluate_tokenizer
from tests.pretrain.tiny_tokenizer import random_tokenizer

PROBE = {"iterations": 20, "batch": 30, "refit": False, "learning_rates": [0.1], "grid": 2}


def suites(test: str, train: str) -> dict[str, TokenizerSuiteConfig]:
    pictures = {name: TokenizerTaskConfig(name) for name in ("psnr_uint8", "ssim_uint8", "latent_statistics")}
    tasks = {
        **pictures,
        "rfid": TokenizerTaskConfig("rfid_inception"),
        "probe": TokenizerTaskConfig("latent_linear", PROBE),
    }
    return {
        "all": TokenizerSuiteConfig(test=test, train=train, size=(32, 36), batch_size=3, tasks=tasks),
        "one": TokenizerSuiteConfig(test=test, size=(32, 36), num_samples=1, batch_size=3, tasks=pictures),
    }


def main(test: str, train: str, out: str) -> None:
    from tests.pretrain.evaluation.tokenizer.test_suite import SmallExtractor

    torch.set_num_threads(1)
    tokenizer_suite.load_inception = lambda config: SmallExtractor()
    accelerator = make_accelerator(cpu=True)
    for name, suite in suites(test, train).items():
        records = evaluate_tokenizer(random_tokenizer(), suite, accelerator)
        assert bool(records) == accelerator.is_main_process
        if records:
            (Path(out) / f"{name}.json").write_text(json.dumps(records))
    accelerator.end_training()
