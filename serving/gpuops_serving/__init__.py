"""Serving: from a verified bundle to a Triton endpoint that proves what it serves.

    deploy         bundle -> model repository              gpuops_serving.repository
    TritonServer   the real tritonserver, on loopback      gpuops_serving.server
    Client         HTTP or gRPC                            gpuops_serving.client
    probe          golden request against a live server    gpuops_serving.probe

Importing this package imports nothing else; a name is loaded when it is first used (PEP 562). `probe` is not among the
lazy names: a function called like its own module would be replaced by the module as soon as that is imported.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuops_serving.aio import AsyncClient as AsyncClient
    from gpuops_serving.client import Client as Client
    from gpuops_serving.repository import deploy as deploy
    from gpuops_serving.server import TritonServer as TritonServer
    from gpuops_serving.triton import Triton as Triton

_HOME = {
    "AsyncClient": "gpuops_serving.aio",
    "Client": "gpuops_serving.client",
    "Triton": "gpuops_serving.triton",
    "TritonServer": "gpuops_serving.server",
    "deploy": "gpuops_serving.repository",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'gpuops_serving' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
