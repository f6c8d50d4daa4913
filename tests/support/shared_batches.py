"""Batches whose rows share pages, for tests of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import shared_reading
from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import LayerKV


def always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sharing pay however little it saves."""
    monkeypatch.setattr(shared_reading, "LAUNCH_BYTES", -(1 << 60))


def check_against_reference(
    found: tuple[Tensor, Tensor], batch: AttentionBatch, layer: LayerKV, q: Tensor, scale: float
) -> None:
    """Compare attention over `batch`, and its log-sum-exp, with the reference, which reads every row by itself."""
    oracle = ReferenceAttention(layer.k.shape[2])
    oracle.plan(batch)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[q.dtype]
    for ours, expected in zip(found, oracle.run(layer, q, scale), strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)
