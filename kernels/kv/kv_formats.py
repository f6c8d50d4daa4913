"""Registry of the formats that pools store KV in."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.kv.dense_kv import DenseKV
from kernels.kv.fp8_kv import Fp8KV
from kernels.kv.int4x2_kv import Int4x2KV
from kernels.kv.int8_kv import Int8KV
from kernels.kv.kv_format import KVFormat

_FORMATS: tuple[KVFormat, ...] = (DenseKV(), Fp8KV(), Int8KV(), Int4x2KV())
KV_FORMATS: Mapping[str, KVFormat] = {each.bits.name: each for each in _FORMATS}
"""Formats by name, a value of engine.cache.format."""
