"""What `lint` may find, by stable codes, and what its rules look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gpuops_serving.config import CONFIG, ENSEMBLE, WARMUP
from gpuops_serving.pbtxt import Field, find, read

ERROR, WARNING = "error", "warning"

RULES = {
    "GT001": (WARNING, "the server is older than a known security fix"),
    "GT002": (WARNING, "whoever reaches the server can load models, which is running code"),
    "GT003": (WARNING, "model control mode poll takes up half-written models"),
    "GT004": (WARNING, "a port is open on every network interface"),
    "GT005": (ERROR, "a flag that the server does not take so"),
    "GT101": (ERROR, "config.pbtxt is not in protobuf's text format"),
    "GT102": (ERROR, "a field that config.pbtxt does not have"),
    "GT103": (ERROR, "a field, platform or type that the server does not have yet"),
    "GT104": (ERROR, "`name` differs from the folder"),
    "GT105": (ERROR, "no backend is named, and no file tells it"),
    "GT106": (ERROR, "inputs, outputs or the whole config.pbtxt are missing, and nothing completes them"),
    "GT107": (WARNING, "the server is left to complete the configuration"),
    "GT108": (WARNING, "a response cache, and no `--cache-config`"),
    "GT109": (WARNING, "a rate limiter, and no `--rate-limit`"),
    "GT110": (WARNING, "a repository agent, which must be installed in the server"),
    "GT201": (ERROR, "a tensor has no name, data_type or dims"),
    "GT202": (ERROR, "a dimension is neither positive nor -1"),
    "GT203": (ERROR, "reshape holds another number of elements"),
    "GT204": (ERROR, "max_batch_size is negative"),
    "GT205": (WARNING, "dynamic batching of a model without a batch axis"),
    "GT206": (ERROR, "a preferred batch is not from 1 to max_batch_size"),
    "GT207": (WARNING, "two tensors of one name"),
    "GT208": (ERROR, "torch_aoti does not know a tensor by this name"),
    "GT301": (ERROR, "a priority beyond the priority levels"),
    "GT302": (ERROR, "preserve_ordering together with what changes the order"),
    "GT303": (ERROR, "a response cache for sequences or a decoupled model"),
    "GT304": (WARNING, "dynamic batching of a decoupled model"),
    "GT305": (ERROR, "a control input of sequences is wrong"),
    "GT306": (ERROR, "minimum_slot_utilization is not from 0 to 1"),
    "GT307": (WARNING, "priorities without priority levels"),
    "GT401": (ERROR, "instances on a GPU that is not there"),
    "GT402": (ERROR, "GPUs named for instances that run on none"),
    "GT403": (WARNING, "instances on the CPU of a server with GPUs"),
    "GT404": (ERROR, "a TensorRT profile for another backend"),
    "GT501": (ERROR, "a folder of the repository that is no model"),
    "GT502": (ERROR, "no version to serve"),
    "GT503": (ERROR, "a folder that the server takes for a version, such as 2.bak"),
    "GT504": (WARNING, "a folder that is no version, and is ignored"),
    "GT505": (WARNING, "version_policy names a version that is not there"),
    "GT506": (ERROR, "the backend's file is missing in a version"),
    "GT507": (ERROR, "a file that the configuration names is missing"),
    "GT508": (ERROR, "a warm-up request that the model would refuse"),
    "GT509": (WARNING, "bytecode in a version folder"),
    "GT510": (WARNING, "everybody may change the model"),
    "GT601": (WARNING, "a Python model gives or takes NumPy arrays, which NumPy 2 breaks silently"),
    "GT602": (ERROR, "model.py cannot be run as a Python model"),
    "GT603": (ERROR, "model.py uses what the server does not have yet"),
    "GT604": (WARNING, "the Python environment is not there"),
    "GT701": (ERROR, "an ensemble is not complete, or has what only its steps can have"),
    "GT702": (ERROR, "a step's model is not in the repository"),
    "GT703": (ERROR, "a step's version is not served"),
    "GT704": (ERROR, "a step maps a tensor that its model does not have, or leaves one out"),
    "GT705": (ERROR, "a tensor of an ensemble is never written, written twice, or never used"),
    "GT706": (ERROR, "a tensor of an ensemble has two types or shapes"),
    "GT707": (ERROR, "an ensemble takes larger batches than a step"),
}
"""Severity and meaning by code. A code never changes its meaning."""

_BACKENDS = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
}
"""Backend by platform."""
_FILES = {
    "onnxruntime": "model.onnx",
    "tensorrt": "model.plan",
    "pytorch": "model.pt",
    "python": "model.py",
    "openvino": "model.xml",
    "vllm": "model.json",
    "dali": "model.dali",
}
"""The file that a backend looks for in a version folder; others are not known here."""
AOTI_FILE = "model.pt2"
_NUMBER = re.compile(r"\s*[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a server would refuse, or a known trap."""

    code: str
    """Stable code of the rule, as in `RULES`."""
    severity: str
    """"error": the server refuses it or it never works; "warning": it may do what is not meant."""
    place: str
    """File below the repository, with the line where there is one."""
    message: str
    """What is wrong, and what to do."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def found(code: str, place: str, message: str) -> Finding:
    """A finding of the rule with this code."""
    return Finding(code, RULES[code][0], place, message)


@dataclass(frozen=True, slots=True)
class Server:
    """The server that a repository is meant for."""

    version: str
    """Its version, as Triton writes it."""
    gpus: int
    """How many GPUs it has."""
    flags: tuple[str, ...] | None
    """Its flags; None if they are not known."""

    def flag(self, name: str) -> str | None:
        """Value of a flag, empty if it has none; None if it is not set or the flags are not known."""
        for given in self.flags or ():
            if given == name or given.startswith(f"{name}="):
                return given.partition("=")[2]
        return None


@dataclass(frozen=True, slots=True)
class Model:
    """A folder of a repository, as a server reads it."""

    path: Path
    """The folder."""
    config: Any
    """Its configuration, ModelConfig protobuf, unknown fields left out; empty if there is none or it is broken."""
    fields: tuple[Field, ...]
    """The same as written; empty if there is none or it is broken."""
    parsed: bool
    """Whether there is a configuration that could be parsed."""
    error: str
    """Why not, if there is one that could not."""
    versions: tuple[int, ...]
    """Numbers of its version folders."""

    @property
    def name(self) -> str:
        """Name of the folder, which is the model's."""
        return self.path.name

    @property
    def backend(self) -> str:
        """Backend that the server would run it by; empty if nothing tells."""
        if self.config.platform == ENSEMBLE:
            return ENSEMBLE
        if self.config.backend:
            return str(self.config.backend)
        if self.config.platform:
            return _BACKENDS.get(self.config.platform, "")
        content = {path.name for number in self.versions for path in (self.path / str(number)).iterdir()}
        named = self.config.default_model_filename
        for backend, file in (*_FILES.items(), ("pytorch", AOTI_FILE)):
            if file == named or (not named and file in content):
                return backend
        return ""

    @property
    def aoti(self) -> bool:
        """Whether it is an AOTInductor package."""
        if self.config.platform:
            return bool(self.config.platform == "torch_aoti")
        files = {path.name for number in self.versions for path in (self.path / str(number)).iterdir()}
        return self.backend == "pytorch" and AOTI_FILE in files and "model.pt" not in files

    @property
    def file(self) -> str:
        """File that its backend looks for in a version folder; empty if that is not known."""
        default = AOTI_FILE if self.aoti else _FILES.get(self.backend, "")
        return str(self.config.default_model_filename) or default

    @property
    def served(self) -> tuple[int, ...]:
        """Numbers of the versions that are served."""
        policy = self.config.version_policy
        if policy.HasField("specific"):
            return tuple(number for number in self.versions if number in policy.specific.versions)
        if policy.HasField("all"):
            return self.versions
        count = policy.latest.num_versions if policy.HasField("latest") else 1
        return self.versions[len(self.versions) - min(count, len(self.versions)) :]

    def at(self, *path: str | int) -> str:
        """Where a field of its configuration stands."""
        field = find(self.fields, *path)
        place = f"{self.name}/{CONFIG}"
        return place if field is None else f"{place}:{field.place}"


def read_model(folder: Path) -> Model:
    """A model's folder with its configuration, however broken."""
    config, fields, parsed, error = model_config_pb2.ModelConfig(), tuple[Field, ...](), False, ""
    try:
        text = (folder / CONFIG).read_text()
        text_format.Parse(text, config, allow_unknown_field=True)
        fields, parsed = read(text), True
    except FileNotFoundError:
        pass
    except (text_format.ParseError, ValueError, OSError) as problem:
        error = str(problem) or type(problem).__name__
        config = model_config_pb2.ModelConfig()
    versions = sorted(int(path.name) for path in version_folders(folder) if path.name.isascii() and path.name.isdigit())
    return Model(folder, config, fields, parsed, error, tuple(versions))


def version_folders(folder: Path) -> Iterable[Path]:
    """Folders in a model's folder that the server takes for versions: it reads a number and ignores what follows it."""
    for path in other_folders(folder):
        name = path.name
        if _NUMBER.match(name) and not (len(name) > 1 and name.startswith("0")):
            yield path


def other_folders(folder: Path) -> Sequence[Path]:
    """Folders in a model's folder that may be versions."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in (WARMUP, "initial_state"))
