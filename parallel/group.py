"""The ranks that compute one model together, and what they say to each other about tensors."""

from __future__ import annotations

from typing import Self

import torch.distributed as dist
from torch import Tensor


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another one is gone, or did not come in time."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        """rank: which one did not come, where that is known."""
        super().__init__(message)
        self.rank = rank


class RankFailure(RuntimeError):
    """The group is broken for good; the message names the rank and says why."""


class Group:
    """One rank's end of a tensor-parallel group.

    Only tensors travel, never objects. Every rank makes the same calls in the same order with tensors of the
    same shape and dtype. A group of one does nothing and costs nothing. This one talks through a torch process
    group; ranks that share a machine's memory have parallel.shared.

    Collectives raise CollectiveError.
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

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place; returns x. x: contiguous, on the device of the group.

        Every rank ends with the same bits. On CUDA the sum is enqueued on the current stream; the host does
        not wait.
        """
        if self._comm is not None and self.size > 1:
            try:
                self._comm.allreduce([x]).wait()
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
            self._comm._allgather_base(gathered.view(-1), x.view(-1)).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return gathered
