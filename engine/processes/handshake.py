"""Handshake between an API process and an engine process. Free of torch."""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import Process
from pathlib import Path

import msgspec
import zmq.asyncio

from engine.messages import AbortRequests, Dead, FromEngine, Ready
from engine.processes.heartbeat import start_timeout

REASON_TIMEOUT_S = 0.5
"""Time to wait for the reason after the engine process has ended."""
_HELLO_INTERVAL_S = 0.5
"""Time between two hellos to an engine that does not answer yet."""
_HELLO = msgspec.msgpack.encode(AbortRequests([]))

logger = logging.getLogger(__name__)


class EngineDead(RuntimeError):
    """The engine is gone, or did not start; the message gives the reason."""


async def wait_ready(
    socket: zmq.asyncio.Socket, heartbeat: zmq.asyncio.Socket, process: Process, timeout_s: float
) -> Ready:
    """Wait until the engine that runs in `process` is ready. socket, heartbeat: a DEALER and a SUB to it. Raises
    EngineDead."""
    await socket.send(_HELLO)
    ended = asyncio.create_task(process.wait())
    try:
        async with start_timeout(heartbeat, timeout_s):
            reply = asyncio.ensure_future(socket.recv())
            await asyncio.wait({reply, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                await asyncio.wait({reply}, timeout=REASON_TIMEOUT_S)
    except TimeoutError:
        raise EngineDead(f"the engine was not ready after {timeout_s:g} s") from None
    finally:
        ended.cancel()
    if not reply.done():
        reply.cancel()
        raise EngineDead(f"the engine process ended with status {process.returncode} while starting")
    message = msgspec.msgpack.decode(reply.result(), type=FromEngine)
    if isinstance(message, Ready):
        return message
    raise EngineDead(
        message.reason if isinstance(message, Dead) else "the engine sent an unexpected message while starting"
    )


async def wait_for_engine(
    socket: zmq.asyncio.Socket, heartbeat: zmq.asyncio.Socket, directory: Path, timeout_s: float
) -> Ready:
    """Wait until an engine with its sockets in `directory` is ready. socket, heartbeat: a DEALER and a SUB to it.
    Raises EngineDead.

    A hello is lost if the engine ends while it loads, so hellos are repeated.
    """
    reason = ""
    try:
        async with start_timeout(heartbeat, timeout_s):
            while True:
                await socket.send(_HELLO)
                if not await socket.poll(int(_HELLO_INTERVAL_S * 1000)):
                    continue
                data = await socket.recv()
                try:
                    message = msgspec.msgpack.decode(data, type=FromEngine)
                except msgspec.MsgspecError as error:
                    reason = f"it is of another version than this process: {error}"
                    raise EngineDead(f"the engine in {directory} cannot be read; {reason}") from None
                if isinstance(message, Ready):
                    return message
                if isinstance(message, Dead) and message.reason != reason:
                    reason = message.reason
                    logger.warning("waiting for another engine, since this one ended: %s", reason)
    except TimeoutError:
        last = f"; the last one ended: {reason}" if reason else ""
        raise EngineDead(f"no engine was ready in {directory} within {timeout_s:g} s{last}") from None
