"""Fixtures for model tests: rows over a paged pool, and ranks as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.cpu.compiler import SOFTWARE_TILES, InstructionSet, KernelsUnavailable, supported
from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.kv.kv_pool import KVPool, LayerKV
from models.batch import ForwardBatch
from models.decoder import DecoderModel
from models.default import user_cache
from parallel.group import Group
from tests.support.profiles import is_all

CPU = torch.device("cpu")

Result = TypeVar("Result")


def pool_layer(pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    """One layer of a pool filled with random numbers."""
    pool = KVPool(
        num_layers=1,
        num_pages=pages,
        page_size=page_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
    )
    pool._data.normal_()
    return pool.layer(0)


@cache
def compiled() -> CpuOps:
    """Kernels compiled for this CPU. Skips the test if they are unavailable."""
    try:
        return CpuOps(CpuKernels(user_cache() / "kernels"))
    except KernelsUnavailable as reason:
        pytest.skip(f"no CPU kernels: {reason}")


def as_tested(target: InstructionSet) -> InstructionSet:
    """The set as this profile of tests compiles it. `make test` tests this processor's own set and AVX2, which most
    others have, as they are served. The rest take a third of the time to compile."""
    if is_all() or target == supported()[0] or target.name == "avx2":
        return target
    return replace(target, flags=(*target.flags, "-O1"))


def sets_to_test() -> list[InstructionSet]:
    """The sets that run on this processor, as `as_tested`; tiles in software too."""
    sets = supported()
    if SOFTWARE_TILES.features <= sets[0].features:
        sets.append(SOFTWARE_TILES)
    return [as_tested(each) for each in sets]


class PagedRows:
    """Rows of one model, of whose layers all slide or none, over one pool. Pages are assigned in random order, and the
    pool starts full of junk values."""

    def __init__(self, model: DecoderModel, lengths: Sequence[int], page_size: int, seed: int = 0) -> None:
        """lengths: largest number of tokens of each row."""
        model = model.keeping_all_kv()
        assert not model.num_sliding_layers, "see tests.support.oracle_models"
        self.model, self.page_size = model, page_size
        widths = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(seed))
        self.pages = torch.zeros(len(lengths), max(widths), dtype=torch.int64)
        for row, width in enumerate(widths):
            self.pages[row, :width], order = order[:width], order[width:]
        self.computed = [0] * len(lengths)
        self.attention = model.ops.attention(page_size, model.head_dim)
        self.pool = model.make_pool(sum(widths) + 3, page_size)
        self.pool._data.fill_(1e3)

    def forward(self, feed: Mapping[int, Sequence[int]], wanted: Mapping[int, Sequence[int]]) -> Tensor:
        """Append feed[row] to each row in `feed`. Returns logits at wanted[row], indices into feed[row]."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_index: list[int] = []
        for row, new in feed.items():
            logit_index += [len(tokens) + i for i in wanted.get(row, ())]
            for position in range(self.computed[row], self.computed[row] + len(new)):
                page = int(self.pages[row, position // self.page_size])
                positions.append(position)
                slots.append(page * self.page_size + position % self.page_size)
            tokens += new
            self.computed[row] += len(new)
        attention = AttentionBatch(
            query_lengths=[len(new) for new in feed.values()],
            kv_lengths=[self.computed[row] for row in feed],
            pages=self.pages[list(feed)],
            window=self.model.window,
        )
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            attention=attention,
            logit_index=torch.tensor(logit_index, dtype=torch.int64),
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.pool, self.attention)


class ThreadGroup(Group):
    """Group whose ranks are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Tensor]) -> None:
        """barrier, board: shared by all ranks; the board has one entry per rank."""
        self.rank, self.size = rank, len(board)
        self._barrier, self._board = barrier, board

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.all_gather(x).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        self._board[self.rank] = x
        self._barrier.wait()
        gathered = torch.stack(self._board)
        self._barrier.wait()
        return gathered


def run_ranks(size: int, work: Callable[[Group], Result]) -> list[Result]:
    """Run `work` on every rank of a ThreadGroup. Returns the results in rank order."""
    barrier = threading.Barrier(size, timeout=60)
    board = [torch.empty(0)] * size

    def rank_work(rank: int) -> Result:
        try:
            return work(ThreadGroup(rank, barrier, board))
        except BaseException:
            barrier.abort()  # otherwise the other ranks would wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_work, range(size)))
