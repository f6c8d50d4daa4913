"""Messages between rank 0 and the others, and the others' main loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

import msgspec

from engine.logs import LogFormat
from engine.oom import OutOfMemory
from engine.plan import RoundPlan
from parallel.channel import Link
from parallel.rendezvous import Join

PING = b""
"""The frame that asks a rank for a sign of life."""


class RankLaunch(msgspec.Struct):
    """The first message to a rank.

    The rank answers with a RankReport, is then sent the EngineConfig as JSON, with every setting resolved, answers with
    a second RankReport once it is ready, and from then on is sent RoundPlans and pings.
    """

    join: Join
    log_level: str
    log_format: LogFormat


class WeightBytes(msgspec.Struct, frozen=True):
    """Bytes of weights. target: matrices that a target step reads. draft: other matrices that draft steps read. tables:
    embeddings beside them."""

    target: int = 0
    draft: int = 0
    tables: int = 0

    @property
    def total(self) -> int:
        return self.target + self.draft + self.tables

    def __add__(self, other: WeightBytes) -> WeightBytes:
        return WeightBytes(self.target + other.target, self.draft + other.draft, self.tables + other.tables)


class RankReport(msgspec.Struct, omit_defaults=True):
    """A rank's message to rank 0: a step of start-up is done, an answer to a ping, or, once, why the rank ends."""

    weight_bytes: WeightBytes = WeightBytes()
    """Bytes of its shards, once they are loaded."""
    failure: str | None = None
    """Why the rank ends, to be read after its name: `failed: …`."""
    lost: bool = False
    """The failure is that of a collective: some other rank is the cause."""
    told_to_end: bool = False
    """With `lost`: whoever started this rank ended it, perhaps because another one is gone."""


def send_report(link: Link, report: RankReport) -> None:
    """Send rank 0 a report."""
    link.send(msgspec.msgpack.encode(report))


def worker_loop(link: Link, execute: Callable[[RoundPlan], object]) -> NoReturn:
    """Run the rounds that rank 0 sends, and answer its pings. Rank 0 sees for itself when a round was abandoned. Raises
    Disconnected when rank 0 is gone."""
    decoder = msgspec.msgpack.Decoder(RoundPlan)
    while True:
        frame = link.receive()
        if frame == PING:
            send_report(link, RankReport())
        else:
            with contextlib.suppress(OutOfMemory):
                execute(decoder.decode(frame))
