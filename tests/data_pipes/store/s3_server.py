"""An S3 server on loopback (moto's), and the environment with which s3fs finds it: for tests.

Enters: nothing. Leaves: an endpoint with one bucket; in the environment its address and made-up credentials, so that
processes started meanwhile reach it too. Why the environment: it is the way that users configure it.
"""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "tessera-test"
"""Names with a dot or upper case would need another address style."""


@contextmanager
def s3_server(objects: Mapping[str, bytes | Path] | None = None) -> Iterator[str]:
    """Serves `objects` (key -> content, or the file that holds it); yields the bucket's URL, `s3://BUCKET`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    )
    try:
        put_objects({} if objects is None else objects)
        yield f"s3://{BUCKET}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        # moto keeps its buckets for the whole process
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        server.stop()
        assert server._server is not None
        server._server.server_close()


def put_objects(objects: Mapping[str, bytes | Path]) -> None:
    """Writes objects by plain boto3, beside the code under test."""
    client = boto3.client("s3", config=Config(retries={"total_max_attempts": 1}))
    try:
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        for key, content in objects.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            client.put_object(Bucket=BUCKET, Key=key, Body=data)
    finally:
        client.close()
