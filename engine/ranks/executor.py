"""Executor of the other ranks, on rank 0: starts them, sends them rounds, detects when one is gone."""

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
from engine.logs import current_setup
from engine.oom import OutOfMemory, describe_failure
from engine.plan import RoundPlan, WeightStep
from engine.ranks.health import RankHealth
from engine.ranks.protocol import PING, RankLaunch, WeightBytes
from parallel import rendezvous, shm
from parallel.channel import Channel, Link
from parallel.group import CollectiveError, Group, RankFailure
from parallel.launch import RankProcesses
from parallel.rendezvous import Join
from parallel.symm_start import SymmetricUnavailable
from parallel.tcp_bootstrap import Connections

RANK_COMMAND = (sys.executable, "-m", "engine.processes.start_rank")
_PINGS = 4
"""Number of pings that an idle engine sends within the time-out of a rank."""


class RankExecutor:
    """Executor of the ranks 1 … size - 1 of one group. Reports every failure of theirs as a RankFailure."""

    def __init__(
        self,
        links: Mapping[int, Link],
        *,
        timeout_s: float,
        processes: RankProcesses | None = None,
        hosts: Mapping[int, str] | None = None,
        memory: int | None = None,
    ) -> None:
        """links: the link to each rank, by rank; owned. timeout_s: time-out of a collective. processes: the ranks'
        processes, if they are this process's children; owned. hosts: the ranks' hosts, for messages. memory: file
        descriptor of the ranks' shared memory; owned.
        """
        self._channel = Channel(links)
        self._processes = processes
        self._health = RankHealth(self._channel, timeout_s=timeout_s, processes=processes, hosts=hosts)
        self._memory = memory
        self._timeout_s = timeout_s
        self._expected_reports = 0  # number from each rank, once all pings are answered
        self._pinged_at = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._broken: str | None = None
        self.group: Group
        self._join_first: Callable[[int], Group | None]
        self._checking: list[shm.ShmGroup] = []  # groups that call `check` while they wait

    @classmethod
    def launch(cls, config: EngineConfig, device: torch.device) -> RankExecutor:
        """Start the ranks' processes and join them in a group. They load afterwards: see `wait_ready`.

        config: with every setting resolved. device: rank 0's. Raises ConfigError, RankFailure; nothing remains then.
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
        memory = shm.create(size) if transport == "shared" else None
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
        join.fall_back = config.collectives == "auto"
        ranks._join(join, config, device, store, rendezvous.LOOPBACK)
        return ranks

    @classmethod
    def connect(
        cls, config: EngineConfig, device: torch.device, connections: Connections, *, one_machine: bool, address: str
    ) -> RankExecutor:
        """Join ranks that torchrun has started, on any host; otherwise as `launch`.

        one_machine: all ranks are on this machine. address: this host's, at which the others can reach it.
        """
        size = config.tensor_parallel_size
        ranks = cls(connections.links, timeout_s=config.step_timeout_s, hosts=connections.hosts)
        try:
            transport = rendezvous.choose(device, config.collectives, one_machine)
        except ValueError as error:
            ranks.close()
            raise ConfigError(f"engine.collectives: {error}") from error
        join = Join(0, size, transport, config.step_timeout_s, start_timeout_s=config.start_timeout_s)
        join.fall_back = config.collectives == "auto"
        if transport == "shared":
            ranks._memory = join.fd = shm.create(size)
            join.holder = os.getpid()
        ranks._join(join, config, device, connections.store, address)
        return ranks

    def _join(self, join: Join, config: EngineConfig, device: torch.device, store: Store | None, address: str) -> None:
        """Shake hands with the ranks and join the group. join: rank 0's. Raises ConfigError or RankFailure, after
        `close`."""
        try:
            self.handshake(join, config)
            self.group = rendezvous.join(join, device, store, address)
        except SymmetricUnavailable as error:
            self.close()
            raise ConfigError(f"engine.collectives: {error}") from error
        except CollectiveError as error:
            failure = self._failure(error)
            self.close()
            raise failure from error
        except BaseException:
            self.close()
            raise
        self._join_first = lambda count: rendezvous.join_first(count, join, device, store, address)
        self._check_while_waiting(self.group)

    def join_first(self, count: int) -> Group | None:
        """Join, as rank 0, a second group of the first `count` ranks: see rendezvous.join_first. Raises ConfigError,
        RankFailure."""
        try:
            group = self._join_first(count)
        except SymmetricUnavailable as error:
            raise ConfigError(f"engine.collectives: {error}") from error
        except CollectiveError as error:
            raise self._failure(error) from error
        self._check_while_waiting(group)
        return group

    def _check_while_waiting(self, group: Group | None) -> None:
        if isinstance(group, shm.ShmGroup):
            group.while_waiting = self.check
            self._checking.append(group)

    def handshake(self, join: Join, config: EngineConfig) -> None:
        """Send each rank its place in the group, wait for a report of each, and send the settings. join: rank 0's."""
        level, format = current_setup()
        for rank in self._health.ranks:
            launch = RankLaunch(msgspec.structs.replace(join, rank=rank), level, format)
            self._channel.send(rank, self._encoder.encode(launch))
        self._await_reports(1, config.start_timeout_s)
        self._channel.broadcast(config.model_dump_json().encode())

    def wait_ready(self, timeout_s: float) -> None:
        """Return once every rank has loaded. Raises RankFailure."""
        self._await_reports(2, timeout_s)

    @contextmanager
    def round(self, plan: RoundPlan | WeightStep) -> Iterator[None]:
        """Send the plan or step to all ranks; the body of the `with` block runs rank 0's share.

        Raises RankFailure, also from all later calls. Passes OutOfMemory on: all ranks abandon the round then.
        """
        self.check()
        data = self._encoder.encode(plan)
        try:
            self._channel.broadcast(data)
            if self._health.broken:  # else the collectives would wait for it as long again
                raise self._failure()
            yield
        except OutOfMemory:
            raise
        except CollectiveError as error:
            raise self._failure(error) from error
        except RankFailure as failure:
            self._broken = str(failure)
            raise
        except Exception as error:
            self._broken = f"rank 0 {describe_failure(error)}"
            raise RankFailure(self._broken) from error
        except BaseException as error:
            # Any interruption of a round, Ctrl-C included, leaves the other ranks in the middle of it.
            self._broken = f"a round was cut short by {type(error).__name__}"
            raise

    def perform(self, step: WeightStep, own: Callable[[WeightStep], str | None], timeout_s: float) -> str | None:
        """Perform a step on all ranks. Returns why one refuses it, if any does.

        own: performs rank 0's share. timeout_s: time that the others may take longer. Raises RankFailure.
        """
        with self.round(step):
            refusal = own(step)
        self._await_reports(self._expected_reports + 1, timeout_s)
        others = self._health.take_refusal()
        return others if refusal is None else refusal

    def check(self) -> None:
        """Raise RankFailure if a rank is gone. Costs one system call."""
        if self._broken is not None:
            raise RankFailure(self._broken)
        self._health.listen(0)
        if self._health.broken:
            raise self._failure()

    def ping(self) -> float:
        """Ping all ranks at intervals, while no round runs that would detect a missing one.

        Returns the seconds until the next call is due. A rank that does not answer is detected within the time-out.
        Unanswered pings count, not time: while this process itself is stopped, it sends none, and it reads the answers
        that arrived meanwhile before it sends the next one. A round may start before a late answer has arrived; the
        rank then answers before it runs the round. Raises RankFailure.
        """
        self.check()
        interval = self._timeout_s / _PINGS
        left = self._pinged_at + interval - time.monotonic()
        if left > 0:
            return left
        if late := self._health.late(self._expected_reports - (_PINGS - 2)):
            raise self._failure(CollectiveError("no sign of life", late[0]))
        self._channel.broadcast(PING)
        self._expected_reports += 1
        self._pinged_at = time.monotonic()
        return interval

    @property
    def weight_bytes(self) -> WeightBytes:
        """Bytes of these ranks' shards, summed; complete once all ranks are ready."""
        return self._health.weight_bytes

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that are this process's children, by rank."""
        return self._processes.pids if self._processes else {}

    def close(self) -> None:
        """End all ranks. No process, socket or memory of theirs remains."""
        self._broken = "the engine was closed"
        for group in self._checking:
            group.while_waiting = shm.no_check  # break the reference cycle, which would keep the memory
        self._channel.close()
        if self._processes is not None:
            self._processes.close()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def _await_reports(self, number: int, timeout_s: float) -> None:
        self._expected_reports = number
        deadline = time.monotonic() + timeout_s
        while late := self._health.late(number):
            left = deadline - time.monotonic()
            if left <= 0:
                self._broken = f"{self._health.names(late)} not ready after {timeout_s:g} s"
                raise RankFailure(self._broken)
            self._health.listen(left)
            if self._health.broken:
                raise self._failure()

    def _failure(self, error: CollectiveError | None = None) -> RankFailure:
        """Diagnose a failure and return the error to raise; see RankHealth.diagnose."""
        self._broken = self._health.diagnose(error)
        return RankFailure(self._broken)
