"""The built-in sets, so that everything can be tried without a download.

Enters: a name, with options where the set has some. Leaves: the files of a small labelled set. There are `digits` (the
1,797 grey digits of 8 x 8 pixels of scikit-learn), `photos` (crops of the photographs that lie inside the scikit-image
package) and `motion` (videos of digits and photographs that move, see data_pipes.pack.builtin_motion).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipes.pack import builtin_pictures
from data_pipes.pack.builtin_motion import MotionOptions, MotionSource
from data_pipes.pack.sources import MemorySource, Source

PHOTO_SIZE = 96
"""Height and width of a crop, in pixels."""
_PHOTO_SHORT_SIDE = 288
"""Pixels of the photograph that crops are cut from: at this size a crop shows an object, not a texture."""
_PHOTO_ROWS, _PHOTO_COLUMNS = 6, 8
"""Crops below each other and side by side."""
_PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
"""The name of each class -> the file in scikit-image."""


def load_builtin(text: str) -> Source:
    """A built-in set as class folders.

    Args:
        text: its name, and options after a comma, as in "motion,videos=400,size=96".

    Raises:
        ValueError: the name or an option is unknown, or a package is missing.
        ImportError: the set consists of videos, and PyAV is missing.
    """
    name, _, options = text.partition(",")
    if name not in BUILTINS:
        raise ValueError(f"there is no built-in set {name!r}; there are {', '.join(sorted(BUILTINS))}")
    return BUILTINS[name](options)


def digits() -> MemorySource:
    """1,797 grey PNG of 8 x 8 pixels in the classes 0 to 9."""
    pixels, labels = builtin_pictures.digits()
    files = {
        f"{label}/{number:04d}.png": _png(Image.fromarray(picture))
        for number, (picture, label) in enumerate(zip(pixels, labels, strict=True))
    }
    return MemorySource("builtin:digits", files)


def photos() -> MemorySource:
    """384 RGB PNG of 96 x 96 pixels: 48 crops on a grid over each of 8 photographs, which are the classes.

    The crops of a photograph overlap, so a validation split of them shows that a run works, not that a model
    generalises.
    """
    files = {}
    for label, file_name in _PHOTOGRAPHS.items():
        photograph = builtin_pictures.photograph(file_name, _PHOTO_SHORT_SIDE)
        width, height = photograph.size
        tops = np.linspace(0, height - PHOTO_SIZE, _PHOTO_ROWS).astype(int).tolist()
        lefts = np.linspace(0, width - PHOTO_SIZE, _PHOTO_COLUMNS).astype(int).tolist()
        for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
            crop = photograph.crop((left, top, left + PHOTO_SIZE, top + PHOTO_SIZE))
            files[f"{label}/{number:02d}.png"] = _png(crop)
    return MemorySource("builtin:photos", files)


def _without_options(name: str, make: Callable[[], Source]) -> Callable[[str], Source]:
    def load(options: str) -> Source:
        if options:
            raise ValueError(f"builtin:{name} has no options; found {options!r}")
        return make()

    return load


BUILTINS: dict[str, Callable[[str], Source]] = {
    "digits": _without_options("digits", digits),
    "photos": _without_options("photos", photos),
    "motion": lambda options: MotionSource(MotionOptions.parse(options)),
}
"""The name of each set -> what makes it from the text of its options."""


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
