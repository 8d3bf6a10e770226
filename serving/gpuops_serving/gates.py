"""What a Triton server of some version can do: the one table, and the oldest version that is still safe.

Versions are from release notes and release branches; `container` is NVIDIA's image tag. A configuration that uses what
a server does not know is refused by it as a whole, with the reason on its stderr only, so it is refused here first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpuops.errors import InputError

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Gate:
    """Something that servers have from some version on."""

    since: Version
    """First version that has it."""
    container: str
    """First container that has it, year.month."""
    what: str
    """What it is."""


GATES = {
    "model_metrics": Gate((2, 52, 0), "24.11", "`model_metrics` in config.pbtxt"),
    "response_parameters": Gate((2, 55, 0), "25.02", "response parameters of the python backend"),
    "max_inflight_requests": Gate((2, 63, 0), "25.11", "`max_inflight_requests` of an ensemble"),
    "torch_aoti": Gate((2, 67, 0), "26.03", "platform torch_aoti (AOTInductor packages)"),
    "is_ready": Gate((2, 67, 0), "26.03", "`is_ready` of the python backend"),
    "aoti_names": Gate((2, 69, 0), "26.05", "tensor names of torch_aoti from the call specification"),
    "aoti_batching": Gate((2, 71, 0), "26.07", "batches in torch_aoti"),
    "aoti_bf16": Gate((2, 75, 0), "26.11", "BF16 tensors of torch_aoti"),
}

FIELDS = {
    "inference.ModelConfig.model_metrics": "model_metrics",
    "inference.ModelEnsembling.max_inflight_requests": "max_inflight_requests",
}
"""Feature by field of config.pbtxt (its full name) that servers from 2.51 on did not all have. The embedded server's
own schema was compared with that of tritonclient: it lacks these and no others."""

SHARED_MEMORY_OFF = Gate((2, 68, 0), "26.04", "client shared memory is off unless --allow-client-shm")
FIXED = Gate((2, 59, 1), "25.07", "the fixes of CVE-2025-23310, -23311, -23319, -23320 and -23334")
"""Last known fix of remote code execution. CVE-2026-24206 and -24207 (authentication bypass, May 2026) hit later
versions too; which version fixes them is not established here, so only the newest container is to be trusted."""
MAY_2026 = (2, 70, 0)
"""First version released after those two became known (container 26.06)."""


def parse_version(text: str) -> Version:
    """(2, 51, 0) from "2.51.0"; InputError if it is none."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if found is None:
        raise InputError(f"{text!r} is not a server version: write it as Triton does, such as 2.71.0")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def supports(feature: str, version: str) -> bool:
    """Whether a server of `version` has a feature of `GATES`."""
    return parse_version(version) >= GATES[feature].since


def require(feature: str, version: str) -> None:
    """Raise InputError, naming the container to take, unless a server of `version` has a feature of `GATES`."""
    if not supports(feature, version):
        gate = GATES[feature]
        raise InputError(
            f"Triton {version} has no {gate.what}: take container {gate.container} "
            f"({'.'.join(map(str, gate.since))}) or later, and name it with --server-version"
        )


def security_warnings(version: str) -> list[str]:
    """What is known to be wrong with running a server of `version` where others can reach it."""
    found = parse_version(version)
    if found < FIXED.since:
        return [
            f"Triton {version} is older than {FIXED.what}: it can be made to run foreign code; loopback only, and take "
            "NVIDIA's newest container for anything else"
        ]
    if found < MAY_2026:
        return [
            f"Triton {version} is older than May 2026, when CVE-2026-24206 and -24207 (authentication bypass) became "
            "known: take NVIDIA's newest container"
        ]
    return []
