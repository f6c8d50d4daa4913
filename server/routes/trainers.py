"""Routes for trainers that change the weights of a running server: pause, resume, update_weights, sleep, wake_up."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from engine.messages import ControlAction
from engine.processes.client import ControlRefused
from server.bodies.fields import read
from server.bodies.schemas import PauseRequest, UpdateWeightsRequest
from server.errors import ApiError
from server.service import Service


async def _check_enabled(request: Request) -> None:
    service: Service = request.app.state.service
    if not service.config.server.weight_updates:
        raise ApiError(
            "not enabled; set server.weight_updates (--weight-updates) at the start", status=404, code="not_enabled"
        )


router = APIRouter(dependencies=[Depends(_check_enabled)])


async def _control(service: Service, action: ControlAction, *, abort: bool = False, path: str = "") -> dict[str, str]:
    """Let the engine do it, and return its state then. Raises ApiError, EngineDead, ControlRefused."""
    client = service.loaded()
    await client.control(action, abort=abort, path=path)
    return {"state": client.stats.state}


@router.post("/pause")
async def pause(request: Request) -> dict[str, str]:
    """Begin no further round. The running one ends first."""
    service: Service = request.app.state.service
    body = await read(request, PauseRequest, empty=b"{}")
    return await _control(service, "pause", abort=body.mode == "abort")


@router.post("/resume")
async def resume(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    return await _control(service, "resume")


@router.post("/update_weights")
async def update_weights(request: Request) -> dict[str, str]:
    """Replace the target's weights. The answer comes once they are in force."""
    service: Service = request.app.state.service
    body = await read(request, UpdateWeightsRequest)
    try:
        return await _control(service, "update_weights", path=body.path)
    except ControlRefused as error:
        raise ApiError(f"path: {error}", code="weights_refused", param="path") from None


@router.post("/sleep")
async def sleep(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    return await _control(service, "sleep")


@router.post("/wake_up")
async def wake_up(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    try:
        return await _control(service, "wake_up")
    except ControlRefused:  # the engine has logged the reason, which names the server's files
        raise ApiError(
            "the weights cannot be loaded, the server's log says why; the engine is still asleep",
            status=503,
            code="cannot_wake",
        ) from None
