from pathlib import Path

import pytest
from tiny_bundle import SIGNATURE, golden

from gpuops.errors import InputError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.server import TritonServer
from gpuops_serving.shared_memory import PREFIX, SharedMemory

GOLDEN = golden()


def regions() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}*"))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_without_shared_memory_at_every_batch_size(server: TritonServer, protocol: str) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    with Client(url) as client:
        with SharedMemory(client, "tiny") as region:
            assert len(regions()) == 2
            kept = {}
            for size in [*range(1, SIGNATURE.max_batch + 1), 2]:
                batch = golden(seed=size).batch(size)
                kept[size] = (batch, region.infer(batch.inputs))
            for batch, found in kept.values():  # later requests use the same region
                assert batch.max_abs_diff(found) <= 1e-3
            with pytest.raises(InputError, match="split the request"):
                region.infer(GOLDEN.batch(SIGNATURE.max_batch + 1).inputs)
            with pytest.raises(InputError, match="out of data bounds"):
                region.infer({"a": GOLDEN.inputs["a"][:1], "m": GOLDEN.inputs["m"][:1] + 50})
        assert regions() == []
        with pytest.raises(InputError, match="closed"):
            region.infer(GOLDEN.batch(1).inputs)


def test_a_server_that_cannot_be_reached_leaves_no_region(tmp_path: Path, server: TritonServer) -> None:
    with Client(server.http_url) as client, Client("http://127.0.0.1:9", timeout_s=0.5) as nobody:
        config = client.config("tiny")
        nobody.config = lambda model, version="": config  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match="allow-client-shm"):
            SharedMemory(nobody, "tiny")
    assert regions() == []
