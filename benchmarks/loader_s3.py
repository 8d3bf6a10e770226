"""An S3-compatible endpoint on loopback, in a process of its own: moto's server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import obstore
from obstore.store import S3Store

BUCKET = "bench"
START_S = 60
"""Seconds that the server may take to answer."""


def serve(stack: ExitStack) -> None:
    """Start the server, and tell every S3 client of this process and its children where it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
    }
    give_up = time.monotonic() + START_S
    while True:
        try:
            request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"the S3 endpoint did not start ({error}): is moto[server] installed?") from error
            time.sleep(0.1)


def upload(folder: Path, prefix: str) -> tuple[str, S3Store]:
    """Copy a folder's files into the bucket; their URL, and a client for it."""
    bucket = S3Store(BUCKET, prefix=prefix)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(bucket, str(path.relative_to(folder)), path)
    return f"s3://{BUCKET}/{prefix}", bucket
