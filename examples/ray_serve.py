#!/usr/bin/env python3
"""Pictures over HTTP from a Ray cluster: replicas on several nodes, each with a checkpoint on a device of its own.

    pip install "ray[serve]" ./python
    serve run examples.ray_serve:app                      # the demo; or, from a program, app = pictures(model, ...)
    curl localhost:8000 -d '{"prompt": "a photo of a doctor", "seed": 7, "balance": ["woman", "man"], "n": 2}'

A request has the fields of `respodiff serve`, and its answer the form of that server's: a list of PNGs in base64 with
their seeds and parameters. A replica makes the pictures of `busy` requests at once. Unlike `respodiff serve`, it does
not join requests into one batch, and knows no policy.
"""

import asyncio
import base64
import functools
from typing import Any

import respodiff
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment
class Pictures:
    """A replica: one engine."""

    def __init__(self, model: str, device: str) -> None:
        self.engine = respodiff.Engine(model, device=device)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            fields = await request.json()
            # The engine works in a thread, while others may run: it does not hold the interpreter's lock.
            pictures = await asyncio.to_thread(functools.partial(self.engine.generate, **fields))
        except respodiff.Error as error:
            status = {"invalid": 400, "mismatch": 400, "not_found": 404, "out_of_memory": 422}.get(error.kind, 500)
            answer = {"message": str(error), "param": error.subject, "code": error.kind}
            return JSONResponse({"error": answer}, status_code=status)
        except (TypeError, ValueError) as problem:
            return JSONResponse({"error": {"message": str(problem), "code": "invalid"}}, status_code=400)
        data = [
            {"b64_json": base64.b64encode(picture.png).decode(), "seed": picture.seed, "parameters": picture.info}
            for picture in pictures
        ]
        return JSONResponse({"data": data})


def pictures(
    model: str = "demo", device: str = "auto", replicas: int = 1, cpus: float = 1, gpus: float = 0, busy: int = 2
) -> Any:
    """The application: `replicas` engines, each with this many cores and GPUs."""
    return Pictures.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        max_ongoing_requests=busy,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    ).bind(model, device)


app = pictures()
