"""Servers that misbehave, over real sockets: plain TCP ones, and a KServe gRPC service that says what it is told."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

Behaviour = Callable[[socket.socket, int], None]


@contextmanager
def listener(behaviour: Behaviour) -> Iterator[tuple[str, list[int]]]:
    """A TCP server that treats its n-th connection as it is told; yields HOST:PORT and the connections so far."""
    seen: list[int] = []
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def treat(connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            behaviour(connection, number)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                seen.append(len(seen))
                connections.append(connection)
                threads.append(threading.Thread(target=treat, args=(connection, seen[-1]), daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads.append(threading.Thread(target=accept, daemon=True))
        threads[0].start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", seen
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in connections:  # gRPC may keep one that it has given up
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(30)


def reply(connection: socket.socket, body: bytes, status: bytes = b"200 OK", length: int | None = None) -> None:
    """Read a request and answer it in one piece, claiming `length` bytes."""
    connection.recv(65536)
    connection.sendall(
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (status, len(body) if length is None else length, body)
    )


def close(connection: socket.socket, number: int) -> None:
    """Hang up on a request."""
    connection.recv(65536)


def reset(connection: socket.socket, number: int) -> None:
    """Break off as a killed process does."""
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silence(connection: socket.socket, number: int) -> None:
    """Say nothing until the other side hangs up."""
    while connection.recv(65536):
        pass


class KServe(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A model server of one model, whose answers are given."""

    def __init__(self, config: model_config_pb2.ModelConfig, answer: Callable[[Any, Any, int], Any]) -> None:
        self.config, self.answer = config, answer
        self.asked: list[Any] = []

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return self.answer(request, context, len(self.asked) - 1)

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


@contextmanager
def kserve(service: KServe, port: int = 0) -> Iterator[str]:
    """Serve it; yields its URL."""
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait(30)


def tensor(name: str, datatype: str, shape: list[int], content: bytes) -> tuple[Any, bytes]:
    """An output and its bytes."""
    found = service_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return found, content


def response(*outputs: tuple[Any, bytes], version: str = "1") -> Any:
    """An answer of these outputs."""
    found = service_pb2.ModelInferResponse(model_name="m", model_version=version)
    for output, content in outputs:
        found.outputs.append(output)
        found.raw_output_contents.append(content)
    return found


def one_model(kind: str = "TYPE_FP32", dims: tuple[int, ...] = (2,), batch: int = 4) -> model_config_pb2.ModelConfig:
    """A model `m` from float32 x [2] to y of some type."""
    config = model_config_pb2.ModelConfig(name="m", max_batch_size=batch)
    config.input.add(name="x", data_type=model_config_pb2.TYPE_FP32, dims=[2])
    config.output.add(name="y", data_type=model_config_pb2.DataType.Value(kind), dims=dims)
    return config
