"""The known defects of other tokenizer trainers: where the regression test of each is, and that it finds the defect.

 1  LPIPS gives no gradient (inside no_grad)            losses/test_perceptual, objectives/test_tokenizer
 2  a module is called behind its wrapper               objectives/test_tokenizer
 3  the discriminator's step reaches the autoencoder,   objectives/test_tokenizer
    or the autoencoder's fills the discriminator's      objectives/test_tokenizer, losses/test_adversarial
 4  a parent's train() wakes LPIPS' dropout             losses/test_perceptual
 5  LeCam's averages are lost on resume                 losses/test_adversarial, objectives/test_tokenizer
 6  a codebook look-up gives unprojected codes          models/tokenizers/test_quantisers
 7  NaN of linear attention in half precision           models/tokenizers/test_dc_ae
 8  the switch between its two forms crashes            models/tokenizers/test_dc_ae; with tiles: here
    in bfloat16 or with tiles
 9  sizes that the factor does not divide               models/tokenizers/test_dc_ae
10  the discriminator's start ruins reconstructions     losses/test_adversarial, objectives/test_tokenizer
11  only 3 channels                                     models/tokenizers/test_dc_ae, objectives/test_tokenizer

`CASES` names the tests one by one. Each is run twice: with the defect edited into the product's source, where it has to
fail, and as it is, where it has to pass. An edit whose place is gone fails too: then write it anew for the new code.
"""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

from pretrain.losses.adversarial import LeCam
from pretrain.losses.config import AdversarialConfig
from pretrain.losses.perceptual import LPIPS
from pretrain.models.tokenizers.autoencoder import Autoencoder, pad_to_multiple
from pretrain.models.tokenizers.config import QuantiserConfig
from pretrain.models.tokenizers.dc_ae import DCAE, Decoder, Encoder
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.models.tokenizers.dc_ae_tiling import decode_tiled, encode_tiled
from pretrain.models.tokenizers.discriminator import Discriminator, PatchConv
from pretrain.models.tokenizers.linear_attention import LiteMLA, attend, quadratic_attention
from pretrain.models.tokenizers.quantisers import SimVQ
from pretrain.objectives.tokenizer import TokenizerObjective

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Edit:
    """A change of a function's source for the time of a test, wherever the function was imported to."""

    function: Callable[..., Any]
    old: str
    new: str

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(self.function, FunctionType)
        source = textwrap.dedent(inspect.getsource(self.function))
        assert self.old in source, f"{self.function.__qualname__} has no {self.old!r} any more: plant the defect anew"
        changed = textwrap.indent(source.replace(self.old, self.new), "    ")
        # Within a function, because a method that calls super() closes over __class__.
        lines = ["from __future__ import annotations", "def make():", "    __class__ = None", changed]
        namespace: dict[str, Any] = {}
        exec("\n".join([*lines, f"    return {self.function.__name__}"]), self.function.__globals__, namespace)
        patch.setattr(self.function, "__code__", namespace["make"]().__code__)


@dataclass(frozen=True)
class Case:
    """A defect as source edits, and a test that has to find it."""

    number: int
    edits: tuple[Edit, ...]
    test: str
    """`<file below tests/pretrain>::<function>`, or the name of one in this file."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the test, beside the fixtures that `call` knows."""
    error: type[Exception] = AssertionError
    """How the test fails."""

    def call(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        file, _, name = self.test.rpartition("::")
        module = load(file) if file else None
        function = getattr(module, name) if module else globals()[name]
        fixtures = {
            "tmp_path": lambda: folder,
            "monkeypatch": lambda: patch,
            "config": lambda: module.save(folder, "alex"),  # type: ignore[union-attr]  # test_perceptual's fixture
        }
        wanted = inspect.signature(function).parameters
        given = {name: make() for name, make in fixtures.items() if name in wanted and name not in self.arguments}
        torch.manual_seed(0)
        function(**given, **self.arguments)


@cache
def load(file: str) -> ModuleType:
    """A test module by its path below tests/pretrain."""
    spec = importlib.util.spec_from_file_location(f"defects_in_{Path(file).stem}", TESTS / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- defect 8 with tiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("height", [16, 24], ids=["quadratic-tiles", "linear-tiles"])
def test_tiles_on_either_side_of_the_switch_run_in_bfloat16(height: int, weights: torch.dtype) -> None:
    """Defect 8: of a picture with 4 or 6 rows of 10 tokens, tiles have 4 x 8 = 32 or 6 x 8 = 48."""
    torch.manual_seed(0)
    model = DCAE(dc_ae_config("tiny")).eval()
    images = torch.randn(1, 3, height, 40)
    latent = encode_tiled(model, images, tile=32, overlap=16)
    decoded = decode_tiled(model, latent, images.shape[2:], tile=32, overlap=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        low = encode_tiled(model.to(weights), images.to(weights), tile=32, overlap=16)
        low_decoded = decode_tiled(model, low.to(weights), images.shape[2:], tile=32, overlap=16)
    assert (low - latent).norm() < 0.05 * latent.norm()
    assert (low_decoded - decoded).norm() < 0.05 * decoded.norm()


# -- all of them, planted --------------------------------------------------------------------------------------------

PERCEPTUAL, ADVERSARIAL = "losses/test_perceptual.py::", "losses/test_adversarial.py::"
DC_AE, TOKENIZER = "models/tokenizers/test_dc_ae.py::", "objectives/test_tokenizer.py::"

NO_GRADIENT = (
    Edit(
        LPIPS.forward, "zip(self._unit_features(pictures),", "zip([f.detach() for f in self._unit_features(pictures)],"
    ),
)
UNWRAPPED = (Edit(TokenizerObjective._forward, 'self.players["autoencoder"](', "self.autoencoder("),)
ATTACHED = (Edit(TokenizerObjective.turns, "output.reconstruction.detach()", "output.reconstruction"),)
FILLED = (Edit(PatchConv.forward, "if constant:", "if False:"),)
AWAKE = (Edit(LPIPS.train, "train(False)", "train(mode)"),)
FORGOTTEN = (
    Edit(LeCam.__init__, "self.register_buffer(", "(lambda *given: self.register_buffer(*given, persistent=False))("),
)
UNPROJECTED = (
    Edit(SimVQ.from_codes, "indices_to_codes(codes[:, 0])", "frozen_codebook[codes[:, 0]].permute(0, 3, 1, 2)"),
)
HALF_SUMS = (Edit(attend, "at_least_float32(qkv)", "qkv"),)
AUTOCAST_SUMS = (Edit(LiteMLA.forward, "without_autocast(x.device)", 'without_autocast(torch.device("meta"))'),)
MIXED_TYPES = (Edit(quadratic_attention, "return value @", "return value.bfloat16() @"),)
NOT_PADDED = (Edit(pad_to_multiple, "if down or right", "if False"),)
NOT_CROPPED = (Edit(Autoencoder.forward, "decoded[..., : images.shape[2], : images.shape[3]]", "decoded"),)
NO_WARMUP = (Edit(AdversarialConfig.generator_share, " - self.warmup_steps", ""),)
NO_RAMP = (Edit(AdversarialConfig.generator_share, "min(1.0, (done + 1) / (self.ramp_steps + 1))", "1.0"),)
THREE_CHANNELS = (
    Edit(Encoder.__init__, "config.in_channels", "3"),
    Edit(Decoder.__init__, "config.in_channels", "3"),
)
THREE_JUDGED = (Edit(Discriminator.__init__, "PatchConv(in_channels,", "PatchConv(3,"),)

CASES = (
    Case(1, NO_GRADIENT, PERCEPTUAL + "test_gradients_reach_the_picture_and_nothing_else", error=RuntimeError),
    Case(1, NO_GRADIENT, TOKENIZER + "test_the_perceptual_loss_sees_pictures_between_minus_one_and_one"),
    Case(2, UNWRAPPED, TOKENIZER + "test_both_turns_go_through_the_prepared_players"),
    Case(3, ATTACHED, TOKENIZER + "test_both_turns_go_through_the_prepared_players", error=RuntimeError),
    Case(3, ATTACHED, TOKENIZER + "test_each_turn_fills_the_gradients_of_its_player_alone", error=RuntimeError),
    Case(3, FILLED, TOKENIZER + "test_each_turn_fills_the_gradients_of_its_player_alone"),
    Case(3, FILLED, ADVERSARIAL + "test_the_autoencoders_turn_leaves_the_discriminator_alone", {"norm": "spectral"}),
    Case(4, AWAKE, PERCEPTUAL + "test_a_parents_train_changes_nothing"),
    Case(5, FORGOTTEN, ADVERSARIAL + "test_lecam_survives_a_resume_at_every_step"),
    Case(5, FORGOTTEN, TOKENIZER + "test_a_resume_between_any_two_steps_is_equal_to_the_bit"),
    Case(
        6,
        UNPROJECTED,
        "models/tokenizers/test_quantisers.py::test_a_look_up_gives_what_the_decoder_saw",
        {"config": QuantiserConfig(kind="sim_vq", num_codes=40)},
    ),
    Case(7, HALF_SUMS, DC_AE + "test_sums_over_tokens_are_float32", {"dtype": torch.float16, "tokens": 128 * 128}),
    Case(7, AUTOCAST_SUMS, DC_AE + "test_autocast_does_not_reach_the_sums", {"size": (8, 8)}),
    Case(
        8,
        MIXED_TYPES,
        DC_AE + "test_both_forms_run_in_bfloat16",
        {"size": (128, 4), "weights": torch.float32},
        RuntimeError,
    ),
    Case(
        8,
        MIXED_TYPES,
        "test_tiles_on_either_side_of_the_switch_run_in_bfloat16",
        {"height": 16, "weights": torch.bfloat16},
        RuntimeError,
    ),
    Case(
        9, NOT_PADDED, DC_AE + "test_any_size_and_number_of_channels", {"size": (33, 47), "channels": 3}, RuntimeError
    ),
    Case(9, NOT_CROPPED, DC_AE + "test_any_size_and_number_of_channels", {"size": (33, 47), "channels": 3}),
    Case(10, NO_WARMUP, ADVERSARIAL + "test_the_discriminator_learns_before_it_counts"),
    Case(10, NO_WARMUP, TOKENIZER + "test_the_game_begins_step_by_step"),
    Case(10, NO_RAMP, ADVERSARIAL + "test_the_discriminator_learns_before_it_counts"),
    Case(10, NO_RAMP, TOKENIZER + "test_the_game_begins_step_by_step"),
    Case(
        11,
        THREE_CHANNELS,
        DC_AE + "test_any_size_and_number_of_channels",
        {"size": (32, 32), "channels": 4},
        RuntimeError,
    ),
    Case(
        11,
        THREE_JUDGED,
        TOKENIZER + "test_any_number_of_channels_and_both_stored_types",
        {"channels": 5, "dtype": torch.uint16},
        RuntimeError,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.test.rpartition('::')[2]}")
def test_a_planted_defect_is_found(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for edit in case.edits:
            edit.apply(patch)
        with pytest.raises(case.error):
            case.call(tmp_path, patch)
    case.call(tmp_path, monkeypatch)


def test_every_known_defect_has_a_test() -> None:
    assert {case.number for case in CASES} == set(range(1, 12))
