"""The deployment files as Python values, for the tests that hold them against schemas, the code and each other."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile.cuda").read_text()


def documents(folder: Path) -> list[dict[str, Any]]:
    return [found for file in sorted(folder.glob("*.yaml")) for found in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str = "gpuops-serving") -> dict[str, Any]:
    (found,) = (
        doc
        for folder in ("kubernetes", "kserve")
        for doc in documents(DEPLOY / folder)
        if doc["kind"] == kind and doc.get("metadata", {}).get("name") == name
    )
    return found


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def installed(name: str) -> str:
    """A tool of the dev group; there is no test without it."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found is not None, f"{name} is not installed: make setup"
    return found


def pod_of_runtime() -> dict[str, Any]:
    """What KServe makes of our ServingRuntime, as far as it is plain Kubernetes."""
    spec = one("ServingRuntime")["spec"]
    keys = ("containers", "volumes")
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {key: spec[key] for key in keys}}


def stages() -> dict[str, str]:
    """Text of each stage of Dockerfile.cuda."""
    parts = re.split(r"^FROM \$\{\w+\} AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def arguments() -> dict[str, str]:
    """The table of images at the top of Dockerfile.cuda."""
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))


def exec_form(instruction: str, text: str) -> list[str]:
    (found,) = re.findall(rf"^(?:    )?{instruction} (\[.*\])$", text, re.MULTILINE)
    words: list[str] = json.loads(found)
    return words
