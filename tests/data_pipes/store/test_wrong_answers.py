"""Servers that answer with something else than the object: each is a sentence that says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_pipes.store.errors import AccessDeniedError, StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.transport import StorageConfig


class _Answers(BaseHTTPRequestHandler):
    """/loop redirects to itself; /login sends everybody to a page; /page is that page."""

    def do_GET(self) -> None:
        if self.path.startswith(("/loop", "/login")):
            self.send_response(302)
            self.send_header("Location", "/page" if self.path.startswith("/login") else self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        page = b"<html><form>Please log in</form></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def storage() -> Iterator[Storage]:
    opened = Storage(StorageConfig(retries=0))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ["shard-000000.tar", "manifest.json", "index.npz"])
def test_a_login_page_is_no_truncated_shard(server: str, storage: Storage, name: str) -> None:
    with pytest.raises(AccessDeniedError, match=rf"{name}: the server answers with a web page .*/page.* a login page"):
        storage.read_whole(f"{server}/login/{name}", 1 << 20)
    with pytest.raises(AccessDeniedError, match="a login page"):
        storage.info(f"{server}/login/{name}")


def test_redirects_in_a_circle(server: str, storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"/loop/a.tar: the server redirects in a circle"):
        storage.info(f"{server}/loop/a.tar")
    with pytest.raises(StorageError, match=r"redirects in a circle"):
        storage.read_whole(f"{server}/loop/a.tar", 1 << 20)
