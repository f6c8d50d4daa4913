"""Layers of a pool in each KV format, with sinks and without."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.kv.grouped_codes import GroupedCodes
from kernels.kv.kv_bits import SEALED_GROUP
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import FP8, LayerKV, SealedKV

SEALING = {name: each for name, each in KV_FORMATS.items() if isinstance(each, GroupedCodes)}
"""Formats that seal pages."""
KINDS = ("fp8", "int8", "int4x2", "upper")
"""Kinds of layers beside dense ones. upper: int4x2, as drafts read it."""


def layer_of(kind: str, k: Tensor, v: Tensor, num_sealed: int = 0) -> LayerKV:
    """Make a layer. k, v: [num_sealed + exact pages, kv_heads, page_size, head_dim], numbers of its pages."""
    if kind == "fp8":
        return LayerKV(k.to(FP8), v.to(FP8))
    if kind == "dense":
        return LayerKV(k, v)
    format, (_, kv_heads, page_size, head_dim) = SEALING[kind.replace("upper", "int4x2")], k.shape
    assert page_size == SEALED_GROUP
    sizes = format.bits.record_bytes(head_dim)
    records = [torch.zeros(num_sealed, kv_heads, size, dtype=torch.uint8, device=k.device) for size in sizes]
    layer = LayerKV(k, v, sealed=SealedKV(records[0], records[1], format, drafts=kind == "upper"))
    if num_sealed:
        some = torch.arange(num_sealed, device=k.device)
        layer.seal(some, some)
    exact = [part[num_sealed:].contiguous() for part in (k, v)]
    return replace(layer, k=exact[0], v=exact[1])


def draw_sinks(layer: LayerKV, heads: int, dtype: torch.dtype = torch.float32) -> LayerKV:
    """Add random sinks of this number of query heads: some above all scores, some below."""
    sinks = (2 + 4 * torch.randn(heads)).to(layer.k.device, dtype)
    return replace(layer, sinks=sinks)
