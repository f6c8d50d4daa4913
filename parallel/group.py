"""The ranks that compute one model together, and what they say to each other about tensors."""

from __future__ import annotations

from typing import Self

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

_REDUCE, _GATHER = dist.AllreduceOptions(), AllgatherOptions()
_REDUCE.asyncOp = _GATHER.asyncOp = False  # on the caller's stream


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another one is gone, or did not come in time."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        """rank: which one did not come, where that is known."""
        super().__init__(message)
        self.rank = rank


class RoundAbandoned(RuntimeError):
    """Another rank has given up the round that this collective belongs to."""


class RankFailure(RuntimeError):
    """The group is broken for good; the message names the rank and says why."""


class Group:
    """One rank's end of a tensor-parallel group.

    Only tensors travel, never objects. Every rank makes the same calls in the same order with tensors of the
    same shape and dtype. A group of one does nothing and costs nothing. This one talks through a torch process
    group; ranks that share a machine's memory have parallel.shm.

    Collectives raise CollectiveError. Where a group `can_abandon`, they also raise RoundAbandoned, inside a round that
    another rank has given up, and all ranks are in step again once they have called `agree`:

        begin_round()          on every rank, before anything of the round is done
        collectives            as many as each rank comes to
        abandon()              on a rank that has failed, or has got RoundAbandoned
        agree(failed)          on every rank: who has failed, if anyone

    A second group of the first ranks begins and gives up its rounds with the first, whose `agree` is for both.
    """

    def __init__(self, comm: dist.ProcessGroup) -> None:
        """comm: this rank's end, gloo for CPU tensors or NCCL for CUDA tensors; the caller closes it."""
        self._comm: dist.ProcessGroup | None = comm
        self.rank = comm.rank()
        self.size = comm.size()

    @classmethod
    def single(cls) -> Self:
        """The group of one: needs no process group."""
        group = cls.__new__(cls)
        group._comm, group.rank, group.size = None, 0, 1
        return group

    @property
    def can_abandon(self) -> bool:
        """Whether a round that fails on one rank can be given up by all. What a process group has begun can't be
        called back: its ranks would wait for each other, and then take one collective's tensors for another's."""
        return self.size == 1

    def begin_round(self) -> None:
        """Collectives from here to `agree` are given up together."""

    def abandon(self) -> None:
        """Let those who wait for this rank know that it comes to no further collective of the round."""

    def agree(self, failed: bool) -> list[int]:
        """End the round. failed: this rank could not finish it, and not because of another. Returns the ranks that say
        so, the same on all ranks; if there are none, all have finished. A group that can't give up asks nobody."""
        return [self.rank] if failed else []

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place; returns x. x: contiguous, on the device of the group.

        Every rank ends with the same bits. On CUDA the sum is enqueued on the current stream, also where that is being
        captured in a graph; the host does not wait.
        """
        if self._comm is not None and self.size > 1:
            try:
                _wait(self._comm.allreduce([x], _REDUCE))
            except RuntimeError as error:
                raise CollectiveError(str(error)) from error
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in order of rank: [size, *x.shape]. x: contiguous, on the device of the group.

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
    """On the host for gloo; NCCL has enqueued it on the stream that goes on with it."""
    if work is not None:
        work.wait()
