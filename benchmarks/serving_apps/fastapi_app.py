"""FastAPI: uvicorn app:app --workers 2."""

from fastapi import FastAPI, Request, Response
from raw import answer, session

opened = session()
app = FastAPI()


@app.post("/infer")
async def infer(request: Request) -> Response:
    # In the event loop: a thread pool costs more than it brings where every core has a worker of its own.
    return Response(answer(opened, await request.body()), media_type="application/octet-stream")
