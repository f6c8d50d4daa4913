"""Messages between rank 0 and the other ranks, and the other ranks' main loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

import msgspec

from engine.logs import LogFormat
from engine.oom import OutOfMemory
from engine.plan import RoundPlan, WeightStep
from parallel.channel import Link
from parallel.rendezvous import Join

PING = b""
"""Frame that requests an empty RankReport from a rank."""


class RankLaunch(msgspec.Struct):
    """First message to a rank.

    The rank answers with a RankReport, receives the EngineConfig as JSON, with every setting resolved, answers with a
    second RankReport once it is ready, and from then on receives RoundPlans, WeightSteps and pings.
    """

    join: Join
    log_level: str
    log_format: LogFormat


class WeightBytes(msgspec.Struct, frozen=True):
    """Bytes of weights. target: matrices that a target step reads. draft: those of a draft model. own_drafts: other
    matrices that the target's own draft steps read. tables: embeddings, which are in none of them."""

    target: int = 0
    draft: int = 0
    tables: int = 0
    own_drafts: int = 0

    @property
    def total(self) -> int:
        return self.target + self.draft + self.tables + self.own_drafts

    def __add__(self, other: WeightBytes) -> WeightBytes:
        parts = ("target", "draft", "tables", "own_drafts")
        return WeightBytes(*(getattr(self, part) + getattr(other, part) for part in parts))


class RankReport(msgspec.Struct, omit_defaults=True):
    """A rank's message to rank 0: completion of a step, answer to a ping or, once, the reason why it ends."""

    weight_bytes: WeightBytes = WeightBytes()
    """Bytes of the rank's shards, once they are loaded at the start."""
    refusal: str | None = None
    """Reason why the rank cannot perform a WeightStep."""
    failure: str | None = None
    """Reason why the rank ends, to be read after its name: `failed: …`."""
    lost: bool = False
    """Whether a collective failed, so that some other rank is the cause."""
    signalled: bool = False
    """With `lost`: whether a signal or the end of its torchrun agent ended the rank, perhaps because another rank is
    gone."""


def send_report(link: Link, report: RankReport) -> None:
    """Send rank 0 a report."""
    link.send(msgspec.msgpack.encode(report))


def worker_loop(
    link: Link, execute: Callable[[RoundPlan], object], perform: Callable[[WeightStep], str | None]
) -> NoReturn:
    """Run the rounds that rank 0 sends, perform its steps and answer its pings. An abandoned round is not reported:
    rank 0 abandons it too. perform: returns why a step is refused. Raises Disconnected when rank 0 is gone."""
    decoder = msgspec.msgpack.Decoder(RoundPlan | WeightStep)
    while True:
        frame = link.receive()
        if frame == PING:
            send_report(link, RankReport())
            continue
        message: RoundPlan | WeightStep = decoder.decode(frame)
        if isinstance(message, WeightStep):
            send_report(link, RankReport(refusal=perform(message)))
        else:
            with contextlib.suppress(OutOfMemory):
                execute(message)
