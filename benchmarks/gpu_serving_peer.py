"""The peer of gpu_serving.py: what is written by hand without Triton. Bytes in, one run a request, bytes out.

usage: gpu_serving_peer.py BUNDLE cpu|cuda     prints its URL once it answers
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import torch
from aiohttp import web

from gpuops.bundle import read_bundle
from gpuops.export import aoti


async def serve(path: Path, device: str) -> None:
    """Answer until the process is ended; each request runs on a thread of a pool, as FastAPI's plain functions do."""
    bundle = read_bundle(path)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    module = aoti.load(bundle.model_file("aoti"), bundle.manifest["aoti"], device)
    (takes,) = bundle.signature.inputs

    def answer(body: bytes) -> bytes:
        x = torch.from_numpy(np.frombuffer(bytearray(body), takes.dtype).reshape(-1, *takes.shape)).to(device)
        with torch.inference_mode():
            return bytes(module(x)[0].cpu().numpy().tobytes())

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        return web.Response(body=await asyncio.to_thread(answer, body))

    application = web.Application(client_max_size=2**26)
    application.router.add_post("/infer", infer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
