"""Tensor-parallel group: the ranks that compute one model together, and their collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

_REDUCE, _GATHER = dist.AllreduceOptions(), AllgatherOptions()
_REDUCE.asyncOp = _GATHER.asyncOp = False  # run on the caller's stream


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another rank is gone, or did not join it in time."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        """rank: the rank that did not join, if known."""
        super().__init__(message)
        self.rank = rank


class RoundAbandoned(RuntimeError):
    """Another rank has abandoned the round that this collective belongs to."""


class RankFailure(RuntimeError):
    """The group is broken for good; the message names the rank and the reason."""


class Group:
    """One rank's end of a tensor-parallel group.

    Collectives carry tensors, never objects. Every rank makes the same calls in the same order with tensors of the
    same shape and dtype. A group of one sends nothing and costs nothing. This class uses a torch process group;
    ranks that share a machine's memory use parallel.shm.

    Collectives raise CollectiveError. If the group `can_abandon`, they also raise RoundAbandoned inside a round that
    another rank has abandoned. All ranks are in step again once they have called `agree`:

        begin_round()          on every rank, before any work of the round
        collectives            as many as each rank reaches
        abandon()              on a rank that has failed, or has got RoundAbandoned
        agree(failed)          on every rank; returns the ranks that failed, if any

    A second group, of the first ranks, begins and abandons its rounds together with the first group; the first group's
    `agree` covers both.
    """

    at_settling: Callable[[], None] | None = None
    """What `settle` does."""

    def __init__(self, comm: dist.ProcessGroup) -> None:
        """comm: this rank's process group, gloo for CPU tensors or NCCL for CUDA tensors; the caller closes it."""
        self._comm: dist.ProcessGroup | None = comm
        self.rank = comm.rank()
        self.size = comm.size()

    @classmethod
    def single(cls) -> Self:
        """Return the group of one, which needs no process group."""
        group = cls.__new__(cls)
        group._comm, group.rank, group.size = None, 0, 1
        return group

    def settle(self) -> None:
        """Wait for all ranks to have loaded, for as long as a start may take. Later collectives wait less long. Every
        rank calls this once."""
        if self.at_settling is not None:
            self.at_settling()

    @property
    def can_abandon(self) -> bool:
        """Whether all ranks can abandon a round that fails on one of them. A process group cannot cancel a collective
        that has begun: its ranks would wait for each other, and then take one collective's tensors for another's."""
        return self.size == 1

    def begin_round(self) -> None:
        """Start a round: the collectives from here to `agree` are abandoned together."""

    def abandon(self) -> None:
        """Notify the ranks that wait for this one that it joins no further collective of the round."""

    def agree(self, failed: bool) -> list[int]:
        """End the round. failed: this rank could not finish it, for a reason of its own and not because another rank
        abandoned it. Returns the ranks that failed, the same list on all ranks; if empty, all have finished. A group
        that cannot abandon exchanges nothing and returns this rank alone, if it failed."""
        return [self.rank] if failed else []

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place; returns x. x: contiguous, on the device of the group.

        Every rank gets the same bits. On CUDA the sum is enqueued on the current stream, which may be capturing a
        graph; the host does not wait.
        """
        if self._comm is not None and self.size > 1:
            try:
                _wait(self._comm.allreduce([x], _REDUCE))
            except RuntimeError as error:
                raise CollectiveError(str(error)) from error
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather every rank's x, in order of rank: [size, *x.shape]. x: contiguous, on the device of the group.

        A group of one returns a view of x.
        """
        if self._comm is None or self.size == 1:
            return x[None]
        gathered = x.new_empty((self.size, *x.shape))
        try:
            _wait(self._comm._allgather_base(gathered.view(-1), x.view(-1), _GATHER))
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return gathered


def _wait(work: dist.Work | None) -> None:
    """Wait on the host, for gloo. NCCL has enqueued the collective on the stream that continues with its result."""
    if work is not None:
        work.wait()
