"""BentoML: bentoml serve app:Service. Raw bytes through an ASGI route, which spares it JSON."""

import bentoml
from raw import answer, session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

opened = session()


async def infer(request: Request) -> Response:
    """One sample."""
    return Response(answer(opened, await request.body()), media_type="application/octet-stream")


@bentoml.asgi_app(Starlette(routes=[Route("/infer", infer, methods=["POST"])]), path="/raw")
@bentoml.service(workers=2)
class Service:
    """A service needs a method of its own."""

    @bentoml.api
    def ping(self) -> str:
        return "pong"
