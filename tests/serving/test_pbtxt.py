"""Places in a config.pbtxt agree with what protobuf's own parser reads from it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from gpuops_serving.pbtxt import Field, find, present, read, unknown

CONFIGS = sorted((Path(__file__).parent / "configs").rglob("*.pbtxt"))
NAMES = st.text(max_size=6)
SIZES = st.integers(-(2**31), 2**31 - 1)


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A configuration with lists, maps, messages in messages, and every kind of value."""
    config = model_config_pb2.ModelConfig(name=draw(NAMES), max_batch_size=draw(SIZES))
    for tensor in (config.input, config.output):
        for _ in range(draw(st.integers(0, 3))):
            made = tensor.add(
                name=draw(NAMES), data_type=draw(st.integers(0, 14)), dims=draw(st.lists(SIZES, max_size=3))
            )
            if draw(st.booleans()):
                made.reshape.shape.extend(draw(st.lists(SIZES, max_size=2)))
    if draw(st.booleans()):
        config.dynamic_batching.SetInParent()
        for level in draw(st.sets(st.integers(1, 3))):
            config.dynamic_batching.priority_queue_policy[level].allow_timeout_override = True
    for key in draw(st.sets(st.text(min_size=1, max_size=6), max_size=3)):
        config.parameters[key].string_value = draw(NAMES)
    if draw(st.booleans()):
        control = config.sequence_batching.control_input.add(name=draw(NAMES)).control.add()
        control.fp32_false_true.extend(draw(st.lists(st.floats(width=32, allow_nan=False), max_size=2)))
    return config


def written(message: Any, name: str) -> Counter[str]:
    """How often protobuf has each field, by full name; a list of plain values counts once for each value."""
    found: Counter[str] = Counter()
    for descriptor, value in message.ListFields():
        full = f"{name}.{descriptor.name}"
        if descriptor.message_type is None:
            found[full] += len(value) if descriptor.is_repeated else 1
        elif descriptor.message_type.GetOptions().map_entry:
            for key, entry in value.items():
                found[full] += 1
                inner = descriptor.message_type
                found[f"{inner.full_name}.key"] += 1
                found[f"{inner.full_name}.value"] += 1
                if inner.fields_by_name["value"].message_type is not None:
                    found += written(entry, inner.fields_by_name["value"].message_type.full_name)
                assert key is not None
        else:
            for entry in value if descriptor.is_repeated else [value]:
                found[full] += 1
                found += written(entry, descriptor.message_type.full_name)
    return found


@settings(max_examples=80, deadline=None)
@given(configs(), st.booleans(), st.booleans())
def test_every_field_that_protobuf_writes_is_found_once_at_its_name(config: Any, line: bool, short: bool) -> None:
    text = text_format.MessageToString(config, as_one_line=line, use_short_repeated_primitives=short)
    lines = text.split("\n")
    fields = read(text)
    descriptor = model_config_pb2.ModelConfig.DESCRIPTOR
    for name, field in present(fields, descriptor):
        assert lines[field.line - 1][field.column - 1 :].startswith(name.rpartition(".")[2])
    counted = Counter(name for name, _ in present(fields, descriptor))
    if not short:
        assert counted == written(config, descriptor.full_name)
    assert list(unknown(fields, descriptor)) == []


@settings(max_examples=60, deadline=None)
@given(configs(), st.data())
def test_an_unknown_field_is_found_where_it_was_put(config: Any, data: st.DataObject) -> None:
    lines = text_format.MessageToString(config).split("\n")
    openings = [0, *(place + 1 for place, line in enumerate(lines) if line.endswith("{"))]
    at = data.draw(st.sampled_from(openings))
    lines.insert(at, "  surprise: 3")
    text = "\n".join(lines)
    text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=True)
    ((name, field),) = unknown(read(text), model_config_pb2.ModelConfig.DESCRIPTOR)
    assert (name.rpartition(".")[2], field.line, field.column) == ("surprise", at + 1, 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_our_golden_files_have_no_unknown_field(path: Path) -> None:
    assert list(unknown(read(path.read_text()), model_config_pb2.ModelConfig.DESCRIPTOR)) == []


BY_HAND = """# as people write it
name: 'by' "hand"; max_batch_size: -4,
input [
  { name: "a" dims: [ 1, 2 ] },
  {
    name: "b", dims: [ -1 ]
  }
]

  output: < name: "y" dims: 3 dims: 4 >
parameters: { key: "# no comment" value: { string_value: "{ [ : \\" ' ," } }
"""


def test_what_people_write_is_read_too() -> None:
    config = text_format.Parse(BY_HAND, model_config_pb2.ModelConfig())
    fields = read(BY_HAND)
    assert (config.name, config.max_batch_size) == ("byhand", -4)
    assert [(f.name, f.value, f.place) for f in fields[:2]] == [
        ("name", "byhand", "2:1"),
        ("max_batch_size", "-4", "2:20"),
    ]
    assert [(f.name, f.place) for f in fields[2:4]] == [("input", "4:3"), ("input", "5:3")]
    assert find(fields, "input", 1, "dims") == Field("dims", 6, 16, "")
    assert find(fields, "output", 0, "dims", 1) == Field("dims", 10, 31, "4")
    parameter = find(fields, "parameters")
    assert parameter is not None
    assert [(f.name, f.value) for f in parameter.fields] == [("key", "# no comment"), ("value", "")]


def test_what_is_not_there_is_the_nearest_that_is() -> None:
    fields = read(BY_HAND)
    assert find(fields, "backend") is None
    beyond = find(fields, "input", 1, "reshape", 0, "shape")
    assert beyond is not None
    assert beyond.place == "5:3"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab:{}[]<>,;\"'# \n-0")), max_size=20))
@example('a: "')
@example("a {")
@example("a: [ { }")
def test_whatever_is_read_ends_in_fields_or_a_value_error(text: str) -> None:
    try:
        found = read(text)
    except ValueError:
        return
    assert all(1 <= field.line <= text.count("\n") + 1 for field in found)
