"""A run's pictures and films as data URIs, for a page that needs no other file. Read without torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageSequence

FRAME_MS = 200
"""How long a frame of a film is shown."""


MAX_EMBEDDED_BYTES = 150_000
"""A larger strip goes into a page as JPEG, at most MAX_EMBEDDED_WIDTH wide."""


MAX_EMBEDDED_WIDTH = 1200
"""In pixels."""


MAX_EMBEDDED_FILM_BYTES = 500_000
"""A larger film goes into a page as WebP, of the largest of EMBEDDED_FILM_WIDTHS that fits."""


EMBEDDED_FILM_WIDTHS = (900, 600, 400)
"""In pixels, from the largest."""


def animation(frames: Sequence[Image.Image], kind: str, durations_ms: Sequence[int], **options: int) -> bytes:
    """An endless film in PIL's format `kind`; `options` are those of the format."""
    buffer, (first, *others) = io.BytesIO(), frames
    first.save(buffer, format=kind, save_all=True, append_images=others, duration=list(durations_ms), loop=0, **options)
    return buffer.getvalue()


def picture_uri(path: Path) -> str:
    """A picture as a data URI of modest size; empty when the file is no readable picture."""
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            if len(data) > MAX_EMBEDDED_BYTES:
                picture = opened.convert("RGB")
                picture.thumbnail((MAX_EMBEDDED_WIDTH, 100 * MAX_EMBEDDED_WIDTH))
                buffer = io.BytesIO()
                picture.save(buffer, format="JPEG", quality=85, optimize=True)
                data, kind = buffer.getvalue(), "jpeg"
    except (OSError, SyntaxError, ValueError):  # what PIL raises for files that are torn or no pictures
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def film_uri(path: Path) -> str:
    """A film as a data URI of modest size; empty when the file is no readable film, or none of the sizes is modest."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
            durations_ms = [int(frame.info.get("duration", FRAME_MS)) for frame in ImageSequence.Iterator(opened)]
    except (OSError, SyntaxError, ValueError):
        return ""
    if len(data) <= MAX_EMBEDDED_FILM_BYTES:
        return f"data:image/gif;base64,{base64.b64encode(data).decode()}"
    for width in EMBEDDED_FILM_WIDTHS:
        for frame in frames:
            frame.thumbnail((width, 100 * width))
        data = animation(frames, "WEBP", durations_ms, quality=60)
        if len(data) <= MAX_EMBEDDED_FILM_BYTES:
            return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return ""
