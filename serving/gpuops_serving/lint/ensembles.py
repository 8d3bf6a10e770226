"""Rules about ensembles: what they are themselves, and how they fit the models that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tritonclient.grpc import model_config_pb2

from gpuops_serving.config import ENSEMBLE
from gpuops_serving.lint.rules import Finding, Model, found

_STEPS = ("ensemble_scheduling", "step")


def ensemble_findings(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    """What is wrong with an ensemble.

    Args:
        model: It, or any other model, about which nothing is said.
        models: All of the repository, by name.
    """
    config = model.config
    ensemble, scheduled = config.platform == ENSEMBLE, config.HasField("ensemble_scheduling")
    if not ensemble and not scheduled:
        return
    yield from _itself(model)
    steps = config.ensemble_scheduling.step
    for place, step in enumerate(steps):
        if step.model_name and step.model_name in _upstream(step.model_name, models):
            yield found(
                "GT701", model.at(*_STEPS, place), f"{step.model_name!r} depends on itself: leave one of the steps out"
            )
        yield from _step(model, place, step, models)
    if ensemble and steps and all(step.model_name and step.input_map and step.output_map for step in steps):
        yield from _flow(model)
        yield from _types(model, models)


def _itself(model: Model) -> Iterator[Finding]:
    config = model.config
    if config.platform != ENSEMBLE:
        yield found("GT701", model.at("ensemble_scheduling"), f"steps need platform {ENSEMBLE!r}: write it")
    elif not config.HasField("ensemble_scheduling"):
        yield found("GT701", model.at("platform"), "an ensemble needs ensemble_scheduling: write its steps")
    elif not config.ensemble_scheduling.step:
        yield found("GT701", model.at("ensemble_scheduling"), "an ensemble needs a step: write one")
    has = {field.name for field, _ in config.ListFields()}
    for field in ("backend", "instance_group", "optimization", "model_warmup"):
        if field in has and config.platform == ENSEMBLE:
            yield found("GT701", model.at(field), f"an ensemble has no {field}: write it for its steps")


def _upstream(name: str, models: Mapping[str, Model]) -> set[str]:
    """Models that a model's answer depends on."""
    seen: set[str] = set()
    left = [name]
    while left:
        model = models.get(left.pop())
        for step in model.config.ensemble_scheduling.step if model is not None else ():
            if step.model_name not in seen:
                seen.add(step.model_name)
                left.append(step.model_name)
    return seen


def _step(model: Model, place: int, step: Any, models: Mapping[str, Model]) -> Iterator[Finding]:
    at = model.at(*_STEPS, place)
    lacks = [field for field in ("model_name", "input_map", "output_map") if not getattr(step, field)]
    if lacks:
        yield found("GT701", at, f"step {place} has no {', '.join(lacks)}: write it")
    if not step.model_name or step.model_namespace:
        return
    joined = models.get(step.model_name)
    if joined is None:
        yield found("GT702", at, f"{step.model_name!r} is not in this repository: put it there, or name another")
        return
    if step.model_version != -1 and step.model_version not in joined.served:
        left_out = " (a model_version that is left out)" if step.model_version == 0 else ""
        yield found(
            "GT703",
            at,
            f"version {step.model_version}{left_out} of {step.model_name!r} is not served ({list(joined.served)} are): "
            "name one of them, or -1 for the newest",
        )
    config = joined.config
    if not joined.parsed:
        return
    if model.config.max_batch_size > config.max_batch_size > 0:
        yield found(
            "GT707",
            model.at("max_batch_size"),
            f"max_batch_size is {model.config.max_batch_size}, and {step.model_name!r} takes {config.max_batch_size}: "
            "take the smallest of the steps",
        )
    for side, mapped, tensors in (("input", step.input_map, config.input), ("output", step.output_map, config.output)):
        names = {tensor.name for tensor in tensors}
        if not names:
            continue  # left to the server to complete
        for name in sorted(set(mapped) - names):
            yield found("GT704", at, f"{step.model_name!r} has no {side} {name!r}: it has {sorted(names)}")
    for tensor in config.input:
        if step.input_map and tensor.name not in step.input_map and not tensor.optional:
            yield found("GT704", at, f"input {tensor.name!r} of {step.model_name!r} gets nothing: map it")


def _flow(model: Model) -> Iterator[Finding]:
    """Whether every tensor is written once and used."""
    config, steps = model.config, model.config.ensemble_scheduling.step
    inputs = {tensor.name for tensor in config.input}
    written = set(inputs)
    for place, step in enumerate(steps):
        for name in sorted(step.output_map.values()):
            if name in written:
                yield found("GT705", model.at(*_STEPS, place), f"{name!r} is written twice: name one otherwise")
            written.add(name)
    read = {name for step in steps for name in step.input_map.values()}
    outputs = {tensor.name for tensor in config.output}
    for side, names in (("input", inputs - read), ("output", outputs - written)):
        for place, tensor in enumerate(getattr(config, side)):
            if tensor.name in names:
                what = "no step takes it" if side == "input" else "no step writes it"
                yield found("GT705", model.at(side, place), f"{side} {tensor.name!r}: {what}; map it, or leave it out")
    ready, waiting = set(inputs), list(enumerate(steps))
    while runs := [(place, step) for place, step in waiting if set(step.input_map.values()) <= ready]:
        ready |= {name for _, step in runs for name in step.output_map.values()}
        waiting = [entry for entry in waiting if entry not in runs]
    for place, step in waiting:
        absent = sorted(set(step.input_map.values()) - ready)
        why = "is written by nobody" if absent[0] not in written else "waits for this step itself"
        yield found("GT705", model.at(*_STEPS, place), f"{absent[0]!r} {why}: map a tensor that is there")
    for place, step in enumerate(steps):
        for name in sorted(set(step.output_map.values()) - read - outputs):
            yield found(
                "GT705", model.at(*_STEPS, place), f"{name!r} is written and never used: leave it out of output_map"
            )


def _types(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    """Whether all who name a tensor mean the same type and shape."""
    config = model.config
    known: dict[str, tuple[int, list[int], str]] = {}
    for tensor in (*config.input, *config.output):
        known[tensor.name] = (tensor.data_type, list(tensor.reshape.shape or tensor.dims), model.name)
    for place, step in enumerate(config.ensemble_scheduling.step):
        joined = models.get(step.model_name)
        if joined is None:
            continue
        for mapped, tensors in ((step.input_map, joined.config.input), (step.output_map, joined.config.output)):
            for tensor in tensors:
                name = mapped.get(tensor.name) if tensor.name in mapped else None
                if name is None:
                    continue
                here = (tensor.data_type, list(tensor.dims), joined.name)
                there = known.setdefault(name, here)
                batched = bool(config.max_batch_size) == bool(joined.config.max_batch_size)
                if here[0] != there[0] or (batched and not _alike(here[1], there[1])):
                    yield found(
                        "GT706",
                        model.at(*_STEPS, place),
                        f"{name!r} is {_told(here)} and {_told(there)}: join models that agree",
                    )


def _alike(one: list[int], other: list[int]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _told(tensor: tuple[int, list[int], str]) -> str:
    return f"{model_config_pb2.DataType.Name(tensor[0])} {tensor[1]} in {tensor[2]!r}"
