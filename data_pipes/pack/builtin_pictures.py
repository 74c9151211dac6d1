"""The pictures that come inside other packages: scikit-learn's digits and scikit-image's photographs.

Enters: nothing, or the name of a photograph. Leaves: pixels. Why it exists: everything can be tried without a download,
and both built-in pictures and built-in videos are made of these.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_INSTALL = "install it with: pip install 'tessera-pretrain[demo]'"


def digits() -> tuple[NDArray[np.uint8], list[int]]:
    """The handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits).

    Returns:
        The grey pictures, uint8 [1797, 8, 8], their values 0..16 as 0..255, rounded; and their labels.

    Raises:
        ValueError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"the built-in digits need scikit-learn; {_INSTALL}") from error
    content = load_digits()
    return np.rint(content.images * (255 / 16)).astype(np.uint8), content.target.tolist()


def photograph(file_name: str, short_side: int) -> Image.Image:
    """One of scikit-image's photographs, RGB, resized (bicubic, antialias).

    Args:
        file_name: in scikit-image's folder of data.
        short_side: of the result, in pixels.

    Raises:
        ValueError: scikit-image is missing, or does not ship the photograph.
    """
    path = _photo_folder() / file_name
    if not path.is_file():
        raise ValueError(f"the built-in photographs need {path}, which this scikit-image does not ship; {_INSTALL}")
    with Image.open(path) as image:
        picture = image.convert("RGB")
    scale = short_side / min(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _photo_folder() -> Path:
    """The pictures inside the installed package; `skimage.data` is not imported, since it may download."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the built-in photographs need scikit-image; {_INSTALL}")
    return Path(found.submodule_search_locations[0]) / "data"
