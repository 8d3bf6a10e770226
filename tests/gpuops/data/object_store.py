"""An S3-compatible endpoint on loopback, and a web server of files, for the tests that read from elsewhere."""

import functools
import http.server
import logging
import threading
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
import obstore.store
import pytest
from moto.server import ThreadedMotoServer

REGION = "us-east-1"


@dataclass(frozen=True)
class ObjectStorage:
    """A running endpoint; the AWS_* variables of this process point at it."""

    endpoint_url: str
    environment: Mapping[str, str]

    def bucket(self) -> str:
        """A new, empty bucket's URL, `s3://NAME`."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.endpoint_url}/{name}", method="PUT")
        with urllib.request.urlopen(request) as response:
            assert response.status == 200
        return f"s3://{name}"

    def upload(self, folder: Path, url: str) -> str:
        """Every file of a folder below a URL of a bucket; gives the URL back."""
        store = obstore.store.from_url(url)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            obstore.put(store, file.relative_to(folder).as_posix(), file.read_bytes())
        return url


@contextmanager
def running_s3() -> Iterator[ObjectStorage]:
    """The endpoint on a free port, with the environment that obstore and Icechunk read set to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.delenv("AWS_PROFILE", raising=False)
            yield ObjectStorage(environment["AWS_ENDPOINT_URL"], environment)
    finally:
        server.stop()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Files without a log; like most simple servers it knows no byte ranges."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_web(folder: Path) -> Iterator[str]:
    """`http://127.0.0.1:PORT` of a plain web server of files that ignores Range headers."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
