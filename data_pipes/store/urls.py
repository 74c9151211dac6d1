"""Which places data may come from: plain paths and URLs of a few known kinds.

Enters: the text of a path or URL, from a recipe, a command line or a manifest. Leaves: the same text, checked; the
local path of a `file:` URL; a URL joined from a root and a relative part. Why it exists: a data set's URLs may come
from somebody else's manifest, so what they can start is decided by an allow-list. `pipe:` URLs run a shell, chained
`::` URLs open any file system by name, and a secret in a URL ends in logs, journals and checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, unquote, urlsplit

KINDS = {
    "file": "file",
    "memory": "memory",
    "http": "http",
    "https": "http",
    "s3": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "abfss": "az",
    "hf": "hf",
}
"""The allowed schemes, and the kind of store behind each."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe|file|data):")
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_SECRET = re.compile(
    r"signature|credential|token|secret|passw|^sig$|^sas$|^auth(orization)?$|accesskey|api[-_]?key", re.IGNORECASE
)
"""Query parameters that give access: X-Amz-Signature, X-Goog-Credential, sig (Azure), AWSAccessKeyId, token."""


def scheme_of(url: str) -> str:
    """The scheme in lower case; "" for a plain path."""
    found = _SCHEME.match(url)
    return (found[1] or found[2]).lower() if found else ""


def is_remote(url: str) -> bool:
    """Whether it has a scheme other than `file:`. Plain paths, relative ones too, are local."""
    return scheme_of(url) not in ("", "file")


def local_path(url: str) -> Path:
    """The path of a plain path or a `file:` URL.

    Raises:
        ValueError: it is anything else.
    """
    if is_remote(url):
        raise ValueError(f"{redacted(url)}: not a local path; copy the data to a local folder first")
    if scheme_of(url) == "":
        return Path(url)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url}: a file URL of the host {parts.netloc!r}; write file:///PATH, with three slashes")
    return Path(unquote(parts.path))


def join_url(root: str, relative: str) -> str:
    """The place of `relative` seen from the folder `root` (path or URL); an absolute path or URL is taken as it is."""
    if scheme_of(relative) or PurePosixPath(relative).is_absolute() or not root:
        return relative
    if not is_remote(root):
        return str(local_path(root) / relative)
    if KINDS.get(scheme_of(root)) == "http":  # there "?" and "#" would end the path; "%" may already be an escape
        relative = relative.replace("?", "%3F").replace("#", "%23")
    return f"{root.rstrip('/')}/{relative}"


def check_url(url: str) -> None:
    """Refuses a URL that is not to be opened; plain paths pass.

    Raises:
        ValueError: its scheme is outside of the allow-list, it is a shell or chained URL, it has credentials inside, no
            host or bucket, or control characters.
    """
    if _CONTROL.search(url) or not url:
        raise ValueError(f"{url!r}: empty or with control characters; name a path or URL")
    if url.lstrip().lower().startswith(("pipe:", "|")):
        raise ValueError(
            f"{url.split()[0][:40]!r}...: pipe: URLs run a shell command and are refused; name the place itself "
            "(s3://, gs://, http(s)://, ...): ranged reads, retries and the cache do not need a command"
        )
    if "::" in url:
        raise ValueError(
            f"{redacted(url)}: chained URLs (with '::') open file systems beyond the allowed ones and are refused; "
            "name the store's own URL, and use data.cache for a local cache"
        )
    scheme = scheme_of(url)
    if not scheme:
        return
    if scheme not in KINDS:
        raise ValueError(f"{redacted(url)}: the scheme {scheme}: is not allowed; expected one of {', '.join(KINDS)}")
    _refuse_credentials(url, scheme)
    if KINDS[scheme] not in ("file", "memory") and not urlsplit(url).netloc:
        raise ValueError(f"{redacted(url)}: no host or bucket; expected {scheme}://NAME/PATH")


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment: what messages may show of one that is refused."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    authority, slash, path = rest.partition("/")
    if "@" in authority and not _names_a_container(scheme.lower(), authority):
        authority = "***@" + authority.rpartition("@")[2]
    path, *hidden = re.split(r"[?#]", path, maxsplit=1)
    return f"{scheme}://{authority}{slash}{path}" + ("?***" if hidden else "")


def _refuse_credentials(url: str, scheme: str) -> None:
    parts = urlsplit(url)
    has_user = "@" in parts.netloc and not _names_a_container(scheme, parts.netloc)
    found = "a user or password" if has_user else ""
    for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True):
        found = found or (f"the parameter {name}" if _SECRET.search(name) else "")
    if found:
        raise ValueError(
            f"{redacted(url)}: {found} inside the URL would end in logs and checkpoints; give credentials by the "
            "store's own configuration (environment variables, ~/.aws, `gcloud auth`, fsspec's configuration files)"
        )


def _names_a_container(scheme: str, authority: str) -> bool:
    """Azure's long form, abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH."""
    return scheme in ("abfs", "abfss") and ":" not in authority.rpartition("@")[0]
