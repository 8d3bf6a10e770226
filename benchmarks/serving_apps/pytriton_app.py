"""PyTriton: python app.py HTTP_PORT GRPC_PORT METRICS_PORT, two instances."""

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from raw import LAYOUT, PEER, session


class Infer:
    """One instance."""

    def __init__(self) -> None:
        self.session = session()

    @batch
    def __call__(self, **inputs: Any) -> dict[str, Any]:
        return {"y": self.session.run(None, inputs)[0]}


http, grpc, metrics = map(int, sys.argv[1:])
addresses = {f"{name}_address": "127.0.0.1" for name in ("http", "grpc", "metrics")}
with Triton(config=TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics, **addresses)) as triton:
    triton.bind(
        model_name=PEER["name"],
        infer_func=[Infer(), Infer()],
        inputs=[Tensor(name=name, dtype=dtype.type, shape=shape) for name, dtype, shape in LAYOUT],
        outputs=[Tensor(name="y", dtype=np.float32, shape=tuple(PEER["output"]))],
        config=ModelConfig(max_batch_size=PEER["max_batch"], batching=True, batcher=DynamicBatcher()),
        strict=False,
    )
    triton.serve()
