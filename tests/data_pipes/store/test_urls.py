"""Which URLs are opened, which are refused and why, and how paths and URLs are joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipes.store.urls import check_url, is_remote, join_url, local_path, redacted

ALLOWED = [
    "data/train",
    "/data/train/000.tar",
    "file:///data/train",
    "memory://train/000.tar",
    "http://host:8080/a b/000.tar",
    "HTTPS://host/000.tar?version=3",
    "s3://bucket/a/b.tar",
    "s3://bucket/with@sign/b.tar",
    "gs://bucket/a.tar",
    "gcs://bucket/a.tar",
    "az://container/a.tar",
    "abfs://container@account.dfs.core.windows.net/a.tar",
    "hf://datasets/user/name@main/a.tar",
]


@pytest.mark.parametrize("url", ALLOWED)
def test_allowed(url: str) -> None:
    check_url(url)
    assert is_remote(url) == ("://" in url and not url.startswith("file"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe:curl -s http://host/a.tar", "shell"),
        ("PIPE:cat a.tar", "shell"),
        ("pipe:", "shell"),
        ("| cat a.tar", "shell"),
        ("simplecache::s3://bucket/a.tar", "chained"),
        ("zip://a.tar::http://host/b.zip", "chained"),
        ("ftp://host/a.tar", "not allowed"),
        ("ssh://host/a.tar", "not allowed"),
        ("github://user:repo@main/a.tar", "not allowed"),
        ("data:,hello", "not allowed"),
        ("https:///a.tar", "no host"),
        ("s3://", "no host"),
        ("http://host/a.tar\r\nX-Header: 1", "control"),
        ("", "empty"),
    ],
)
def test_refused(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/a.tar",
        "https://hunter2@host/a.tar",
        "s3://AKIAX:hunter2@bucket/a.tar",
        "abfs://container:hunter2@account.dfs.core.windows.net/a.tar",
        "https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=1&X-Amz-Signature=hunter2",
        "https://storage.googleapis.com/b/a.tar?X-Goog-Signature=hunter2",
        "https://account.blob.core.windows.net/c/a.tar?sv=2020&sig=hunter2",
        "https://host/a.tar?access_token=hunter2",
        "https://host/a.tar?API-KEY=hunter2",
        "https://host/a.tar#token=hunter2",
        "s3://bucket/a.tar?AWSAccessKeyId=hunter2",
    ],
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="own configuration") as caught:
        check_url(url)
    assert "hunter2" not in str(caught.value)


def test_redacted() -> None:
    assert redacted("https://u:p@host/a.tar?sig=x#y") == "https://***@host/a.tar?***"
    assert redacted("abfs://c@account.net/a") == "abfs://c@account.net/a"
    assert redacted("/a/b?c") == "/a/b?c"


@pytest.mark.parametrize(
    ("root", "relative", "joined"),
    [
        ("s3://b/train", "000.tar", "s3://b/train/000.tar"),
        ("s3://b/train/", "sub/000.tar", "s3://b/train/sub/000.tar"),
        ("s3://b/train", "s3://other/000.tar", "s3://other/000.tar"),
        ("s3://b/train", "/local/000.tar", "/local/000.tar"),
        ("s3://b/train", "what?#.tar", "s3://b/train/what?#.tar"),
        ("http://h/train", "what?#%20.tar", "http://h/train/what%3F%23%20.tar"),
        ("/data", "000.tar", "/data/000.tar"),
        ("data", "/abs/000.tar", "/abs/000.tar"),
        ("file:///data", "000.tar", "/data/000.tar"),
        ("memory://x", "y/z", "memory://x/y/z"),
    ],
)
def test_join(root: str, relative: str, joined: str) -> None:
    assert join_url(root, relative) == joined


def test_local_path() -> None:
    path = Path("/data/with space/ü.tar")
    assert local_path(str(path)) == local_path(path.as_uri()) == local_path(f"file://localhost{path}") == path
    for url in ("s3://b/a", "file://elsewhere/a"):
        with pytest.raises(ValueError, match=r"local|three slashes"):
            local_path(url)
