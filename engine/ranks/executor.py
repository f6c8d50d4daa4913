"""Rank 0's hold on the other ranks: start them, tell them what to run, notice when one is gone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec
import torch
from torch._C._distributed_c10d import Store

from engine.config.deployment import ConfigError, EngineConfig
from engine.logs import in_use
from engine.oom import OutOfMemory, what_failed
from engine.plan import StepPlan
from engine.ranks.health import Roster
from engine.ranks.protocol import PING, Launch, WeightBytes
from parallel import rendezvous, shared
from parallel.channel import Channel, Link
from parallel.group import CollectiveError, Group, RankFailure
from parallel.launch import RankProcesses
from parallel.meeting import Guests
from parallel.rendezvous import Join

RANK_COMMAND = (sys.executable, "-m", "engine.processes.rank")
_PINGS = 4
"""An idle engine sends this many in the time that a rank may keep it waiting."""


class Ranks:
    """The ranks 1 … size - 1 of one group. Everything that is wrong with them becomes one RankFailure."""

    def __init__(
        self,
        links: Mapping[int, Link],
        *,
        timeout_s: float,
        processes: RankProcesses | None = None,
        hosts: Mapping[int, str] | None = None,
        memory: int | None = None,
    ) -> None:
        """links: to each of them, by rank; owned. timeout_s: of a collective. processes: theirs, if they are this
        process's children; owned. hosts: where the others run, for messages. memory: file descriptor of what they
        share; owned.
        """
        self._channel = Channel(links)
        self._processes = processes
        self._roster = Roster(self._channel, timeout_s=timeout_s, processes=processes, hosts=hosts)
        self._memory = memory
        self._timeout_s = timeout_s
        self._asked = 0  # how many reports each should have sent, once all are here
        self._pinged = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._broken: str | None = None
        self.group: Group
        self._join_first: Callable[[int], Group | None]
        self._waiting: list[shared.SharedGroup] = []  # groups that look for news of the ranks while they wait

    @classmethod
    def launch(cls, config: EngineConfig, device: torch.device) -> Ranks:
        """Start the processes of `config`, whose settings are all resolved, and join them in a group.

        device: rank 0's. Raises RankFailure; nothing remains then. They still have to load: see `wait_ready`.
        """
        size = config.tensor_parallel_size
        if device.type == "cuda" and size > torch.cuda.device_count():
            raise ConfigError(
                f"engine.tensor_parallel_size: {size} ranks, but {torch.cuda.device_count()} CUDA devices"
            )
        try:
            transport = rendezvous.choose(device, config.collectives)
        except ValueError as error:
            raise ConfigError(f"engine.collectives: {error}") from error
        memory = shared.create(size) if transport == "shared" else None
        try:
            store = rendezvous.host_store(size, config.start_timeout_s) if memory is None else None
            processes = RankProcesses(
                RANK_COMMAND,
                size,
                send_timeout_s=config.step_timeout_s,
                fds=() if memory is None else (memory,),
            )
        except BaseException:
            if memory is not None:
                os.close(memory)
            raise
        ranks = cls(processes.links, timeout_s=config.step_timeout_s, processes=processes, memory=memory)
        port = store.port if store else None
        join = Join(0, size, transport, config.step_timeout_s, port, memory, start_timeout_s=config.start_timeout_s)
        ranks._join(join, config, device, store, rendezvous.LOOPBACK)
        return ranks

    @classmethod
    def meet(
        cls, config: EngineConfig, device: torch.device, guests: Guests, *, one_machine: bool, address: str
    ) -> Ranks:
        """Join ranks that somebody else has started, on any host: see `launch`.

        one_machine: all ranks are on this one. address: of this host, for the others to reach.
        """
        size = config.tensor_parallel_size
        ranks = cls(guests.links, timeout_s=config.step_timeout_s, hosts=guests.hosts)
        try:
            transport = rendezvous.choose(device, config.collectives, one_machine)
        except ValueError as error:
            ranks.close()
            raise ConfigError(f"engine.collectives: {error}") from error
        join = Join(0, size, transport, config.step_timeout_s, start_timeout_s=config.start_timeout_s)
        if transport == "shared":
            ranks._memory = join.fd = shared.create(size)
            join.holder = os.getpid()
        ranks._join(join, config, device, guests.store, address)
        return ranks

    def _join(self, join: Join, config: EngineConfig, device: torch.device, store: Store | None, address: str) -> None:
        """join: rank 0's."""
        try:
            self.introduce(join, config)
            self.group = rendezvous.join(join, device, store, address)
        except CollectiveError as error:
            failure = self._lost(error)
            self.close()
            raise failure from error
        except BaseException:
            self.close()
            raise
        self._join_first = lambda count: rendezvous.join_first(count, join, device, store, address)
        self._look_while_waiting(self.group)

    def join_first(self, count: int) -> Group | None:
        """Rank 0's end of a second group, of the first `count` ranks: see rendezvous.join_first. Raises RankFailure."""
        try:
            group = self._join_first(count)
        except CollectiveError as error:
            raise self._lost(error) from error
        self._look_while_waiting(group)
        return group

    def _look_while_waiting(self, group: Group | None) -> None:
        if isinstance(group, shared.SharedGroup):
            group.while_waiting = self.check
            self._waiting.append(group)

    def introduce(self, join: Join, config: EngineConfig) -> None:
        """Tell each rank who it is, wait until all are there, and send them the settings. join: rank 0's."""
        level, format = in_use()
        for rank in self._roster.ranks:
            launch = Launch(msgspec.structs.replace(join, rank=rank), level, format)
            self._channel.send(rank, self._encoder.encode(launch))
        self._await_hello(1, config.start_timeout_s)
        self._channel.broadcast(config.model_dump_json().encode())

    def wait_ready(self, timeout_s: float) -> None:
        """Return once every rank has loaded. Raises RankFailure."""
        self._await_hello(2, timeout_s)

    @contextmanager
    def round(self, plan: StepPlan) -> Iterator[None]:
        """Send the plan to all ranks; inside, rank 0 runs its own share. Raises RankFailure, then and ever after; lets
        OutOfMemory through, with which all ranks give the round up."""
        self.check()
        data = self._encoder.encode(plan)
        self._channel.broadcast(data)
        if self._roster.broken:  # or the collectives would wait for it as long again
            raise self._lost()
        try:
            yield
        except OutOfMemory:
            raise
        except CollectiveError as error:
            raise self._lost(error) from error
        except RankFailure as failure:
            self._broken = str(failure)
            raise
        except Exception as error:
            self._broken = f"rank 0 {what_failed(error)}"
            raise RankFailure(self._broken) from error
        except BaseException as error:
            # Whatever interrupts a round, Ctrl-C included, leaves the others somewhere inside it.
            self._broken = f"a round was cut short by {type(error).__name__}"
            raise

    def check(self) -> None:
        """Raise RankFailure if a rank is gone. Costs a system call."""
        if self._broken is not None:
            raise RankFailure(self._broken)
        self._roster.listen(0)
        if self._roster.broken:
            raise self._lost()

    def ping(self) -> float:
        """For when there is no round in which a rank would be missed: ask all of them for a sign of life, now and then.

        Returns after how many seconds to call again at the latest. A rank that fails to answer is noticed within the
        time-out. What counts is pings without an answer, not time: if this process stands still itself, none are sent,
        and the answers that came meanwhile are read before the next one is. An answer may be late, and a round may
        start before it is there; it then comes first. Raises RankFailure.
        """
        self.check()
        interval = self._timeout_s / _PINGS
        left = self._pinged + interval - time.monotonic()
        if left > 0:
            return left
        if late := self._roster.late(self._asked - (_PINGS - 2)):
            raise self._lost(CollectiveError("no sign of life", late[0]))
        self._channel.broadcast(PING)
        self._asked += 1
        self._pinged = time.monotonic()
        return interval

    @property
    def weight_bytes(self) -> WeightBytes:
        """Of all these ranks' shards, once they are ready."""
        return self._roster.weight_bytes

    @property
    def pids(self) -> dict[int, int]:
        """Of those that are this process's children, by rank."""
        return self._processes.pids if self._processes else {}

    def close(self) -> None:
        """End them. No process, socket or memory of theirs remains."""
        self._broken = "the engine was closed"
        for group in self._waiting:
            group.while_waiting = shared.wait_patiently  # or memory would wait for the garbage collector
        self._channel.close()
        if self._processes is not None:
            self._processes.close()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def _await_hello(self, number: int, timeout_s: float) -> None:
        self._asked = number
        deadline = time.monotonic() + timeout_s
        while late := self._roster.late(number):
            left = deadline - time.monotonic()
            if left <= 0:
                self._broken = f"{self._roster.names(late)} not ready after {timeout_s:g} s"
                raise RankFailure(self._broken)
            self._roster.listen(left)
            if self._roster.broken:
                raise self._lost()

    def _lost(self, error: CollectiveError | None = None) -> RankFailure:
        """What to raise now that something is wrong; see Roster.diagnose."""
        self._broken = self._roster.diagnose(error)
        return RankFailure(self._broken)
