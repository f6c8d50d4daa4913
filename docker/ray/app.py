"""Replicas on a Ray cluster: each is `magicdec serve`, and Ray Serve passes requests to the one with the fewest.

    pip install 'ray[serve]' aiohttp
    serve run docker.ray.app:build replicas=2 gpus=8 flags='--config configs/llama-3.1-8b-a100x8.yaml'

Arguments: replicas; gpus and cpus of each; flags of `magicdec serve`, without host and port; command, if it is not on
the path of every node; seconds that a replica may take to load.
"""

# Ray copies the class below to other processes, with what stands before it: annotations are values here, for FastAPI
# to read there.

import asyncio
import shlex
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "server", "date"}
"""Headers that each connection has for itself."""
_DRAIN_S = 45
"""More than a server takes to finish what runs (server.drain_timeout_s)."""

front = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)


async def _stream(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for data in answer.content.iter_any():
            yield data


@serve.deployment(
    name="magicdec", max_ongoing_requests=1024, health_check_period_s=3, graceful_shutdown_timeout_s=_DRAIN_S
)
@serve.ingress(front)
class Replica:
    """One server process, and the way to it."""

    def __init__(self, command: str, flags: str, load_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._load_s = load_s
        self._process = subprocess.Popen(
            [command, "serve", "--host", "127.0.0.1", "--port", str(port), *shlex.split(flags)]
        )
        self._session: aiohttp.ClientSession | None = None

    async def check_health(self) -> None:
        """Raises RuntimeError; Ray then starts another replica. The first call waits until the model is loaded."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the server has ended with status {self._process.returncode}")
        if self._session is None:
            await asyncio.wait_for(self._loaded(), self._load_s)
        async with self._client().get(f"{self._url}/health") as answer:
            if answer.status != 200:
                raise RuntimeError(await answer.text())

    @front.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
    async def forward(self, path: str, request: Request) -> Response:
        """The server's own answer, as it streams; a client that goes away aborts it."""
        headers = {name: value for name, value in request.headers.items() if name not in _HOP_BY_HOP}
        try:
            answer = await self._client().request(
                request.method,
                f"{self._url}/{path}",
                params=request.query_params,
                headers=headers,
                data=await request.body(),
            )
        except aiohttp.ClientConnectionError:
            return Response(status_code=503, headers={"Retry-After": "1"})
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        return StreamingResponse(_stream(answer), status_code=answer.status, headers=kept)

    def __del__(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    async def _loaded(self) -> None:
        while self._process.poll() is None:
            try:
                async with self._client().get(f"{self._url}/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.5)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session


def build(arguments: dict[str, str]) -> Any:
    """Build the application: the entry point for `serve run` and for configuration files of Ray."""
    options = {"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))}
    replicas = Replica.options(num_replicas=int(arguments.get("replicas", 1)), ray_actor_options=options)
    load_s = float(arguments.get("seconds", 1800))
    return replicas.bind(arguments.get("command", "magicdec"), arguments.get("flags", ""), load_s)
