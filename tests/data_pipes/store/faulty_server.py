"""An HTTP server on loopback that serves a folder and fails on request: for tests, and for measurements by hand.

Enters: a folder, and which faults to make: a plan (the next request gets the next fault) or probabilities. Leaves: a
base URL and a log of all requests. `python tests/data_pipes/store/faulty_server.py FOLDER --delay 0.03` runs it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = (
    "ok",  # no fault
    "500",
    "502",
    "503",  # with Retry-After, if the server has retry_after
    "429",
    "400",
    "403",
    "404",
    "reset",  # the connection is closed instead of an answer
    "drop",  # closed in mid-body, after half of it
    "short",  # half a body, and headers that agree with it
    "hang",  # accepted and never answered
    "stall",  # half a body, then nothing
    "trickle",  # a byte at a time
    "ignore_range",  # 200 with the whole file
    "other_range",  # 206 with bytes from elsewhere
    "other_etag",
    "other_size",  # Content-Range or Content-Length of a longer file
    "unknown_total",  # Content-Range without the size
)


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    first: int | None  # of the Range asked for
    last: int | None
    fault: str
    time_s: float
    sent: int = 0
    """Bytes of body."""


@dataclass
class FaultyServer:
    """`with FaultyServer(folder) as server: ... server.url`. All fields may be changed while it runs."""

    folder: Path
    plan: deque[str] = field(default_factory=deque)
    """Faults of the next requests, in order of arrival; when it is empty, chances decide."""
    chances: Mapping[str, float] = field(default_factory=dict)
    """By fault, its probability; drawn from (seed, request, how often it was made), so the order of arrival does not
    matter."""
    seed: int = 0
    delay_s: float = 0.0
    """Seconds before every answer to a GET."""
    retry_after: str | None = None
    etags: str = "strong"
    """"strong", "weak" or "none"; without one, Last-Modified is there."""
    head: int = 200
    """Status that HEAD requests get."""
    log: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder, self.plan = Path(self.folder), deque(self.plan)
        unknown = {*self.plan, *self.chances} - set(FAULTS)
        assert not unknown, f"unknown faults {unknown}"
        self.stopping = threading.Event()
        self._times: Counter[tuple[Any, ...]] = Counter()
        self._lock = threading.Lock()
        self._active = self.max_active = 0

    def __enter__(self) -> FaultyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, port: int = 0) -> FaultyServer:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.faulty = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="faulty-server")
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.drop_connections()
        self._server.server_close()  # joins the threads of the requests

    @property
    def url(self) -> str:
        """Of the folder, without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def requests(self, method: str = "GET") -> list[Request]:
        with self._lock:
            return [request for request in self.log if request.method == method]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around an answer: the delay, and how many are under way at once."""
        with self._lock:
            self._active += 1
            self.max_active = max(self.max_active, self._active)
        try:
            if self.delay_s:
                self.stopping.wait(self.delay_s)
            yield
        finally:
            with self._lock:
                self._active -= 1

    def choose(self, request: Request) -> None:
        with self._lock:
            self.log.append(request)
            if self.plan and request.method == "GET":
                request.fault = self.plan.popleft()
                return
            place = (self.seed, request.method, request.path, request.first, request.last)
            self._times[place] += 1
            digest = hashlib.sha256(repr((place, self._times[place])).encode()).digest()
            draw = int.from_bytes(digest[:7], "big") / 2**56
            for fault, chance in self.chances.items():
                draw -= chance
                if draw < 0:
                    request.fault = fault
                    return


def start(folder: Path, plan: Iterable[str] = (), **options: Any) -> FaultyServer:
    """Starts a server; `.url` is its base, `.log` its requests; end it with `.stop()`."""
    return FaultyServer(folder, deque(plan), **options).start()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined by server_close
    request_queue_size = 128
    faulty: FaultyServer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Idle keep-alive connections would hold their threads."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.faulty = self.server.faulty

    def log_message(self, *_: object) -> None:
        pass

    def translate_path(self, path: str) -> str:
        self.directory = str(self.faulty.folder)
        return super().translate_path(path)

    def do_HEAD(self) -> None:
        request = self._begin()
        if self.faulty.head != 200 or request.fault.isdigit():
            self._error(self.faulty.head if self.faulty.head != 200 else int(request.fault))
        else:
            self._serve(request, with_body=False)

    def do_GET(self) -> None:
        request = self._begin()
        with self.faulty.counted():
            self._answer(request)

    def _answer(self, request: Request) -> None:
        if request.fault == "hang":
            self.close_connection = True
            self.faulty.stopping.wait(600)
        elif request.fault == "reset":
            self.close_connection = True
        elif request.fault.isdigit():
            self._error(int(request.fault))
        elif Path(self.translate_path(self.path)).is_dir():
            super().do_GET()
        else:
            self._serve(request)

    def do_PUT(self) -> None:
        self._begin()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        Path(self.translate_path(self.path)).write_bytes(data)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _begin(self) -> Request:
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2])) if asked else (None, None)
        request = Request(self.command, self.path, first, last, "ok", time.monotonic())
        self.faulty.choose(request)
        return request

    def _error(self, status: int) -> None:
        self.send_response(status)
        if self.faulty.retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", self.faulty.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self, request: Request, with_body: bool = True) -> None:
        try:
            file = open(self.translate_path(self.path), "rb")  # noqa: SIM115
        except OSError:
            self._error(404)
            return
        with file:
            size = file.seek(0, 2)
            fault, whole = request.fault, request.first is None or request.fault == "ignore_range"
            first = 0 if whole else request.first
            last = size - 1 if whole else min(request.last, size - 1)
            if not whole and first >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "short":
                last = first + max(1, (last - first + 1) // 2) - 1
            if fault == "other_range":
                first, last = first + 1, min(last + 1, size - 1)
            length = last - first + 1
            total = "*" if fault == "unknown_total" else size + (fault == "other_size")
            self.send_response(200 if whole else 206)
            if not whole:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.send_header("Content-Length", str(length + (whole and fault == "other_size")))
            self._send_version(fault)
            self.end_headers()
            self.wfile.flush()
            if with_body:
                file.seek(first)
                self._send_body(request, file, length)

    def _send_version(self, fault: str) -> None:
        stat = Path(self.translate_path(self.path)).stat()
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}{"-other" if fault == "other_etag" else ""}"'
        if self.faulty.etags != "none":
            self.send_header("ETag", f"W/{etag}" if self.faulty.etags == "weak" else etag)
        self.send_header("Last-Modified", formatdate(stat.st_mtime + (fault == "other_etag"), usegmt=True))

    def _send_body(self, request: Request, file: Any, length: int) -> None:
        if request.fault in ("drop", "stall"):
            self.close_connection = True
            length //= 2
        if request.fault == "trickle":
            while length and not self.faulty.stopping.wait(0.02):
                request.sent += self.connection.send(file.read(1))
                length -= 1
            return
        request.sent = self.connection.sendfile(file, file.tell(), length) if length else 0
        if request.fault == "stall":
            self.faulty.stopping.wait(600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every answer")
    arguments = parser.parse_args()
    server = FaultyServer(arguments.folder, delay_s=arguments.delay).start(arguments.port)
    print(server.url, flush=True)
    try:
        server.stopping.wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
