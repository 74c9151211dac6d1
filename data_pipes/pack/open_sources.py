"""From what a user names to the sources that are packed.

Enters: paths and names of built-in sets, for training and for validation. Leaves: the open sources. Why it exists:
there are four ways to name a validation set, of which a pack may use one.
"""

from __future__ import annotations

import os
from pathlib import Path

from data_pipes.pack.builtin import BUILTINS, load_builtin
from data_pipes.pack.sources import FolderSource, Source, ZipSource

Place = str | os.PathLike[str]
"""A path, or the name of a built-in set."""
_BUILTIN_PREFIX = "builtin:"
"""With it a name always means the built-in set, never a path."""


def open_source(source: Place) -> Source:
    """The files of a folder, a zip or a built-in set.

    Args:
        source: a path, or the name of a built-in set: "builtin:digits"; "digits" where no such path exists; with
            options, "builtin:motion,videos=400".

    Raises:
        ValueError: it is none of these, or cannot be read.
        ImportError: a built-in set of videos, and PyAV is missing.
    """
    text = os.fspath(source)
    path = Path(text)
    if text.startswith(_BUILTIN_PREFIX):
        return load_builtin(text.removeprefix(_BUILTIN_PREFIX))
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if path.suffix.lower() == ".tar":
            raise ValueError(
                f"{path}: a tar file; if it holds a webdataset, use `tessera index {path}`; otherwise unpack it "
                "and pack the folder"
            )
        return ZipSource(path)
    if text.partition(",")[0] in BUILTINS:
        return load_builtin(text)
    raise ValueError(
        f"{text}: no such folder or zip; built-in sets are "
        f"{', '.join(_BUILTIN_PREFIX + name for name in sorted(BUILTINS))}"
    )


def open_sources(source: Place, val: Place | None, val_labels: Place | None, val_fraction: float) -> dict[str, Source]:
    """The sources of "train" and, where it has one of its own, of "val".

    Args:
        source: for training.
        val: for validation.
        val_labels: a second list of labels: validation takes other files of the same source.
        val_fraction: share of the training source that becomes the validation set later; 0 for none.

    Raises:
        ValueError: a source cannot be opened, or a validation set is named in more than one way.
        ImportError: a built-in set of videos, and PyAV is missing.
    """
    opened = {"train": open_source(source)}
    own = opened["train"].validation()
    given = [
        name
        for name, is_given in (
            ("a validation source", val is not None),
            ("a second list of labels", val is None and val_labels is not None),
            ("val_fraction", val_fraction > 0),
            (f"{opened['train'].title}, which brings its own validation set,", own is not None),
        )
        if is_given
    ]
    if len(given) > 1:
        raise ValueError(f"both {' and '.join(given)} are given; choose one")
    if val is not None:
        opened["val"] = open_source(val)
    elif val_labels is not None:
        opened["val"] = opened["train"]
    elif own is not None:
        opened["val"] = own
    return opened
