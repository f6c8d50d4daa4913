"""Start of symmetric memory: the ranks of a group set it up and check its sums, and all use it or none does."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from parallel.group import CollectiveError
from parallel.symm_mem import SymmetricGroup, SymmetricMemory, largest_sums

_LIMIT_S = 30.0
"""Time that a rank waits for another to map its memory, and for a sum to end."""
_COMPARED = 1 << 16
"""Elements of each sum whose bits all ranks compare."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class SymmetricUnavailable(CollectiveError):
    """Symmetric memory does not work on this machine, and the settings demand it; or its kernels do not end."""


class _Stuck(RuntimeError):
    """A kernel on this rank's GPU does not end, so that nothing else can run there."""


class SharedSteps:
    """Steps that every rank takes at the same time. A step succeeds on all ranks or on none."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """store: used by this group only."""
        self._store, self._rank, self._size = store, rank, size
        self._count = 0

    def take(self, work: Callable[[], T]) -> T:
        """Run this rank's part of the next step and wait for the others'. Returns its result.

        Raises CollectiveError, on all ranks and with the first cause, if any rank's part raised an Exception;
        SymmetricUnavailable if a GPU is stuck.
        """
        verdict = "done"
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must learn of it
            verdict = "stuck" if isinstance(error, _Stuck) else "failed"
            cause = f"rank {self._rank}: {_first_line(error)}"
            self._store.compare_set("symmetric/cause", "", cause)  # only the first has an effect
        verdicts = self.exchange(verdict)
        if "stuck" in verdicts:
            raise SymmetricUnavailable(f"{self._cause()}: set it to nccl")
        if "failed" in verdicts:
            raise CollectiveError(self._cause())
        return result

    def exchange(self, mine: str) -> list[str]:
        """Exchange texts. Returns those of all ranks, in their order."""
        self._count += 1
        self._store.set(f"symmetric/{self._count}/{self._rank}", mine)
        return [self._store.get(f"symmetric/{self._count}/{rank}").decode() for rank in range(self._size)]

    def _cause(self) -> str:
        return self._store.get("symmetric/cause").decode()


def join_symmetric(
    comm: dist.ProcessGroup, store: Store, device: torch.device, *, fall_back: bool
) -> SymmetricGroup | None:
    """Set up symmetric memory for the ranks of `comm`, which call this at the same time and all get the same result.

    store: used by this group only. fall_back: return None, with a line in the log, if symmetric memory does not work on
    every rank; else raise SymmetricUnavailable. Raises CollectiveError if a rank is gone.
    """
    steps = SharedSteps(store, comm.rank(), comm.size())
    try:
        group = _set_up(steps, comm, store, device)
    except SymmetricUnavailable:
        raise
    except CollectiveError as error:
        if not fall_back:
            raise SymmetricUnavailable(f"no symmetric memory ({error}): set it to auto or nccl") from error
        if comm.rank() == 0:
            log.warning("GPUs sum through NCCL alone, without symmetric memory (%s)", str(error))
        return None
    if comm.rank() == 0:
        largest = largest_sums(group.size, group.multicast)
        limits = {
            algorithm: f"{algorithm} up to {nbytes / 2**20:.2g} MiB" for (algorithm, _), nbytes in largest.items()
        }
        log.info("GPUs sum through symmetric memory: %s", ", ".join(limits.values()))
    return group


def _set_up(steps: SharedSteps, comm: dist.ProcessGroup, store: Store, device: torch.device) -> SymmetricGroup:
    # Names are never released, and a process can have many groups.
    name = steps.exchange(f"magicdec-{uuid.uuid4().hex}")[0]
    own = SymmetricMemory(comm, device, name)
    steps.take(own.check_links)
    steps.take(own.allocate)
    timed: Any = store  # its stub lacks the property
    limit = timed.timeout

    def connect() -> bool:
        # A rank that fails leaves the others waiting for it.
        store.set_timeout(min(limit, timedelta(seconds=_LIMIT_S)))
        try:
            return own.connect()
        finally:
            store.set_timeout(limit)

    multicast = steps.take(connect)
    multicast = "no" not in steps.exchange("yes" if multicast else "no")
    group = SymmetricGroup(comm, own.memory, own.sums(), multicast=multicast)
    check_sums(steps, group, device)
    return group


def check_sums(steps: SharedSteps, group: SymmetricGroup, device: torch.device) -> None:
    """Compare the largest sum of each algorithm with NCCL's, as it is and from a graph, and its bits between ranks.
    Raises as SharedSteps.take does."""
    for (algorithm, dtype), nbytes in largest_sums(group.size, group.multicast).items():
        _check_sum(steps, group, nbytes // dtype.itemsize, dtype, device, algorithm)


def _check_sum(
    steps: SharedSteps, group: SymmetricGroup, size: int, dtype: torch.dtype, device: torch.device, algorithm: str
) -> None:
    what = f"{algorithm} sums of {dtype}".replace("torch.", "")
    generator = torch.Generator(device).manual_seed(group.rank)

    def make() -> tuple[Tensor, Tensor]:
        given = torch.randint(-8, 8, (size,), generator=generator, device=device).to(dtype)  # sums are exact
        return given, torch.empty_like(given)

    given, x = steps.take(make)

    def add() -> None:
        group.all_reduce(x.copy_(given))

    def run() -> None:
        add()
        _wait(device, what)  # in the same step: where another rank has failed, this GPU waits for it in vain

    def capture() -> Callable[[], None]:
        return _capture(add)

    def compare() -> None:
        if not torch.equal(x, group.all_reduce_with_nccl(given.clone())):
            raise RuntimeError(f"{what} are wrong")

    def compare_bits() -> None:
        bits = x[:_COMPARED].view(torch.int32)
        if not (group.all_gather(bits) == bits).all():
            raise RuntimeError(f"{what} differ between ranks")

    steps.take(run)
    steps.take(compare)
    replay = steps.take(capture)

    def run_graph() -> None:
        given.neg_().add_(1)
        replay()
        _wait(device, what)

    steps.take(run_graph)
    steps.take(compare)
    given.normal_(generator=generator)  # these sums depend on the order of their terms
    steps.take(run)
    steps.take(compare_bits)


def _capture(work: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # Other threads may call the driver during the capture: NCCL's watchdog does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _wait(device: torch.device, what: str) -> None:
    """Wait for the device. Raises _Stuck."""
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + _LIMIT_S
    while not done.query():
        if time.monotonic() > deadline:
            raise _Stuck(f"{what} do not end within {_LIMIT_S:g} s")
        time.sleep(1e-3)


def _first_line(error: Exception) -> str:
    """Return what an error says, without the stack that torch appends."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
