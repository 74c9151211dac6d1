"""Writing a file in one step.

Enters: a path and bytes. Leaves: the file, whole. Why it exists: a crash or a full disk must never leave half a file
under a name that somebody reads.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file such that a reader sees either the old or the whole new content, and a crash leaves no half file
    under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
