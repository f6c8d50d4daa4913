"""Debug checks: that all ranks hold the same row state, and what KV pages hold. They copy to the host and hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.row_state import RowState
from kernels.kv.kv_pool import KVPool
from parallel.group import Group, RankFailure

_COPIED_BYTES = 1 << 24
"""KV copied at a time: a copy per page takes longer than the hash of a small page."""


def compare(state: RowState, group: Group, round_number: int) -> None:
    """Compare tokens, page tables and lengths of all row slots between ranks. Raises RankFailure, on every rank."""
    held = {
        "tokens": state.tokens,
        "page tables": state.page_table,
        "sealed pages": state.sealed_table,
        "pages of sliding layers": state.sliding_table,
        "lengths": state.computed,
    }
    mine = torch.tensor([_hash(tensor) for tensor in held.values()], device=state.device)
    everyone = group.all_gather(mine)
    differs = (everyone != everyone[0]).tolist()
    for rank, kinds in enumerate(differs):
        for kind, wrong in zip(held, kinds, strict=True):
            if wrong:
                raise RankFailure(f"rank {rank} and rank 0 disagree about {kind} after round {round_number}")


def hash_pages(pool: KVPool, pages: Sequence[int], group: Group) -> list[int]:
    """Hash the KV of pages on all ranks together: the sum of each rank's hash, modulo 2^64. 0: pages of no layer."""
    device = pool.device
    if not pool.num_layers:
        return [0] * len(pages)
    count = max(1, _COPIED_BYTES // pool.bytes_per_page)
    hashes = []
    for first in range(0, len(pages), count):
        index = torch.tensor(pages[first : first + count], device=device)
        hashes += [_digest(page) for page in _bytes(pool.page_bytes(index))]
    mine = torch.tensor(hashes, dtype=torch.int64, device=device)
    return [int(each) for each in group.all_reduce(mine).tolist()]


def _hash(tensor: Tensor) -> int:
    return _digest(_bytes(tensor))


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return the bytes of each row of a tensor."""
    data: npt.NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).cpu().numpy()
    return data


def _digest(data: npt.NDArray[np.uint8]) -> int:
    return int.from_bytes(hashlib.blake2b(data.data, digest_size=8).digest(), "little", signed=True)
