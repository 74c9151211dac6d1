"""From latents back to pictures that somebody can look at, and reconstructions beside their originals.

Enters: a data set of latents, safetensors files of latents, or picture files, with a tokenizer. Leaves: PNG files, and
for reconstructions the PSNR of each. Why it exists: whoever trains on latents wants to see what they hold, and whoever
chooses a tokenizer wants to see what it does to pictures of one's own domain.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.picture import decode_image
from data_pipes.errors import SampleError
from data_pipes.shards.collection import Place
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import IMAGE_EXTENSIONS
from data_pipes.shards.reader import ShardReader
from data_pipes.transforms.image import EvalTransform
from data_pipes.transforms.pictures import with_bit_depth
from pretrain.latents.coder import PictureCoder
from pretrain.latents.options import LATENT_MEMBER
from pretrain.losses.reconstruction import psnr

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON head, in so many bytes."""


@dataclass(frozen=True)
class StoredLatent:
    """One latent as it is stored."""

    name: str
    """of the picture to write, without its ending; "/" separates folders"""
    latent: Tensor
    """float32 [L, h, w], unscaled"""
    size: tuple[int, int] | None
    """(height, width) of the picture that was encoded, where it is known"""


def latents_of_dataset(manifest: Manifest, tensor: str = "latent") -> Iterator[StoredLatent]:
    """Reads all latents of a data set that `tessera encode` made.

    Args:
        manifest: of the latents.
        tensor: "latent" or "mirrored".

    Yields:
        The latents in the order of the manifest.

    Raises:
        ValueError: a sample has no such tensor.
    """
    reader = ShardReader(manifest, (LATENT_MEMBER,))
    for shard, entry in enumerate(manifest.shards):
        for raw in reader.read_many([Place(shard, sample) for sample in range(entry.num_samples)]):
            data = raw.members.get(LATENT_MEMBER)
            tensors = {} if data is None else _tensors(data, f"{raw.key} in {entry.url}")
            if data is None or tensor not in tensors:
                raise ValueError(
                    f"{raw.key} in {entry.url} has no tensor {tensor!r} in a member {LATENT_MEMBER}; expected a data "
                    "set that `tessera encode` made"
                )
            yield StoredLatent(raw.key, tensors[tensor].float(), _image_size(data))


def latents_of_file(path: Path, scaling_factor: float = 1.0) -> Iterator[StoredLatent]:
    """Reads all latents of a safetensors file.

    Args:
        path: of a file with tensors [L, h, w] or [B, L, h, w].
        scaling_factor: what the latents were multiplied with; they are divided by it.

    Yields:
        The latents in the order of the tensors' names.

    Raises:
        ValueError: the file has other tensors, or is no safetensors file.
    """
    data = path.read_bytes()
    for name, tensor in sorted(_tensors(data, str(path)).items()):
        if tensor.ndim not in (3, 4) or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected floats [channels, height, width], or "
                "a batch of these"
            )
        latents = tensor.float()[None] if tensor.ndim == 3 else tensor.float()
        for row, latent in enumerate(latents):
            numbered = name if tensor.ndim == 3 else f"{name}-{row:05d}"
            yield StoredLatent(f"{path.stem}/{numbered}", latent / scaling_factor, _image_size(data))


def decode_to_files(
    latents: Iterator[StoredLatent],
    coder: PictureCoder,
    out: Path,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    on_picture: Callable[[], None] | None = None,
) -> int:
    """Decodes latents to `out`/<name>.png. Neighbours of equal size share a batch.

    Args:
        latents: to decode.
        coder: with the model that encoded them.
        out: folder of the pictures.
        batch_size: latents per forward pass.
        limit: decode only the first so many; None: all.
        on_picture: called after each picture.

    Returns:
        The number of pictures.

    Raises:
        ValueError: a latent has another number of channels, its name leads out of `out`, or its file exists.
    """
    channels, batch, count = coder.config.latent_channels, list[StoredLatent](), 0
    for stored in islice(latents, limit):
        if stored.latent.shape[0] != channels:
            raise ValueError(
                f"the latent {stored.name} has {stored.latent.shape[0]} channels, the tokenizer's have {channels}; "
                "decode with the model that encoded them"
            )
        fits = not batch or (batch[0].latent.shape, batch[0].size) == (stored.latent.shape, stored.size)
        if not fits or len(batch) == batch_size:
            count += _decode_batch(batch, coder, out, on_picture)
            batch = []
        batch.append(stored)
    return count + _decode_batch(batch, coder, out, on_picture)


def _decode_batch(
    batch: list[StoredLatent], coder: PictureCoder, out: Path, on_picture: Callable[[], None] | None
) -> int:
    """Decodes latents of one size, and returns their number."""
    if batch:
        pictures = coder.decode(torch.stack([stored.latent for stored in batch]), batch[0].size)
        for stored, picture in zip(batch, pictures.cpu(), strict=True):
            write_png(picture, path_below(out, stored.name))
            if on_picture is not None:
                on_picture()
    return len(batch)


@dataclass(frozen=True)
class Reconstruction:
    """One picture and what came back."""

    picture: Path
    """its file"""
    size: tuple[int, int]
    """(height, width) in pixels, as it was encoded"""
    psnr: float
    """dB, of the rounded 8-bit values of all channels"""
    file: Path
    """the picture, its reconstruction, and their difference around grey, side by side"""


def find_pictures(sources: Sequence[Path]) -> list[tuple[Path, str]]:
    """Lists picture files, and all pictures in folders.

    Args:
        sources: files and folders.

    Returns:
        (file, name for the result) in the order of the sources; those of a folder sorted.

    Raises:
        ValueError: a source does not exist, or there is no picture at all.
    """
    found: list[tuple[Path, str]] = []
    for source in sources:
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
            found += [(path, path.relative_to(source).as_posix()) for path in files]
        elif source.is_file():
            found.append((source, source.name))
        else:
            raise ValueError(f"{source}: no such picture or folder")
    if not found:
        raise ValueError(f"no picture in {', '.join(map(str, sources))}; known endings: {', '.join(IMAGE_EXTENSIONS)}")
    return found


def reconstruct_file(
    picture: Path,
    name: str,
    coder: PictureCoder,
    out: Path,
    *,
    transform: EvalTransform | None = None,
    bit_depth: int = 8,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Reconstruction:
    """Encodes and decodes one picture, and writes it beside its reconstruction to `out`/<name>.png.

    Args:
        picture: file of the picture.
        name: of the result, below `out`.
        coder: with the tokenizer.
        out: folder of the results.
        transform: what is done to the picture first; None: it is encoded as it is.
        bit_depth: 8 or 16, of the pictures that the model was trained on.
        max_pixels: height * width of a picture, at most.

    Raises:
        ValueError: the picture cannot be read, or the file exists.
    """
    stored = torch.uint8 if bit_depth == 8 else torch.uint16
    try:
        image = with_bit_depth(decode_image(picture.read_bytes(), coder.config.in_channels, max_pixels), stored)
        image = image if transform is None else transform(image)
    except SampleError as error:
        raise ValueError(f"{picture}: {error}") from error
    original = coder.to_uint8(image[None])
    reconstruction = coder.reconstruct(image[None])
    difference = (reconstruction.int() - original.int() + 128).clamp(0, 255).to(torch.uint8)
    target = path_below(out, name)
    write_png(torch.cat([original, reconstruction, difference], dim=3)[0].cpu(), target)
    size = (image.shape[1], image.shape[2])
    return Reconstruction(picture, size, float(psnr(reconstruction, original)), target)


def path_below(folder: Path, name: str) -> Path:
    """The file `folder`/<name>.png.

    Raises:
        ValueError: the name leads elsewhere, as one from a hostile tar may.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} cannot be the name of a file below {folder}")
    return folder / f"{name}.png"


def write_png(picture: Tensor, path: Path) -> None:
    """Writes a picture as a new PNG file, in a folder that is made where it is missing.

    Args:
        picture: uint8 [C, H, W] on the CPU; of more than 3 channels the first 3 are written, of 2 the first.
        path: of the file.

    Raises:
        ValueError: the file exists.
    """
    shown = picture[: 3 if len(picture) >= 3 else 1].permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            Image.fromarray(shown if shown.shape[2] == 3 else shown[:, :, 0]).save(file, "PNG")
    except FileExistsError:
        raise ValueError(f"{path}: exists (or two pictures have this name); choose an empty folder") from None


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their names.

    Args:
        data: the file's bytes.
        where: what a message calls the file.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{where}: no safetensors file ({error})") from error


def _image_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of the encoded picture, which `tessera encode` notes in the file's head; None: not noted."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    noted = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length]).get("__metadata__", {}).get("image_size", "")
    height, _, width = noted.partition("x")
    return (int(height), int(width)) if height.isdigit() and width.isdigit() else None
