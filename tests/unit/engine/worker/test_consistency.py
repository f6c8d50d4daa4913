"""Hashes of the KV in pages."""

from __future__ import annotations

import pytest
import torch

from engine.worker import consistency
from kernels.kv.kv_pool import KVPool
from parallel.group import Group
from tests.support.rig import CPU


@pytest.mark.parametrize("copied", [1, 3 * 2 * 2 * 2 * 4 * 8 * 2, 1 << 24])
def test_each_page_has_its_own_hash(monkeypatch: pytest.MonkeyPatch, copied: int) -> None:
    """However many are copied at a time, in whatever order they are listed."""
    monkeypatch.setattr(consistency, "_COPIED_BYTES", copied)
    pool = KVPool(
        num_layers=2, num_pages=9, page_size=4, kv_heads=2, head_dim=8, dtype=torch.bfloat16, device=CPU, scratch=True
    )
    pool._data.normal_()
    pool._data[:, :, 3] = pool._data[:, :, 5]

    def hashes(*pages: int) -> list[int]:
        return consistency.hash_pages(pool, pages, Group.single())

    alone = {page: hashes(page)[0] for page in range(9)}
    assert len(set(alone.values())) == 8
    assert alone[3] == alone[5]
    order = [7, 0, 3, 8, 5, 1, 0, 2]
    assert hashes(*order) == [alone[page] for page in order]
    for layer, kind, head, slot, element in ((0, 0, 0, 0, 0), (1, 1, 1, 3, 7)):
        pool._data[layer, kind, 5, head, slot, element] += 1
        changed = hashes(*range(9))
        assert [page for page in range(9) if changed[page] != alone[page]] == [5]
        alone[5] = changed[5]
