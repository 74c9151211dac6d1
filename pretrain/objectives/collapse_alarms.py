"""When the game between autoencoder and discriminator has ended without anybody saying so.

Enters: means of a logging interval, as `TokenizerObjective` names them. Leaves: sentences for people. Why it exists: a
discriminator that always wins, or that says the same of everything, leaves a run whose loss looks healthy and whose
pictures stop improving. Thresholds are on the scale of the logits, which hinge and non-saturating losses share.
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.losses.adversarial import AdversarialConfig

BLIND_GAP = 0.01
"""Smallest difference of the mean logits of images and reconstructions that counts as telling them apart."""
WON_GAP = 8.0
"""Difference from which the non-saturating loss has lost all but 2% of its slope; hinge lost all of it at 2."""
STEEP = 1e-3
"""`adaptive_factor` (reconstruction's gradient norm / the game's) below which the discriminator is a cliff."""


def collapse_alarms(metrics: Mapping[str, float], config: AdversarialConfig, step: int) -> list[str]:
    """What is wrong with the game in the interval that ended at optimizer step `step`; usually nothing.

    metrics: with "train/logit_gap" (images minus reconstructions) and, where weights adapt, "train/adaptive_factor"
    (the norm of the reconstruction's gradient / that of the game's).
    """
    gap = metrics.get("train/logit_gap")
    if gap is None or config.generator_share(step) == 0.0:
        return []
    found = []
    if abs(gap) < BLIND_GAP:
        found.append(
            f"the discriminator cannot tell images from reconstructions (logit gap {gap:.3g}): its gradient is noise. "
            "Raise its learning rate, or lower adversarial.r1_weight and lecam_weight"
        )
    if gap > WON_GAP:
        found.append(
            f"the discriminator has won (logit gap {gap:.3g}): it no longer says what would be better. Lower its "
            "learning rate, or raise adversarial.r1_weight or lecam_weight"
        )
    factor = metrics.get("train/adaptive_factor")
    if factor is not None and factor < STEEP:
        found.append(
            f"the game's gradient at the pixels is {1.0 / max(factor, 1e-12):.3g} times the reconstruction's: the "
            "discriminator has become a cliff. Raise adversarial.r1_weight, or use discriminator.norm=spectral"
        )
    return found
