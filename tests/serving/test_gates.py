"""What servers of each version can do: the table, held against the embedded server's own schema."""

import re

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from gpuops.errors import InputError
from gpuops_serving.binary import find_tritonserver
from gpuops_serving.gates import FIELDS, FIXED, GATES, MAY_2026, parse_version, require, security_warnings, supports

VERSIONS = st.tuples(st.integers(2, 3), st.integers(40, 90), st.integers(0, 3))
TWO = st.tuples(VERSIONS, VERSIONS).map(sorted)


def text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def embedded_schema() -> descriptor_pb2.FileDescriptorProto:
    """The descriptor of config.pbtxt that protobuf's generated code keeps in the server's binary."""
    data = find_tritonserver().resolve().read_bytes()
    name = b"model_config.proto"
    for found in re.finditer(re.escape(b"\x0a" + bytes([len(name)]) + name), data):
        # Fields of a descriptor follow each other; what is no field any more is behind its end.
        for end in field_ends(data, found.start()):
            try:
                schema = descriptor_pb2.FileDescriptorProto.FromString(data[found.start() : end])
            except DecodeError:
                continue
            if any(message.name == "ModelConfig" for message in schema.message_type):
                return schema
    pytest.fail("the server's binary holds no schema of config.pbtxt")


def field_ends(data: bytes, start: int) -> list[int]:
    """Where the length-delimited fields from `start` on end, the last first."""
    ends, place = [], start
    while data[place] & 7 == 2:
        length, shift = 0, 0
        place += 1
        while True:
            length |= (data[place] & 127) << shift
            shift += 7
            place += 1
            if not data[place - 1] & 128:
                break
        place += length
        if place > start + 100_000:
            break
        ends.append(place)
    return ends[::-1]


def fields(messages: object, package: str) -> set[str]:
    found: set[str] = set()
    for message in messages:  # type: ignore[attr-defined]
        name = f"{package}.{message.name}"
        found |= {f"{name}.{field.name}" for field in message.field} | {name}
        found |= fields(message.nested_type, name)
    return found


def test_the_fields_that_the_embedded_server_lacks_are_the_gated_ones() -> None:
    schema = embedded_schema()
    has = fields(schema.message_type, schema.package)
    newest = descriptor_pb2.FileDescriptorProto()
    model_config_pb2.DESCRIPTOR.CopyToProto(newest)
    knows = fields(newest.message_type, newest.package)
    assert has < knows
    lacks = {name for name in knows - has if name.rpartition(".")[0] in has}
    assert lacks == {name for name, gate in FIELDS.items() if not supports(gate, "2.51.0")} == set(FIELDS)


@given(st.sampled_from(sorted(GATES)), TWO)
def test_what_a_server_can_do_a_newer_one_can(feature: str, versions: list[tuple[int, int, int]]) -> None:
    older, newer = map(text, versions)
    assert supports(feature, older) <= supports(feature, newer)


@given(TWO)
def test_a_newer_server_has_no_more_to_be_warned_of(versions: list[tuple[int, int, int]]) -> None:
    older, newer = (security_warnings(text(version)) for version in versions)
    assert len(older) >= len(newer)


@pytest.mark.parametrize("feature", GATES)
def test_a_gate_opens_with_its_own_version_and_names_the_container_before(feature: str) -> None:
    gate = GATES[feature]
    assert supports(feature, text(gate.since))
    require(feature, text(gate.since))
    major, minor, patch = gate.since
    before = text((major, minor, patch - 1) if patch else (major, minor - 1, 9))
    assert not supports(feature, before)
    with pytest.raises(InputError, match=rf"Triton {re.escape(before)} has no .*container {re.escape(gate.container)}"):
        require(feature, before)


def test_the_container_of_a_gate_is_as_old_as_its_version() -> None:
    gates = sorted([*GATES.values(), FIXED], key=lambda gate: gate.since)
    assert [gate.container for gate in gates] == sorted(gate.container for gate in gates)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.51.0", "older than the fixes of CVE-2025-23310.*foreign code"),
        ("2.59.0", "older than the fixes"),
        ("2.59.1", "older than May 2026"),
        ("2.69.5", "older than May 2026"),
    ],
)
def test_an_old_server_is_warned_of(version: str, says: str) -> None:
    (warning,) = security_warnings(version)
    assert re.search(says, warning)


def test_a_server_from_after_the_last_known_hole_is_not() -> None:
    assert security_warnings(text(MAY_2026)) == []


@pytest.mark.parametrize("version", ["", "latest", "v2.51", "2"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=r"write it as Triton does, such as 2\.71\.0"):
        parse_version(version)
    assert parse_version("2.71") == (2, 71, 0)
    assert parse_version("2.73.0dev") == (2, 73, 0)
