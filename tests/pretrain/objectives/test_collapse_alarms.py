"""A game that has ended is said to have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.losses.config import AdversarialConfig
from pretrain.models.tokenizers import discriminator
from pretrain.objectives.collapse_alarms import collapse_alarms
from pretrain.tracking.journal import read_journal
from tests.pretrain.parallel.test_two_players import overrides_of, run_here

GAME = AdversarialConfig(weight=0.5, warmup_steps=10)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"train/logit_gap": 0.003}, "cannot tell images from reconstructions"),
        ({"train/logit_gap": -0.003}, "cannot tell"),
        ({"train/logit_gap": 12.0}, "has won"),
        ({"train/logit_gap": 1.0, "train/adaptive_factor": 1e-5}, "a cliff"),
    ],
)
def test_alarms(metrics: dict[str, float], words: str) -> None:
    (alarm,) = collapse_alarms(metrics, GAME, 20)
    assert words in alarm


@pytest.mark.parametrize("gap", [0.1, 1.0, 3.0, -0.5])
def test_a_game_that_goes_on_is_left_alone(gap: float) -> None:
    assert collapse_alarms({"train/logit_gap": gap, "train/adaptive_factor": 0.3}, GAME, 20) == []


def test_a_discriminator_may_win_while_it_warms_up() -> None:
    assert collapse_alarms({"train/logit_gap": 12.0}, GAME, 5) == []
    assert collapse_alarms({"train/loss": 1.0}, GAME, 20) == []


def test_a_run_says_and_keeps_its_alarms(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator whose logits are all alike, because its learning rate is 0 and its weights are tiny."""
    monkeypatch.setattr(discriminator, "WEIGHT_STD", 1e-6)
    options = ["optim.players.discriminator.lr=1e-30", "train.steps=4", "objective.discriminator.norm=none"]
    run_here(overrides_of(tiny_dataset, tmp_path, "run", *options))
    alarms = [record for record in read_journal(tmp_path / "run") if record.get("name") == "alarm"]
    assert [alarm["step"] for alarm in alarms] == [2, 3, 4]  # from where its judgement counts
    assert "cannot tell images from reconstructions" in alarms[0]["what"]
