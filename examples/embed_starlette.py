"""A web service that trains: the Run lives in the application's lifespan, in the server's own event loop.

uvicorn examples.embed_starlette:app --timeout-graceful-shutdown 5

GET /status · GET /events (server-sent events) · POST /pause /resume /stop /checkpoint. The same works in FastAPI.
Use one server process: each would run a training of its own. An open /events stream holds back the shutdown until the
timeout given above.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import aiorl


def create_app(config: aiorl.Config) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiorl.Run(config) as run:  # a failing training does not take the service down: see /status
            app.state.run = run
            yield  # leaving ends the training, its workers and its threads

    routes = [Route("/status", status), Route("/events", events)]
    routes += [Route(f"/{verb}", control, methods=["POST"]) for verb in ("pause", "resume", "stop", "checkpoint")]
    return Starlette(lifespan=lifespan, routes=routes)


async def status(request: Request) -> Response:
    return as_json(request.app.state.run.status())


async def events(request: Request) -> Response:
    run: aiorl.Run = request.app.state.run
    mine = run.events()  # every client reads at its own pace; a slow one loses only progress

    async def stream() -> AsyncIterator[bytes]:
        try:
            async for event in mine:
                yield b"data: " + msgspec.json.encode(event) + b"\n\n"
        finally:
            run.unsubscribe(mine)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def control(request: Request) -> Response:
    run: aiorl.Run = request.app.state.run
    match request.url.path:
        case "/pause":
            await run.pause()  # answers when nothing moves any more
        case "/resume":
            run.resume()
        case "/stop":
            run.stop()
        case _:
            return JSONResponse({"checkpoint": str(await run.checkpoint())})
    return as_json(run.status())


def as_json(status: aiorl.Status) -> Response:
    return Response(msgspec.json.encode(status), media_type="application/json")


app = create_app(aiorl.Config.preset("CartPole-v1", total_steps=2_000_000, workers=1))
