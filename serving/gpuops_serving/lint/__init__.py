"""Read a model repository as a Triton server of some version would, and say what it would refuse or do unexpectedly.

    for finding in lint("models", "2.75.0", gpus=2):
        print(finding.place, finding.severity, finding.code, finding.message)

For any repository, ours or not, and any backend: nothing is run, and nothing but tritonclient's schema of config.pbtxt
is needed. The codes and what they mean are `lint.rules.RULES`; docs/serving-repository.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuops.errors import InputError
from gpuops_serving.gates import parse_version, security_warnings
from gpuops_serving.lint.config import config_findings
from gpuops_serving.lint.ensembles import ensemble_findings
from gpuops_serving.lint.files import file_findings
from gpuops_serving.lint.rules import Finding, Server, found, read_model

_ADDRESSES = ("--http-address", "--grpc-address", "--metrics-address")
_SERVER = "tritonserver"
"""Place of findings about the server itself."""


def lint(
    repository: str | Path, server_version: str, *, gpus: int = 0, flags: Sequence[str] | None = None
) -> list[Finding]:
    """Everything that is known to be wrong with a repository and a server, by place.

    Args:
        repository: Model repository.
        server_version: Version of the server that will read it, such as "2.75.0".
        gpus: How many GPUs that server has.
        flags: Its flags, such as ["--model-control-mode=explicit"]; if None, nothing is said of them, and what needs a
            flag is warned of.

    Raises:
        InputError: no folder there, or no version.
    """
    folder = Path(repository)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name a model repository")
    parse_version(server_version)
    server = Server(server_version, gpus, None if flags is None else tuple(flags))
    models = {path.name: read_model(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    findings = list(_server(server))
    for model in models.values():
        if model.name.startswith(".") or (not model.parsed and not model.error and not any(model.path.iterdir())):
            findings.append(
                found(
                    "GT501", model.name, f"the server takes every folder for a model, {model.name!r} too: move it out"
                )
            )
            continue
        findings += config_findings(model, server)
        findings += file_findings(model, server)
        findings += ensemble_findings(model, models)
    return sorted(findings, key=lambda finding: (finding.place.split(":")[0], _line(finding.place), finding.code))


def _line(place: str) -> tuple[int, ...]:
    return tuple(int(part) for part in place.split(":")[1:])


def _server(server: Server) -> Iterator[Finding]:
    """What is wrong with the server itself."""
    for warning in security_warnings(server.version):
        yield found("GT001", _SERVER, warning)
    if server.flags is None:
        return
    mode = server.flag("--model-control-mode")
    if mode == "poll":
        yield found(
            "GT003", _SERVER, "--model-control-mode=poll loads what is still being written: use none, or explicit"
        )
    restricted = [server.flag(name) or "" for name in ("--http-restricted-api", "--grpc-restricted-protocol")]
    if mode == "explicit" and not all("model-repository" in value for value in restricted):
        yield found(
            "GT002",
            _SERVER,
            "--model-control-mode=explicit lets whoever reaches a port load a model, which is code: restrict "
            "model-repository with --http-restricted-api and --grpc-restricted-protocol, or use none",
        )
    for name in _ADDRESSES:
        if server.flag(name) in (None, "0.0.0.0", "::"):
            yield found("GT004", _SERVER, f"the port is open to every network: set {name}=127.0.0.1, or a private one")
    if server.flag("--disable-auto-complete-config"):
        yield found("GT005", _SERVER, "--disable-auto-complete-config takes no value and ends the server: leave it out")
