"""Routes about the server itself: models, health, metrics, version, load, and the reset of its prefix cache."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from engine.messages import EngineState
from server.errors import unavailable
from server.service import Service

router = APIRouter()


def _card(service: Service, model_id: str) -> dict[str, Any]:
    """Describe the model under one of its names. magicdec.target_kv: settings of a target that reads part of its KV,
    whose text is not the dense model's; null: it reads all. magicdec.weights: formats of the matrices of the target and
    of drafts; null while they are released. magicdec.kv_format: of the target's computed pages; any but dense changes
    the text."""
    stats = service.loaded().stats
    return {
        "id": model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "magicdec",
        "root": service.config.engine.model,
        "parent": None,
        "max_model_len": service.loaded().ready.max_model_len,
        "magicdec": {
            "target_kv": stats.target_kv or None,
            "weights": stats.weights or None,
            "kv_format": stats.kv_format,
        },
    }


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_card(service, model_id) for model_id in service.model_ids]}


@router.get("/v1/models/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(model_id)
    return _card(service, model_id)


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Report liveness: also while loading and while draining."""
    request.app.state.service.check_alive()
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """Report whether requests are accepted and run: not while the engine is paused or asleep."""
    state = request.app.state.service.engine().stats.state
    if state is not EngineState.RUNNING:
        raise unavailable(f"the engine is {state}", state)
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    build: dict[str, str] = request.app.state.service.build
    return build


@router.get("/load")
async def load(request: Request) -> dict[str, int | str]:
    """Report the load; at most about a second old. Free pages: all that a request could get, cached ones too."""
    stats = request.app.state.service.loaded().stats
    return {
        "state": stats.state,
        "running": stats.running,
        "waiting": stats.waiting,
        "pages_total": stats.pages_total,
        "pages_free": stats.pages_free + stats.pages_cached,
    }


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Empty the prefix cache.

    The answer comes once the engine has been sent the reset. Messages to it arrive in order, so a request that this
    process takes after the answer finds nothing that was computed before; running requests go on.
    """
    service: Service = request.app.state.service
    service.loaded().reset_prefix_cache()
    return Response()
