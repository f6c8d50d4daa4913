"""What rank 0 and the other ranks say to each other, and the others' life between it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

import msgspec

from engine.logs import LogFormat
from engine.oom import OutOfMemory
from engine.plan import StepPlan
from parallel.channel import Link
from parallel.rendezvous import Join

PING = b""
"""The frame that asks a rank for a sign of life."""


class Launch(msgspec.Struct):
    """The first thing a rank is told. It answers with a Report, is then sent the EngineConfig as JSON, with every
    setting resolved, answers with a second Report once it is ready, and from then on is sent StepPlans and pings."""

    join: Join
    log_level: str
    log_format: LogFormat


class WeightBytes(msgspec.Struct, frozen=True):
    """target: matrices that a target step reads. draft: others, which draft steps read. tables: embeddings beside."""

    target: int = 0
    draft: int = 0
    tables: int = 0

    @property
    def total(self) -> int:
        return self.target + self.draft + self.tables

    def __add__(self, other: WeightBytes) -> WeightBytes:
        return WeightBytes(self.target + other.target, self.draft + other.draft, self.tables + other.tables)


class Report(msgspec.Struct, omit_defaults=True):
    """What a rank says to rank 0: that it has come this far, that it is there when asked, or, once, why it goes."""

    weight_bytes: WeightBytes = WeightBytes()
    """Of its shards, once they are loaded."""
    failure: str | None = None
    """What becomes of it, to be read behind its name: `failed: …`."""
    lost: bool = False
    """The failure is that of a collective: some other rank is the cause."""
    told: bool = False
    """With `lost`: whoever started this rank told it to end, perhaps since another one is gone."""


def answer(link: Link, report: Report) -> None:
    """A rank's word to rank 0."""
    link.send(msgspec.msgpack.encode(report))


def follow(link: Link, execute: Callable[[StepPlan], object]) -> NoReturn:
    """A rank's life: run the rounds that rank 0 announces, and answer when asked. Rank 0 sees for itself when a round
    was given up. Raises Disconnected when rank 0 is gone."""
    decoder = msgspec.msgpack.Decoder(StepPlan)
    while True:
        frame = link.receive()
        if frame == PING:
            answer(link, Report())
        else:
            with contextlib.suppress(OutOfMemory):
                execute(decoder.decode(frame))
