"""What the HTTP peers share: one onnxruntime session of one thread, raw bytes in and out."""

import json
from pathlib import Path

import numpy as np
import onnxruntime

PEER = json.loads(Path(__file__).with_name("peer.json").read_text())
LAYOUT = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in PEER["inputs"]]


def session(threads: int = 1) -> onnxruntime.InferenceSession:
    """The graph; with two workers on two cores one thread each is the fastest."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(PEER["model"], options, providers=["CPUExecutionProvider"])


def answer(opened: onnxruntime.InferenceSession, body: bytes) -> bytes:
    """One sample's inputs, one after another, to the output."""
    inputs, at = {}, 0
    for name, dtype, shape in LAYOUT:
        count = int(np.prod(shape))
        inputs[name] = np.frombuffer(body, dtype, count, at).reshape(1, *shape)
        at += count * dtype.itemsize
    return opened.run(None, inputs)[0].tobytes()
