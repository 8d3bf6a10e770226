"""What a server really serves of a model, held against what its folder in the repository says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from gpuops.errors import IntegrityError
from gpuops_serving.client import Client
from gpuops_serving.config import CONFIG, VERSION_ID, read_config
from gpuops_serving.probe import probe
from gpuops_serving.repository import served_versions_of


def read_back(client: Client, model: Path, name: str | None = None) -> None:
    """Compare what a server says of a model with the configuration in the repository.

    Everything that the file sets must be so in the server, and the server must serve these version ids and no others;
    what the server adds (defaults, names of instances) is its own.

    Args:
        client: Connection to the server.
        model: The model's folder.
        name: Model name; the folder's if None.

    Raises:
        InputError, UnavailableError: the server does not know the model, or is away.
        IntegrityError: it serves something else, as after a load with an overriding configuration, which sticks.
    """
    name = name or model.name
    wanted = read_config(model / CONFIG)
    found = json_format.ParseDict(client.raw_config(name), model_config_pb2.ModelConfig(), ignore_unknown_fields=True)
    differs = _differences(wanted, found)
    if _version_ids(wanted) != _version_ids(found):
        differs = ["version ids", *differs]
    if differs:
        raise IntegrityError(
            f"{client.url} serves {name!r} by another configuration than {model / CONFIG} ({', '.join(differs)}; an "
            "override at load time sticks): unload the model and load it again"
        )
    ready = {state.version for state in client.models() if state.name == name and state.state == "READY"}
    if missing := {str(v) for v in wanted.version_policy.specific.versions} - ready:
        raise IntegrityError(
            f"{client.url}: version {', '.join(sorted(missing))} of {name!r} is not ready: see the server's log, or "
            "deploy its bundle again"
        )


def prove(client: Client, model: Path, name: str | None = None) -> None:
    """Ask every version of a model that its folder says is served for its golden answers.

    Raises:
        InputError, UnavailableError, IntegrityError: as `probe`, for the first one that does not answer rightly.
    """
    for served in served_versions_of(model):
        probe(client, name or model.name, served.golden, served.tolerance, version=str(served.version))


def _version_ids(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items() if key.startswith(VERSION_ID)}


def _differences(wanted: Any, found: Any) -> list[str]:
    """Names of the fields that are set in one message and not so in another."""
    return [field.name for field, value in wanted.ListFields() if not _same(value, getattr(found, field.name))]


def _same(wanted: Any, found: Any) -> bool:
    """Whether a field's value is as wanted; a message may have more fields, a map more entries."""
    if isinstance(wanted, Message):
        return not _differences(wanted, found)
    if hasattr(wanted, "keys"):
        return all(key in found and _same(wanted[key], found[key]) for key in wanted)
    if hasattr(wanted, "__len__") and not isinstance(wanted, (str, bytes)):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    return bool(wanted == found)
