"""The built-in pictures, so that everything can be tried without a download.

Enters: a name. Leaves: the PNG files of a small labelled set, in memory. `digits`: the 1,797 grey digits of 8 x 8
pixels of scikit-learn (UCI Optical Recognition of Handwritten Digits). `photos`: crops of the photographs that lie
inside the scikit-image package.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipes.sources import MemorySource

PHOTO_SIZE = 96
# pixels, height and width of a crop
_PHOTO_SHORT_SIDE = 288
# pixels of the photograph that crops are cut from: at this size a crop shows an object, not a texture
_PHOTO_ROWS, _PHOTO_COLUMNS = 6, 8
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
_INSTALL = "install it with: pip install 'tessera-pretrain[demo]'"


def load_builtin(name: str) -> MemorySource:
    """The built-in set of that name as class folders. Raises ValueError for an unknown name or a missing package."""
    if name not in BUILTINS:
        raise ValueError(f"there is no built-in set {name!r}; there are {', '.join(sorted(BUILTINS))}")
    return BUILTINS[name]()


def digits() -> MemorySource:
    """1,797 grey PNG of 8 x 8 pixels in the classes 0 to 9; the values 0..16 become 0..255, rounded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"the built-in set digits needs scikit-learn; {_INSTALL}") from error
    content = load_digits()
    pixels = np.rint(content.images * (255 / 16)).astype(np.uint8)
    files = {
        f"{label}/{number:04d}.png": _png(Image.fromarray(picture))
        for number, (picture, label) in enumerate(zip(pixels, content.target.tolist(), strict=True))
    }
    return MemorySource("builtin:digits", files)


def photos() -> MemorySource:
    """384 RGB PNG of 96 x 96 pixels: 48 crops on a grid over each of 8 photographs, which are the classes.

    The crops of a photograph overlap, so a validation split of them shows that a run works, not that a model
    generalises.
    """
    folder = _photo_folder()
    files = {}
    for label, file_name in _PHOTOGRAPHS.items():
        path = folder / file_name
        if not path.is_file():
            raise ValueError(f"the built-in set photos needs {path}, which this scikit-image does not ship; {_INSTALL}")
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        scale = _PHOTO_SHORT_SIDE / min(photograph.size)
        width, height = (round(side * scale) for side in photograph.size)
        photograph = photograph.resize((width, height), Image.Resampling.BICUBIC)
        tops = np.linspace(0, height - PHOTO_SIZE, _PHOTO_ROWS).astype(int).tolist()
        lefts = np.linspace(0, width - PHOTO_SIZE, _PHOTO_COLUMNS).astype(int).tolist()
        for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
            crop = photograph.crop((left, top, left + PHOTO_SIZE, top + PHOTO_SIZE))
            files[f"{label}/{number:02d}.png"] = _png(crop)
    return MemorySource("builtin:photos", files)


BUILTINS: dict[str, Callable[[], MemorySource]] = {"digits": digits, "photos": photos}


def _photo_folder() -> Path:
    """The pictures inside the installed package; `skimage.data` is not imported, since it may download."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the built-in set photos needs scikit-image; {_INSTALL}")
    return Path(found.submodule_search_locations[0]) / "data"


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
