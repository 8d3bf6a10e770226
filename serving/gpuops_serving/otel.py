"""Version ids in OpenTelemetry traces: attributes for the server's spans and for a client's own.

Triton's spans say `triton.model_name` and `triton.model_version`; what these are, its resource attributes say. They are
given at start, so a version that is loaded later is not among them: `gpuops_version_info` of the exporter has it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuops.errors import InputError
from gpuops_serving.work import Key

VERSION_ID = "gpuops.version_id"
MODEL = "gpuops.model.name"
MODEL_VERSION = "gpuops.model.version"


def resource_attributes(
    version_ids: Mapping[Key, str], *, service: str = "triton", server_version: str | None = None, namespace: str = ""
) -> dict[str, str]:
    """What a server's spans say of the server.

    Args:
        version_ids: Version id by (model, version), as `ServerMeter.version_ids` or a repository has them.
        service: `service.name`.
        server_version: `service.version`, such as 2.71.0.
        namespace: `service.namespace`, the same as the exporter's.

    Returns:
        The service's names, `gpuops.version_id.<model>.<version>` for each version, and `gpuops.version_id` where there
        is only one.
    """
    found = {"service.name": service}
    if server_version is not None:
        found["service.version"] = server_version
    if namespace:
        found["service.namespace"] = namespace
    found |= {f"{VERSION_ID}.{model}.{version}": id for (model, version), id in sorted(version_ids.items())}
    if len(version_ids) == 1:
        found[VERSION_ID] = next(iter(version_ids.values()))
    return found


def span_attributes(model: str, version: str, version_id: str | None) -> dict[str, str]:
    """What a client's own span of a request says; `version` is that of `Answer`, the one that answered."""
    known = {} if version_id is None else {VERSION_ID: version_id}
    return {MODEL: model, MODEL_VERSION: version, **known}


def opentelemetry_flags(url: str, attributes: Mapping[str, str], *, rate: int = 1) -> list[str]:
    """Flags of tritonserver that send spans to a collector; its trace mode is then not that of `trace_flags`.

    Args:
        url: OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; Triton speaks nothing else.
        attributes: Resource attributes.
        rate: One request in so many is traced, unless the client's own span is (W3C trace context).

    Raises:
        InputError: no such URL, an attribute's name with "=" in it, or a rate below 1.
    """
    if not url.startswith(("http://", "https://")) or rate < 1:
        raise InputError(f"{url!r}, rate {rate}: an OTLP/HTTP URL and a rate of at least 1")
    for name in attributes:
        if not name or "=" in name:
            raise InputError(f"attribute {name!r} cannot be handed to Triton: choose a name without '='")
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={rate}",
        f"--trace-config=opentelemetry,url={url}",
        *(f"--trace-config=opentelemetry,resource={name}={value}" for name, value in attributes.items()),
    ]
