"""Which members of a sample are wanted, by their names or by patterns.

Enters: extensions such as "jpg" and "left.jpg", and patterns such as "*.jpg". Leaves: whether a member is one of them.
Why it exists: a member's extension is all behind the first dot, so files with dots in their names have one of their own
each, and a user can say which of several pictures is meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


class WantedMembers:
    """A set of extensions that may hold patterns."""

    def __init__(self, names: Iterable[str]) -> None:
        """
        Args:
            names: extensions in lower case without the leading dot, or patterns of them with * and ?.
        """
        names = frozenset(names)
        self._patterns = tuple(sorted(name for name in names if is_pattern(name)))
        self._names = names.difference(self._patterns)

    def __contains__(self, extension: str) -> bool:
        return extension in self._names or any(fnmatchcase(extension, pattern) for pattern in self._patterns)


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards."""
    return "*" in name or "?" in name


def checked_member(name: str | None) -> str | None:
    """The name of a member as a user gives it, in lower case.

    Raises:
        ValueError: it is empty, or begins with a dot.
    """
    if name is None:
        return None
    if not name or name.startswith(".") or "/" in name:
        raise ValueError(
            f"data.image_member is {name!r}; expected what stands behind the first dot of a member's name, such as "
            "left.jpg, or a pattern such as *.jpg"
        )
    return name.lower()
