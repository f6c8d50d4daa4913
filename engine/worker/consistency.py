"""Check that all ranks hold the same row state. For debugging: it copies the state to the host and hashes it."""

from __future__ import annotations

import hashlib

import torch

from engine.batch.row_state import RowState
from parallel.group import Group, RankFailure


def compare(state: RowState, group: Group, round_number: int) -> None:
    """Compare tokens, page tables and lengths of all row slots between ranks. Raises RankFailure, on every rank."""
    held = {"tokens": state.tokens, "page tables": state.page_table, "lengths": state.computed}
    digests = [hashlib.blake2b(tensor.cpu().numpy().tobytes(), digest_size=8).digest() for tensor in held.values()]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=state.device)
    everyone = group.all_gather(mine)
    differs = (everyone != everyone[0]).tolist()
    for rank, kinds in enumerate(differs):
        for kind, wrong in zip(held, kinds, strict=True):
            if wrong:
                raise RankFailure(f"rank {rank} and rank 0 disagree about {kind} after round {round_number}")
