"""HTTP bodies for the model `tiny` that are broken in one or two ways, and what a body that is not broken asks for."""

import json
import random
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_bundle import SIGNATURE, answers

LENGTH = "Inference-Header-Content-Length"
KINDS = {"a": "UINT8", "m": "INT32"}
WILD = (
    "-1",
    "0",
    "1e999",
    "1.5",
    "99999999999999999999",
    "2147483648",
    "null",
    '"5"',
    "[]",
    "{}",
    "true",
    "\\u0000",
    "",
)
HEADERS = (
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "deflate"},
    {"Content-Type": "text/plain"},
    {LENGTH: "-1"},
    {LENGTH: "18446744073709551615"},
    {LENGTH: "7"},
    {LENGTH: "x"},
    {LENGTH: "1000000"},
    {"Transfer-Encoding": "identity"},
)
PARAMETERS: tuple[dict[str, Any], ...] = (
    {"sequence_id": 5},
    {"sequence_id": "x", "sequence_start": 3},
    {"priority": -1},
    {"timeout": "soon"},
    {"binary_data_size": -5},
    {"binary_data_size": 2**63},
    {"shared_memory_region": "nowhere", "shared_memory_byte_size": 64},
    {"classification": 10**12},
    {"headers": {"a": 1}},
    {"triton_enable_empty_final_response": 1},
)


def request(rows: int, draw: random.Random, binary: bool) -> tuple[bytearray, bytes, dict[str, str]]:
    """(JSON, binary part, headers) of a right request."""
    a = np.frombuffer(draw.randbytes(rows * 192), np.uint8).reshape(rows, 3, 8, 8)
    m = np.array([[draw.randrange(12)] for _ in range(rows)], np.int32)
    tensors = []
    for name, array in (("a", a), ("m", m)):
        data = {"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.ravel().tolist()}
        tensors.append({"name": name, "shape": list(array.shape), "datatype": KINDS[name], **data})
    head = bytearray(json.dumps({"id": "1", "inputs": tensors}).encode())
    return head, a.tobytes() + m.tobytes() if binary else b"", {LENGTH: str(len(head))} if binary else {}


def malformed(draw: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers that are broken somewhere; now and then they are still right."""
    head, tail, headers = request(draw.randrange(1, 6), draw, draw.random() < 0.5)
    for _ in range(draw.randrange(1, 3)):
        how = draw.randrange(9)
        place = draw.randrange(len(head) + 1)
        if how == 0:  # cut off
            whole = bytes(head) + tail
            head, tail = bytearray(whole[: draw.randrange(len(whole) + 1)]), b""
        elif how == 1:  # flipped bits
            for _ in range(draw.randrange(1, 8)):
                if head:
                    head[draw.randrange(len(head))] ^= 1 << draw.randrange(8)
        elif how == 2:  # something left out, or twice
            piece = head[place : place + draw.randrange(1, 40)]
            head[place : place + len(piece)] = piece * draw.choice([0, 2, 3])
        elif how == 3:  # a number that is none, or no such number
            numbers = list(re.finditer(rb"-?\d+", head))
            if numbers:
                begin, end = draw.choice(numbers).span()
                head[begin:end] = draw.choice(WILD).encode()
        elif how == 4:  # another type
            kind = draw.choice(["FP32", "BYTES", "INT8", "UINT8", "INT64", "BOOL", "", "X" * 1000])
            head = bytearray(re.sub(rb'"(UINT8|INT32)"', f'"{kind}"'.encode(), bytes(head), count=1))
        elif how == 5:  # nothing that is JSON at all
            head = bytearray(draw.choice([b"", draw.randbytes(draw.randrange(300)), b"[" * 5000, b'{"a":' * 500]))
        elif how == 6:  # a parameter that makes no sense
            extra = json.dumps(draw.choice(PARAMETERS)).encode()
            head = bytearray(bytes(head).replace(b'"id"', b'"parameters":' + extra + b',"id"', 1))
        elif how == 7:
            headers = {**headers, **draw.choice(HEADERS)}
        else:  # more, or less, than was announced
            tail = tail[: draw.randrange(len(tail) + 1)] + draw.randbytes(draw.choice([0, 1, 500]))
        if LENGTH in headers and draw.random() < 0.7 and how != 7:
            headers[LENGTH] = str(len(head))
    return bytes(head) + tail, headers


def flat(data: Any) -> list[int]:
    """Whole numbers in any nesting; TypeError for anything else."""
    if type(data) is int:
        return [data]
    if not isinstance(data, list):
        raise TypeError(f"{data!r} is no whole number")
    return [number for item in data for number in flat(item)]


def wanted(body: bytes, headers: dict[str, str]) -> npt.NDArray[Any] | None:
    """What a server must answer to a body if it answers at all; None if there is no request in it.

    Triton takes some bodies that a strict reader would not: whole numbers too large for their tensor (it wraps them),
    any nesting, any bytes in names, anything after a NUL, and no samples in the shape of the second input as long as
    its data are as many as the first's. Read so, its answers must be right.
    """
    length = headers.get(LENGTH)
    try:
        head, rest = (body, b"") if length is None else (body[: int(length)], body[int(length) :])
        arrays = {}
        for tensor in json.loads(head.partition(b"\0")[0].decode(errors="replace"))["inputs"]:
            dtype = np.dtype({"UINT8": np.uint8, "INT32": np.int32}[tensor["datatype"]])
            if "data" in tensor:
                array = np.array([number % 2**64 for number in flat(tensor["data"])], np.uint64).astype(dtype)
            else:
                count = tensor["parameters"]["binary_data_size"]
                array, rest = np.frombuffer(rest[:count], dtype), rest[count:]
            shape = tensor["shape"]
            arrays[tensor["name"]] = array.reshape([-1, *shape[1:]] if arrays and shape[0] == 0 else shape)
        specs = {spec.name: spec for spec in SIGNATURE.inputs}
        if arrays.keys() != specs.keys() or len({len(array) for array in arrays.values()}) != 1:
            return None
        for name, spec in specs.items():
            spec.check(arrays[name])
        return answers(arrays["a"], arrays["m"])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, AttributeError):
        return None
