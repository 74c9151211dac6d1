"""The mean and standard deviation per channel that pixels are normalised with: defaults and checks."""

from __future__ import annotations

from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of ImageNet's red, green and blue, on the scale where the stored range is [0, 1]."""


IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, on the scale where the stored range is [0, 1]."""


def default_mean(in_channels: int) -> tuple[float, ...]:
    """ImageNet's for 3 channels, else 0.5 each."""
    return IMAGENET_MEAN if in_channels == 3 else (0.5,) * in_channels


def default_std(in_channels: int) -> tuple[float, ...]:
    """ImageNet's for 3 channels, else 0.5 each."""
    return IMAGENET_STD if in_channels == 3 else (0.5,) * in_channels


def check_statistics(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """Checks the statistics of a configuration.

    Raises:
        ValueError: there is not one number per channel in each, or a standard deviation is not positive.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} numbers and the model {channels} channels; expected one number per "
                f"channel. Set {name} to {channels} numbers, or to [] for the default."
            )
    if min(std) <= 0.0:
        raise ValueError(f"std is {list(std)}; expected positive numbers.")


def shown_channels(in_channels: int) -> int:
    """How many of the first channels a picture shows: 3 as red, green and blue, or the first alone in grey."""
    return 3 if in_channels >= 3 else 1


def fill_statistics(config: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Gives a frozen configuration the statistics that it leaves empty, and checks them.

    Args:
        config: with the fields `mean` and `std`, which a YAML file may give as lists.
        mean: one number per channel, for an empty `config.mean`.
        std: one number per channel, for an empty `config.std`.

    Raises:
        ValueError: the configuration's own do not fit the channels, or a standard deviation is not positive.
    """
    channels = len(mean)
    object.__setattr__(config, "mean", tuple(config.mean) or mean)
    object.__setattr__(config, "std", tuple(config.std) or std)
    check_statistics(config.mean, config.std, channels)
