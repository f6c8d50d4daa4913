"""Do the ranks still hold the same? For debugging: it copies all row state to the host and hashes it."""

from __future__ import annotations

import hashlib

import torch

from engine.batch.rows import Rows
from parallel.group import Group, RankFailure


def compare(rows: Rows, group: Group, step: int) -> None:
    """Compare tokens, page tables and lengths of all row slots over the ranks. Raises RankFailure, on every rank."""
    held = {"tokens": rows.tokens, "page tables": rows.page_table, "lengths": rows.computed}
    digests = [hashlib.blake2b(tensor.cpu().numpy().tobytes(), digest_size=8).digest() for tensor in held.values()]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=rows.device)
    everyone = group.all_gather(mine)
    differs = (everyone != everyone[0]).tolist()
    for rank, kinds in enumerate(differs):
        for kind, wrong in zip(held, kinds, strict=True):
            if wrong:
                raise RankFailure(f"rank {rank} and rank 0 disagree about {kind} after round {step}")
