"""A group whose ranks are processes of one machine, on its CPUs: tensors pass through memory that all of them map.

Between two processes of one machine a sum of a few rows takes about ten microseconds this way; through sockets it
takes the kernel and several threads, a hundred times as long, and a decoder needs two sums per layer.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parallel.group import CollectiveError, Group, RoundAbandoned

_LINE = 8  # int64 of a rank's own: one cache line
_FLAG, _VERDICTS = 0, 1  # where in it
_ROUND = 1 << 28
"""More than the exchanges of any round."""
_SLOT_BYTES = 1 << 20
_SPINS, _YIELDS = 200, 200
_NAP_S = 50e-6
_CHECK_S = 0.02


def available() -> bool:
    """Whether this machine can: anonymous shared files, and stores that other cores see in the order they were made,
    which x86 promises and Arm does not."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


def create(size: int) -> int:
    """Memory for a group of `size` ranks and for one of its first ranks, as a file descriptor that the caller owns; it
    has no name anywhere. What is not used costs nothing."""
    fd = os.memfd_create("magicdec-group")
    os.ftruncate(fd, 2 * area_bytes(size))
    return fd


def area_bytes(size: int) -> int:
    """What a group of `size` ranks takes: whole pages."""
    return _flag_bytes(size) + 2 * size * _SLOT_BYTES


def no_check() -> None:
    """Do nothing: the default for `while_waiting`."""


def _flag_bytes(size: int) -> int:
    return -(-size * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


class ShmGroup(Group):
    """Collectives over shared memory, sums in the order of rank.

    Each rank has a flag, the number of the last exchange that it has written for, two verdicts, and a slot in each of
    two banks:

        flags  [ rank 0 | rank 1 | … ]
        bank 0 [ rank 0 | rank 1 | … ]      exchanges 0, 2, 4 …
        bank 1 [ rank 0 | rank 1 | … ]      exchanges 1, 3, 5 …

    In exchange k a rank writes its slot of bank k % 2, raises its flag to k, waits for everyone's flag, and reads. It
    may overwrite that bank in exchange k + 2: it has then seen every flag at k + 1, which a rank raises only after it
    has read k.

    The exchanges of round r are numbered from r * _ROUND + 1. A rank that gives a round up raises its flag to the last
    number of the round, so nobody waits for it: who is at k and sees more than k + 1 knows. At the end of round r each
    rank writes verdict r % 2, twice the round and one more if it has failed, and waits for everyone's. So nobody enters
    round r + 1 before all have left r, whatever became of it; and a verdict is overwritten in round r + 2, when every
    rank has read it. A second group of the first ranks is left by all when the first is.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout_s: float, offset: int = 0) -> None:
        """fd: of `create`; it can be closed afterwards. timeout_s: how long to wait for another rank. offset: where
        this group's area begins."""
        self.rank, self.size, self._comm = rank, size, None
        self._timeout_s = timeout_s
        self._map = mmap.mmap(fd, area_bytes(size), offset=offset)
        flag_bytes = _flag_bytes(size)
        self._flags = memoryview(self._map)[:flag_bytes].cast("q")
        self._banks = torch.frombuffer(self._map, dtype=torch.uint8, offset=flag_bytes).view(2, size, _SLOT_BYTES)
        self._typed: dict[torch.dtype, Tensor] = {}
        self._exchange = self._round = 0
        self.while_waiting: Callable[[], None] = no_check
        """Called now and then during a long wait; may raise."""

    @property
    def can_abandon(self) -> bool:
        return True

    def begin_round(self) -> None:
        self._round += 1
        self._exchange = self._round * _ROUND

    def abandon(self) -> None:
        self._flags[self.rank * _LINE + _FLAG] = (self._round + 1) * _ROUND - 1

    def agree(self, failed: bool) -> list[int]:
        place, least = _VERDICTS + self._round % 2, 2 * self._round
        self._flags[self.rank * _LINE + place] = least + failed
        return [rank for rank in range(self.size) if self._await(rank, place, least) > least]

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.view(-1)
        for start, stop in self._chunks(x):
            part = flat[start:stop]
            torch.sum(self._swap(part), 0, out=part)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        flat, target = x.reshape(-1), gathered.view(self.size, -1)
        for start, stop in self._chunks(x):
            target[:, start:stop] = self._swap(flat[start:stop])
        return gathered

    @staticmethod
    def _chunks(x: Tensor) -> Iterator[tuple[int, int]]:
        step = _SLOT_BYTES // x.element_size()
        return ((start, min(start + step, x.numel())) for start in range(0, x.numel(), step))

    def _swap(self, x: Tensor) -> Tensor:
        """Write x [n] and wait for the others. Returns everyone's, [size, n], good until the next exchange but one."""
        banks = self._typed.get(x.dtype)
        if banks is None:
            banks = self._typed[x.dtype] = self._banks.view(x.dtype)
        self._exchange += 1
        bank = banks[self._exchange % 2, :, : x.numel()]
        bank[self.rank].copy_(x)
        self._flags[self.rank * _LINE + _FLAG] = self._exchange
        for rank in range(self.size):
            if self._await(rank, _FLAG, self._exchange) > self._exchange + 1:
                raise RoundAbandoned(f"rank {rank} has given up the round")
        return bank

    def _await(self, rank: int, place: int, least: int) -> int:
        """Wait until another rank's number at `place` is at least this; returns it. Spin while the rank is about to
        come, give the core away when it is not, and sleep when it is late."""
        flags, index = self._flags, rank * _LINE + place
        for _ in range(_SPINS):
            if (found := flags[index]) >= least:
                return found
        for _ in range(_YIELDS):
            os.sched_yield()
            if (found := flags[index]) >= least:
                return found
        began = checked = time.monotonic()
        while (found := flags[index]) < least:
            time.sleep(_NAP_S)
            now = time.monotonic()
            if now - checked > _CHECK_S:
                checked = now
                self.while_waiting()
            if now - began > self._timeout_s:
                raise CollectiveError(f"rank {rank} did not answer within {self._timeout_s:g} s", rank)
        return found
