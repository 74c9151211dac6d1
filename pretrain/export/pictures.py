"""Files of pictures, and what becomes of them on both sides: in our evaluation and model, and in another library's.

Enters: the picture sizes of a model, and what each side does to a file. Leaves: how far pixels and features are apart,
per picture. It exists because two networks that agree on the same tensor are no use if the other library prepares
another tensor: squashed, cut elsewhere, or resized to another size.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data_pipes.decode.picture import decode_image
from data_pipes.transforms.image import EvalTransform
from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.publish import ExportError, relative_error
from pretrain.models.normalise import Normalise
from pretrain.weights.backbone import Backbone

PIXEL_TOLERANCE = 0.5
"""Largest root mean square difference of a picture's pixels that is published, in levels (1/255 of the full scale).
Measured: 0 between torchvision's and our resizing, up to 0.08 between Pillow's and ours, 0.29 where a library does not
round to whole levels; a crop that lies one pixel beside ours makes over 5."""
FEATURE_TOLERANCE = 0.05
"""Largest relative error of a picture's features that is published: what the model makes of such pixels."""
PIL_MODES = {1: "L", 3: "RGB"}
"""Channels -> Pillow's mode, where a picture of 8 bits becomes a Pillow image without a choice."""
_CELLS = (3, 8, 21, 55, 144)
"""Grains of a picture's detail: cells along its longer side."""

WHOLE_PICTURES = (
    "One thing is our evaluation's alone: a picture that already has the input's height and width is taken whole there."
)
"""What cards say of the one case that no library's configuration can express."""

Errors = Mapping[str, Mapping[str, float]]
"""Picture -> what was compared ("pixels", in levels; "features" and the like, relative) -> the error."""


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture: a JPEG of 1 or 3 channels, else an array in numpy's format."""

    name: str
    """such as "landscape of 510 x 340" (width x height)"""
    data: bytes
    """of the file"""
    channels: int
    """of the model"""

    def decoded(self) -> Tensor:
        """As our data sets read it: uint8 or uint16 [C, H, W]."""
        return decode_image(self.data, self.channels)

    def pillow(self) -> Image.Image:
        """As others open a JPEG."""
        return Image.open(io.BytesIO(self.data)).convert(PIL_MODES[self.channels])

    def array(self) -> NDArray[np.generic]:
        """As others read any of these files: uint8 or uint16, [H, W] or [H, W, C]."""
        return np.asarray(self.pillow()) if self.is_jpeg else np.load(io.BytesIO(self.data))

    @property
    def is_jpeg(self) -> bool:
        """Whether `pillow` reads it, and not `array`."""
        return not self.data.startswith(b"\x93NUMPY")


@dataclass(frozen=True)
class Side:
    """What one side does with a file."""

    prepare: Callable[[PictureFile], Tensor]
    """the model's input [B, C, H, W] (or [B, C, T, H, W])"""
    outputs: Callable[[Tensor], Mapping[str, Tensor]]
    """of that input, by what a message calls them"""


def picture_files(
    image_size: tuple[int, int], short_side: int, channels: int, *, bit_depth: int = 8, room: int = 3
) -> list[PictureFile]:
    """One landscape, one portrait and one square picture, which all have to be made smaller.

    Args:
        image_size: height and width of the model's input, in pixels.
        short_side: of the resized picture, before the crop.
        channels: of the model.
        bit_depth: 8 or 16.
        room: what the longer resized side exceeds the crop by, modulo 4. At 3, all ways of rounding a crop's place
            differ.
    """
    short = round(1.4 * short_side) + 5
    sides = []
    for crop in (image_size[1], image_size[0]):
        lengths = range(short * 3 // 2, short * 4)
        sides.append(next(long for long in lengths if (short_side * long // short - crop) % 4 == room))
    sizes = {"landscape": (short, sides[0]), "portrait": (sides[1], short), "square": (short, short)}
    return [
        PictureFile(f"{name} of {width} x {height}", encode(detail(height, width, channels), bit_depth), channels)
        for name, (height, width) in sizes.items()
    ]


@lru_cache(maxsize=8)
def detail(height: int, width: int, channels: int) -> Tensor:
    """A picture with structure of all sizes, the same in each call: float32 [C, H, W] between 0.03 and 0.97."""
    generator, picture = torch.Generator().manual_seed(height * 10007 + width), torch.zeros(1, channels, height, width)
    for cells in _CELLS:
        grain = [max(2, cells * side // max(height, width)) for side in (height, width)]
        coarse = torch.rand(1, channels, *grain, generator=generator)
        picture += functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    low, high = picture.min(), picture.max()
    return (0.03 + 0.94 * (picture - low) / (high - low))[0]


def encode(picture: Tensor, bit_depth: int) -> bytes:
    """The file of a float picture [C, H, W] in [0, 1]."""
    stored = (picture * (2**bit_depth - 1)).round().permute(1, 2, 0).numpy()
    channels, buffer = stored.shape[2], io.BytesIO()
    if bit_depth == 8 and channels in PIL_MODES:
        pixels = stored.astype(np.uint8)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format="JPEG", quality=95)
    else:
        np.save(buffer, stored.astype(np.uint8 if bit_depth == 8 else np.uint16))
    return buffer.getvalue()


def bit_depth_of(source: Backbone) -> int:
    """Of the pictures that the model was trained on: 8 or 16; 8 where no run tells."""
    return 8 if source.config is None else source.config.data.bit_depth


def evaluation_view(source: Backbone) -> EvalTransform:
    """What our evaluation does to a picture of any size."""
    size = source.interface.image_size
    return EvalTransform(size, view_short_side(size))


def our_pixels(source: Backbone) -> Callable[[PictureFile], Tensor]:
    """A file to the model's input [1, C, H, W], as our evaluation makes it."""
    view, normalise = evaluation_view(source), Normalise(source.mean, source.std)
    return lambda file: normalise(view(file.decoded())[None])


@torch.no_grad()
def compare_pictures(
    files: Sequence[PictureFile],
    ours: Side,
    theirs: Side,
    std: Sequence[float],
    *,
    feature_tolerance: float = FEATURE_TOLERANCE,
) -> dict[str, dict[str, float]]:
    """Takes pictures through both sides, from the file on.

    Args:
        files: what is compared.
        ours: our evaluation and model.
        theirs: the other library's preprocessing and model.
        std: per channel, what one unit of the inputs is on the scale [0, 1].
        feature_tolerance: largest allowed relative error of an output.

    Returns:
        Picture -> the errors of its "pixels", in levels, and of each output, relative.

    Raises:
        ExportError: an error is larger than its tolerance; it names the picture.
    """
    errors = {}
    for file in files:
        our_input, their_input = ours.prepare(file), theirs.prepare(file)
        found = {"pixels": pixel_error(file.name, their_input, our_input, std)}
        check_picture(file.name, found["pixels"])
        expected, given = ours.outputs(our_input), theirs.outputs(their_input)
        for what, tensor in expected.items():
            found[what] = relative_error(f"{what} of the {file.name}", given[what], tensor)
            if not found[what] <= feature_tolerance:
                raise ExportError(
                    f"the exported model's {what} of the {file.name}, from the file on, differ from ours by "
                    f"{found[what]:.3g} of their size, more than {feature_tolerance:.3g}: nothing was published"
                )
        errors[file.name] = found
    return errors


def pixel_error(name: str, theirs: Tensor, ours: Tensor, std: Sequence[float]) -> float:
    """The root mean square difference of two inputs, in levels (1/255 of the full scale).

    Args:
        name: of the picture.
        theirs: [B, C, ...].
        ours: of the same shape.
        std: per channel, what one unit is on the scale [0, 1].

    Raises:
        ExportError: the shapes differ.
    """
    if theirs.shape != ours.shape:
        raise ExportError(
            f"the {name} becomes an input of {list(theirs.shape)} by the exported preprocessing; ours is "
            f"{list(ours.shape)}: nothing was published"
        )
    levels = 255.0 * torch.tensor(list(std), dtype=torch.float64).reshape(-1, *(1,) * (ours.ndim - 2))
    error = float(((theirs.double() - ours.double()) * levels).square().mean().sqrt())
    return error if error < float("inf") else float("inf")  # NaN too


def check_picture(name: str, error: float) -> None:
    """Refuses pixels that the exported preprocessing makes otherwise than our evaluation.

    Raises:
        ExportError: the error is larger than PIXEL_TOLERANCE, or not a number.
    """
    if not error <= PIXEL_TOLERANCE:
        raise ExportError(
            f"the exported preprocessing gives other pixels than our evaluation for the {name}: they differ by "
            f"{error:.3g} levels (root mean square), more than {PIXEL_TOLERANCE:g}: nothing was published"
        )


def worst(errors: Errors) -> dict[str, float]:
    """The largest error of each kind over all pictures."""
    kinds = {kind: None for found in errors.values() for kind in found}
    return {kind: max(found.get(kind, 0.0) for found in errors.values()) for kind in kinds}


def pictures_text(errors: Errors) -> str:
    """A sentence for model cards: what was compared, and how close it was."""
    largest = worst(errors)
    relative = ", ".join(f"{kind} {error:.3g}" for kind, error in largest.items() if kind != "pixels")
    return (
        f"Compared from the file on, preprocessing included, with our evaluation: {', '.join(errors)}. Largest "
        f"difference of the pixels: {largest['pixels']:.3g} of 255 levels (root mean square; allowed: "
        f"{PIXEL_TOLERANCE:g})"
        + (f"; relative errors: {relative} (allowed: {FEATURE_TOLERANCE:g})." if relative else ".")
    )
