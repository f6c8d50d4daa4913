"""Shared-memory group: processes on the CPUs of one machine exchange tensors through memory that all of them map.

Between two processes of one machine a sum of a few rows takes about ten microseconds this way. Through sockets it
involves the kernel and several threads and takes a hundred times as long; a decoder needs two sums per layer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from parallel.group import CollectiveError, Group, RoundAbandoned

_LINE = 8  # int64 values per rank: one cache line
_FLAG, _STATUS = 0, 1  # offsets in that line
_ROUND = 1 << 28
"""Exchange numbers per round; no round has that many exchanges."""
_SLOT_BYTES = 1 << 20
_SPINS, _YIELDS = 200, 200
_SLEEP_S = 50e-6
_CHECK_S = 0.02
_SEQ_CST = 5  # C's memory_order_seq_cst: a full fence


def available() -> bool:
    """Whether this machine supports shared-memory groups. They need anonymous shared files, and an order of memory
    accesses that all cores see."""
    try:
        find_fence(platform.machine())
    except OSError:
        return False
    return hasattr(os, "memfd_create")


def find_fence(machine: str) -> Callable[[], object] | None:
    """Return the function by which a core orders its memory accesses for the other cores; None: it need not.

    machine: the architecture, as `platform.machine` names it. Raises OSError if this architecture needs a function that
    is not there: Python has none. C's `atomic_thread_fence` is in GCC's run-time library, which comes with g++.
    """
    if machine in ("x86_64", "AMD64"):
        return None
    if machine not in ("aarch64", "arm64"):
        raise OSError(f"no memory fence is known for {machine}")
    try:
        fence = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except AttributeError as error:
        raise OSError(str(error)) from error
    fence.argtypes, fence.restype = (ctypes.c_int,), None
    return partial(fence, _SEQ_CST)


def create(size: int) -> int:
    """Allocate memory for a group of `size` ranks and for a second group of its first ranks. Returns a file descriptor
    that the caller owns; the memory has no name in any file system. Unused memory costs nothing."""
    fd = os.memfd_create("magicdec-group")
    os.ftruncate(fd, 2 * area_bytes(size))
    return fd


def area_bytes(size: int) -> int:
    """Return the bytes that a group of `size` ranks takes: whole pages of memory."""
    return _flag_bytes(size) + 2 * size * _SLOT_BYTES


def no_check() -> None:
    """Do nothing: the default for `while_waiting`."""


def _flag_bytes(size: int) -> int:
    return -(-size * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


class ShmGroup(Group):
    """Collectives over shared memory. Sums are added in the order of ranks.

    Each rank owns a flag, which holds the number of the last exchange that the rank has written its slot for, two
    verdicts, and one slot in each of two banks:

        flags  [ rank 0 | rank 1 | … ]
        bank 0 [ rank 0 | rank 1 | … ]      exchanges 0, 2, 4 …
        bank 1 [ rank 0 | rank 1 | … ]      exchanges 1, 3, 5 …

    Exchange k. A rank writes its slot of bank k % 2, raises its flag to k, waits until every flag is at least k, and
    reads the bank. It may overwrite its slot in exchange k + 2: by then it has seen every flag at k + 1 or above, and a
    rank raises its flag to k + 1 only after it has read exchange k.

    Abandoning a round. The exchanges of round r are numbered from r * _ROUND + 1. A rank that abandons the round raises
    its flag to the round's last number, so no rank waits for it. A rank in exchange k that sees a flag above k + 1
    detects this: otherwise a flag passes k + 1 only after this rank has raised its own to k + 1.

    Ending a round. At the end of round r each rank writes its verdict r % 2, which is 2r, or 2r + 1 if the rank has
    failed, and waits for the verdicts of all ranks. So no rank enters round r + 1 before all have left round r, whether
    they finished or abandoned it. A verdict is overwritten in round r + 2, when every rank has read it. All ranks leave
    the round of a second group when they leave that of the first.

    Order of memory accesses. Whatever a rank has read or written before it raises its flag must come before whatever
    another rank reads or writes once it has seen the flag; the same holds for verdicts. Both are read and written by
    Python as eight aligned bytes, which one load or store of the processor does. On x86 that suffices: a store becomes
    visible after all earlier loads and stores, and loads are done in their order. Arm promises neither, so there a full
    fence stands before each of these stores, and another one between the end of a wait and what follows. Two fences
    order what is before the one and after the other if the second core has seen the store between (C11, 7.17.4). Tests
    run this on x86; on Arm it has not run, and holds by this argument.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout_s: float, offset: int = 0) -> None:
        """fd: descriptor from `create`, which can be closed afterwards. timeout_s: time to wait for another rank.
        offset: start of this group's area, in bytes."""
        self.rank, self.size, self._comm = rank, size, None
        self._timeout_s = timeout_s
        self._map = mmap.mmap(fd, area_bytes(size), offset=offset)
        flag_bytes = _flag_bytes(size)
        self._flags = memoryview(self._map)[:flag_bytes].cast("q")
        self._banks = torch.frombuffer(self._map, dtype=torch.uint8, offset=flag_bytes).view(2, size, _SLOT_BYTES)
        self._typed: dict[torch.dtype, Tensor] = {}
        self._exchange = self._round = 0
        self._fence = find_fence(platform.machine())
        self.while_waiting: Callable[[], None] = no_check
        """Called repeatedly during a long wait; may raise, which ends the wait."""

    @property
    def can_abandon(self) -> bool:
        return True

    def begin_round(self) -> None:
        self._round += 1
        self._exchange = self._round * _ROUND

    def abandon(self) -> None:
        self._publish(_FLAG, (self._round + 1) * _ROUND - 1)

    def agree(self, failed: bool) -> list[int]:
        place, minimum = _STATUS + self._round % 2, 2 * self._round
        self._publish(place, minimum + failed)
        verdicts = [self._await(rank, place, minimum) for rank in range(self.size)]
        if self._fence:
            self._fence()
        return [rank for rank, verdict in enumerate(verdicts) if verdict > minimum]

    def all_reduce(self, x: Tensor) -> Tensor:
        flat = x.view(-1)
        for start, stop in self._chunks(x):
            part = flat[start:stop]
            torch.sum(self._exchange_parts(part), 0, out=part)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        flat, target = x.reshape(-1), gathered.view(self.size, -1)
        for start, stop in self._chunks(x):
            target[:, start:stop] = self._exchange_parts(flat[start:stop])
        return gathered

    @staticmethod
    def _chunks(x: Tensor) -> Iterator[tuple[int, int]]:
        step = _SLOT_BYTES // x.element_size()
        return ((start, min(start + step, x.numel())) for start in range(0, x.numel(), step))

    def _exchange_parts(self, x: Tensor) -> Tensor:
        """Write x [n] and wait for the others. Returns every rank's x, [size, n], valid until the next exchange."""
        banks = self._typed.get(x.dtype)
        if banks is None:
            banks = self._typed[x.dtype] = self._banks.view(x.dtype)
        self._exchange += 1
        bank = banks[self._exchange % 2, :, : x.numel()]
        bank[self.rank].copy_(x)
        self._publish(_FLAG, self._exchange)
        for rank in range(self.size):
            if self._await(rank, _FLAG, self._exchange) > self._exchange + 1:
                raise RoundAbandoned(f"rank {rank} has abandoned the round")
        if self._fence:
            self._fence()
        return bank

    def _publish(self, place: int, number: int) -> None:
        """Set this rank's number at `place`, after all that it has read and written so far."""
        if self._fence:
            self._fence()
        self._flags[self.rank * _LINE + place] = number

    def _await(self, rank: int, place: int, minimum: int) -> int:
        """Wait until the number of `rank` at `place` is at least `minimum`. Returns the number. Spins first, for a rank
        that is about to arrive; then yields the core; then sleeps between checks, for a rank that is late."""
        flags, index = self._flags, rank * _LINE + place
        for _ in range(_SPINS):
            if (found := flags[index]) >= minimum:
                return found
        for _ in range(_YIELDS):
            os.sched_yield()
            if (found := flags[index]) >= minimum:
                return found
        began = checked = time.monotonic()
        while (found := flags[index]) < minimum:
            time.sleep(_SLEEP_S)
            now = time.monotonic()
            if now - checked > _CHECK_S:
                checked = now
                self.while_waiting()
            if now - began > self._timeout_s:
                raise CollectiveError(f"rank {rank} did not answer within {self._timeout_s:g} s", rank)
        return found
