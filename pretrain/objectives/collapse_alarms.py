"""Alarms for adversarial training that has stopped teaching the autoencoder anything, though its losses look healthy.

Enters: means of a logging interval, as `TokenizerObjective` names them. Leaves: sentences for people. Why it exists: a
discriminator that always wins, or that gives everything the same logit, leaves a run whose loss looks healthy and
whose pictures stop improving. Thresholds are on the scale of the logits, which hinge and non-saturating losses share.
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.losses.config import AdversarialConfig

MIN_LOGIT_GAP = 0.01
"""Smallest difference of the mean logits of images and reconstructions that counts as telling them apart."""
MAX_LOGIT_GAP = 8.0
"""Difference from which the non-saturating loss has lost all but 2% of its slope; hinge lost all of it at 2."""
MIN_ADAPTIVE_FACTOR = 1e-3
"""Ratio of the reconstruction loss' gradient norm to the adversarial loss' below which the latter is far too steep."""


def collapse_alarms(metrics: Mapping[str, float], config: AdversarialConfig, step: int) -> list[str]:
    """What is wrong with adversarial training in a logging interval; usually nothing.

    Args:
        metrics: the interval's means, with "train/logit_gap" (images minus reconstructions) and, where weights adapt,
            "train/adaptive_factor" (norm of the reconstruction loss' gradient / that of the adversarial loss').
        config: of the losses.
        step: the optimizer step at which the interval ended.

    Returns:
        A sentence for each thing that is wrong.
    """
    gap = metrics.get("train/logit_gap")
    if gap is None or config.generator_share(step) == 0.0:
        return []
    found = []
    if abs(gap) < MIN_LOGIT_GAP:
        found.append(
            f"the discriminator cannot tell images from reconstructions (logit gap {gap:.3g}): its gradient is noise. "
            "Raise its learning rate, or lower adversarial.r1_weight and lecam_weight"
        )
    if gap > MAX_LOGIT_GAP:
        found.append(
            f"the discriminator has won (logit gap {gap:.3g}): it no longer says what would be better. Lower its "
            "learning rate, or raise adversarial.r1_weight or lecam_weight"
        )
    factor = metrics.get("train/adaptive_factor")
    if factor is not None and factor < MIN_ADAPTIVE_FACTOR:
        found.append(
            f"the game's gradient at the pixels is {1.0 / max(factor, 1e-12):.3g} times the reconstruction's: the "
            "discriminator has become a cliff. Raise adversarial.r1_weight, or use discriminator.norm=spectral"
        )
    return found
