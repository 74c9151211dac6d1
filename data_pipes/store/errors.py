"""What can go wrong with a store: errors that end a read, and the one that is worth another attempt.

Enters: an HTTP status. Leaves: an exception. Why it exists: stores and their libraries fail in different words; retries
and messages are written once.
"""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Literal

_MAX_RETRY_AFTER_S = 600.0
"""A server's Retry-After is cut to this: a run must not sleep for a day."""


class StorageError(OSError):
    """A store cannot be used: which URL, what was tried, what it said, what to do."""


class MissingObjectError(StorageError, FileNotFoundError):
    """No such object."""


class AccessDeniedError(StorageError, PermissionError):
    """The store does not let these credentials, or none, read or write the object."""


class TransientError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        cause: Literal["timeouts", "throttled", "broken_requests"] = "broken_requests",
    ) -> None:
        """
        Args:
            message: what happened, for people.
            retry_after_s: seconds that the store asks to wait; None: it does not say.
            cause: the name of the counter.
        """
        super().__init__(message)
        self.retry_after_s, self.cause = retry_after_s, cause


def error_of_status(url: str, status: int, detail: str, retry_after: str | None = None) -> Exception:
    """What an HTTP status of 400 and more means, in HTTP itself and under the other stores.

    Args:
        url: of the object.
        status: the number.
        detail: what the store said, for the message.
        retry_after: the header of that name.
    Returns:
        A TransientError where another attempt may succeed, else the error to end with.
    """
    if status in (404, 410):
        return MissingObjectError(f"{url}: not there ({detail}); check the URL, and that the shards were copied")
    if status in (401, 403):
        return AccessDeniedError(
            f"{url}: access denied ({detail}); check the store's own credentials (environment, ~/.aws, "
            "fsspec's configuration) and their right to read this object"
        )
    if status in (429, 503):
        return TransientError(detail, retry_after_s=_seconds(retry_after), cause="throttled")
    if status in (408, 425) or status >= 500:
        return TransientError(detail, retry_after_s=_seconds(retry_after))
    return StorageError(f"{url}: the server refuses the request ({detail})")


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, which holds seconds or a date; capped, since a run must not sleep for a day."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
