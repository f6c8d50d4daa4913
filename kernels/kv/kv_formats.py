"""Registry of the formats that pools store KV in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kernels.kv.int4x2_kv import Int4x2KV
from kernels.kv.int8_kv import Int8KV
from kernels.kv.kv_pool import FP8
from kernels.kv.sealed_format import SealedFormat

SEALED_FORMATS: Mapping[str, SealedFormat] = {each.name: each for each in (Int8KV(), Int4x2KV())}
"""Formats that seal pages."""
POOL_DTYPES: Mapping[str, torch.dtype] = {"fp8": FP8}
"""Numbers of pools, by format, that are not those of the model."""
