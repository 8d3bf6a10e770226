"""Rules about one model's config.pbtxt, whatever else is in the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any

from tritonclient.grpc import model_config_pb2

from gpuops_serving.config import ENSEMBLE
from gpuops_serving.gates import FIELDS, GATES, supports
from gpuops_serving.lint.rules import Finding, Model, Server, found
from gpuops_serving.pbtxt import present, unknown

_COMPLETING = ("onnxruntime", "tensorrt", "openvino", "tensorflow")
"""Backends that can tell inputs and outputs from the model's file."""
_AOTI_NAME = re.compile(r"(ARGS|KWARGS|RESULT)\[.+\]|RESULT|(INPUT|OUTPUT)__[0-9]+")
_AOTI_ORDINAL = re.compile(r"(INPUT|OUTPUT)__[0-9]+")
_GROUP = model_config_pb2.ModelInstanceGroup
_CONTROL = model_config_pb2.ModelSequenceBatching.Control


def config_findings(model: Model, server: Server) -> Iterator[Finding]:
    """What is wrong with a model's configuration, in a server."""
    if model.error:
        line = re.match(r"(?:line )?([0-9]+)(?::([0-9]+))? ?:? ?", model.error)
        place = model.at() + (":" + ":".join(filter(None, line.groups())) if line else "")
        text = model.error[line.end() :] if line else model.error
        yield found("GT101", place, f"{text.rstrip('.')}: the server refuses the whole model; mend this line")
        return
    yield from _fields(model, server)
    yield from _identity(model, server)
    yield from _completeness(model, server)
    if model.parsed:
        yield from _tensors(model)
        yield from _batching(model)
        yield from _sequences(model)
        yield from _instances(model, server)
        yield from _features(model, server)


def _fields(model: Model, server: Server) -> Iterator[Finding]:
    descriptor = model_config_pb2.ModelConfig.DESCRIPTOR
    for name, field in unknown(model.fields, descriptor):
        short = name.removeprefix("inference.")
        yield found("GT102", f"{model.at()}:{field.place}", f"there is no {short}: the server refuses the whole model")
    for name, field in present(model.fields, descriptor):
        gate = FIELDS.get(name)
        if gate is not None and not supports(gate, server.version):
            yield found(
                "GT103",
                f"{model.at()}:{field.place}",
                f"Triton {server.version} has no {field.name} and refuses the whole model: leave it, or take container "
                f"{GATES[gate].container} or later",
            )


def _identity(model: Model, server: Server) -> Iterator[Finding]:
    config = model.config
    if config.name and config.name != model.name:
        yield found(
            "GT104", model.at("name"), f"name is {config.name!r} and the folder {model.name!r}: make them the same"
        )
    if model.parsed and not model.backend:
        if config.platform:
            message = f"platform {config.platform!r} is unknown: name a backend"
        else:
            message = "neither backend nor platform is named, and no file in a version tells which: name a backend"
        yield found("GT105", model.at("platform"), message)
    if model.aoti:
        yield from _aoti(model, server)


def _aoti(model: Model, server: Server) -> Iterator[Finding]:
    config = model.config
    if not supports("torch_aoti", server.version):
        gate = GATES["torch_aoti"]
        yield found(
            "GT103",
            model.at("platform"),
            f"Triton {server.version} runs no AOTInductor packages: take container {gate.container} or later, or run "
            "it from a Python model",
        )
        return
    if config.max_batch_size and not supports("aoti_batching", server.version):
        yield found(
            "GT103",
            model.at("max_batch_size"),
            f"Triton {server.version} has no batches in torch_aoti: set max_batch_size 0, or take container "
            f"{GATES['aoti_batching'].container} or later",
        )
    known = _AOTI_NAME if supports("aoti_names", server.version) else _AOTI_ORDINAL
    for side in ("input", "output"):
        for place, tensor in enumerate(getattr(config, side)):
            if not known.fullmatch(tensor.name):
                yield found(
                    "GT208",
                    model.at(side, place, "name"),
                    f"an AOTInductor package has no tensor {tensor.name!r}: name it {side.upper()}__{place}, or as its "
                    "call specification does (ARGS[0], KWARGS[x], RESULT[0]; from 26.05)",
                )
            if tensor.data_type == model_config_pb2.TYPE_BF16 and not supports("aoti_bf16", server.version):
                yield found(
                    "GT103",
                    model.at(side, place, "data_type"),
                    f"Triton {server.version} has no BF16 in torch_aoti: give it FP32, or take container "
                    f"{GATES['aoti_bf16'].container} or later",
                )


def _completeness(model: Model, server: Server) -> Iterator[Finding]:
    config = model.config
    if model.backend in ("", ENSEMBLE) or (model.parsed and config.input and config.output):
        return
    what = "inputs and outputs are" if model.parsed else "config.pbtxt is"
    place = model.at() if model.parsed else model.name
    off = server.flag("--disable-auto-complete-config") is not None
    completes = (model.backend in _COMPLETING and not model.aoti) or _completes_itself(model)
    if off or not completes:
        why = "--disable-auto-complete-config is set" if off and completes else "nothing completes them"
        message = f"{what} missing in {model.backend} model {model.name!r}, and {why}: write what it takes and answers"
        yield found("GT106", place, message)
    else:
        message = f"{what} left to the server, which guesses what batches there are too: write what is meant"
        yield found("GT107", place, message)


def _completes_itself(model: Model) -> bool:
    """Whether a Python model has what the server asks for its inputs and outputs."""
    files = (model.path / str(number) / model.file for number in model.served)
    return model.backend == "python" and any(
        "def auto_complete_config" in file.read_text(errors="replace") for file in files if file.is_file()
    )


def _tensors(model: Model) -> Iterator[Finding]:
    config = model.config
    if config.max_batch_size < 0:
        yield found(
            "GT204", model.at("max_batch_size"), "max_batch_size is negative: 0 is a model without a batch axis"
        )
    names: set[tuple[str, str]] = set()
    for side in ("input", "output"):
        for place, tensor in enumerate(getattr(config, side)):
            at, called = model.at(side, place), f"{side} {tensor.name or place!r}"
            lacks = [
                field
                for field, missing in (
                    ("name", not tensor.name),
                    ("data_type", tensor.data_type == model_config_pb2.TYPE_INVALID),
                    ("dims", not tensor.dims),
                )
                if missing
            ]
            if lacks:
                yield found("GT201", at, f"{called} has no {', '.join(lacks)}: write what the model takes")
            if tensor.name and (side, tensor.name) in names:
                yield found("GT207", model.at(side, place, "name"), f"there are two {called}: only one is used")
            names.add((side, tensor.name))
            yield from _shape(model, side, place, tensor)


def _shape(model: Model, side: str, place: int, tensor: Any) -> Iterator[Finding]:
    called = f"{side} {tensor.name or place!r}"
    for field, dims in (("dims", tensor.dims), ("reshape", tensor.reshape.shape)):
        if wrong := [dim for dim in dims if dim < 1 and dim != -1]:
            yield found(
                "GT202", model.at(side, place, field), f"{called} has {field} {wrong[0]}: a size, or -1 for any size"
            )
    if tensor.HasField("reshape") and not _reshapes(list(tensor.dims), list(tensor.reshape.shape)):
        yield found(
            "GT203",
            model.at(side, place, "reshape"),
            f"{called} of {list(tensor.dims)} cannot be reshaped to {list(tensor.reshape.shape)}: keep the elements",
        )


def _reshapes(dims: list[int], shape: list[int]) -> bool:
    """Whether both hold as many elements between their free dimensions."""

    def counts(sizes: list[int]) -> list[int]:
        parts: list[list[int]] = [[]]
        for size in sizes:
            if size == -1:
                parts.append([])
            else:
                parts[-1].append(size)
        return [prod(part) for part in parts]

    return counts(dims) == counts(shape)


def _batching(model: Model) -> Iterator[Finding]:
    config = model.config
    if not config.HasField("dynamic_batching"):
        return
    dynamic, at = config.dynamic_batching, model.at
    if config.max_batch_size == 0 and not dynamic.preferred_batch_size:
        yield found(
            "GT205", at("dynamic_batching"), "max_batch_size is 0, so nothing is joined: set it, or leave this out"
        )
    yield from _preferred(model, dynamic.preferred_batch_size, "dynamic_batching")
    levels = dynamic.priority_levels
    if levels and not 1 <= dynamic.default_priority_level <= levels:
        yield found(
            "GT301",
            at("dynamic_batching", "default_priority_level"),
            f"default_priority_level is {dynamic.default_priority_level} of {levels}: name 1 (most urgent) to {levels}",
        )
    for level in sorted(dynamic.priority_queue_policy):
        if levels and not 1 <= level <= levels:
            yield found(
                "GT301",
                at("dynamic_batching", "priority_queue_policy"),
                f"a queue policy for priority {level} of {levels}: name 1 to {levels}",
            )
    if not levels and (dynamic.default_priority_level or dynamic.priority_queue_policy):
        yield found("GT307", at("dynamic_batching"), "priorities do nothing without priority_levels: set it")
    if dynamic.preserve_ordering:
        policies = [dynamic.default_queue_policy, *dynamic.priority_queue_policy.values()]
        late = any(p.default_timeout_microseconds and p.timeout_action == p.DELAY for p in policies)
        if levels > 1 or late:
            what = "priorities" if levels > 1 else "late answers (DELAY)"
            yield found(
                "GT302", at("dynamic_batching", "preserve_ordering"), f"order cannot be kept with {what}: choose one"
            )
    if config.model_transaction_policy.decoupled:
        yield found(
            "GT304",
            at("dynamic_batching"),
            "the model is decoupled: requests are handed over together, but it must answer each one by itself, and "
            "clients need a gRPC stream; be sure that model.py does",
        )


def _preferred(model: Model, sizes: Any, *path: str) -> Iterator[Finding]:
    largest = model.config.max_batch_size
    for size in sizes:
        if size < 1 or size > largest:
            yield found(
                "GT206",
                model.at(*path, "preferred_batch_size"),
                f"preferred batch {size} is not from 1 to max_batch_size, {largest}: the server refuses the model",
            )


def _sequences(model: Model) -> Iterator[Finding]:
    config = model.config
    if not config.HasField("sequence_batching"):
        return
    sequence, at = config.sequence_batching, model.at
    yield from _preferred(model, sequence.oldest.preferred_batch_size, "sequence_batching", "oldest")
    if not 0.0 <= sequence.direct.minimum_slot_utilization <= 1.0:
        yield found(
            "GT306", at("sequence_batching", "direct", "minimum_slot_utilization"), "a share is from 0 to 1: write one"
        )
    kinds: set[int] = set()
    for place, entry in enumerate(sequence.control_input):
        for control in entry.control:
            if wrong := _control(control, kinds):
                yield found("GT305", at("sequence_batching", "control_input", place), f"{entry.name!r} {wrong}")
            kinds.add(control.kind)
        if not entry.name:
            yield found(
                "GT305", at("sequence_batching", "control_input", place), "a control input has no name: name it"
            )


def _control(control: Any, kinds: set[int]) -> str:
    """What is wrong with a control of sequences."""
    name = _CONTROL.Kind.Name(control.kind)
    if control.kind in kinds:
        return f"is a second {name}: one input tells it"
    if control.kind == _CONTROL.CONTROL_SEQUENCE_CORRID:
        allowed = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")
        if model_config_pb2.DataType.Name(control.data_type) not in allowed:
            return f"gives {name} as {model_config_pb2.DataType.Name(control.data_type)}: use {', '.join(allowed)}"
        return ""
    values = [v for v in (control.int32_false_true, control.fp32_false_true, control.bool_false_true) if len(v)]
    if len(values) != 1 or len(values[0]) != 2:
        return f"needs two values for {name}, as int32_false_true: [ 0, 1 ]"
    return ""


def _instances(model: Model, server: Server) -> Iterator[Finding]:
    config = model.config
    for place, group in enumerate(config.instance_group):
        at = model.at("instance_group", place)
        if group.kind == _GROUP.KIND_GPU:
            absent = [gpu for gpu in group.gpus if gpu >= server.gpus]
            if not server.gpus or absent:
                has = f"the server has {server.gpus}" if server.gpus else "the server has none (--gpus says how many)"
                which = f"GPU {absent[0]}" if absent else "a GPU"
                yield found("GT401", at, f"instances on {which}, and {has}: name one that is there, or KIND_CPU")
        elif group.gpus and group.kind in (_GROUP.KIND_CPU, _GROUP.KIND_MODEL):
            yield found("GT402", at, "GPUs are named and the kind is not KIND_GPU: leave them, or change the kind")
        elif group.kind == _GROUP.KIND_CPU and server.gpus:
            yield found("GT403", at, f"instances on the CPU, and the server has {server.gpus} GPUs: is that meant?")
        if group.profile and model.backend != "tensorrt":
            yield found("GT404", at, f"{model.backend} has no profiles: leave it out")


def _features(model: Model, server: Server) -> Iterator[Finding]:
    config = model.config
    if config.response_cache.enable:
        reason = "of a decoupled model" if config.model_transaction_policy.decoupled else ""
        reason = "of sequences" if config.HasField("sequence_batching") else reason
        if reason:
            yield found("GT303", model.at("response_cache"), f"answers {reason} cannot be cached: leave it out")
        elif server.flag("--cache-config") is None:
            yield found(
                "GT108",
                model.at("response_cache"),
                "without --cache-config=local,size=BYTES nothing is cached, nor is that said: start the server with it",
            )
    for place, group in enumerate(config.instance_group):
        if group.HasField("rate_limiter") and server.flag("--rate-limit") in (None, "off"):
            yield found(
                "GT109",
                model.at("instance_group", place, "rate_limiter"),
                "it does nothing without --rate-limit=execution_count: start the server with it",
            )
    for place, agent in enumerate(config.model_repository_agents.agents):
        yield found(
            "GT110",
            model.at("model_repository_agents", "agents", place),
            f"a server without agent {agent.name!r} refuses the model: check the model before it is put here instead",
        )
