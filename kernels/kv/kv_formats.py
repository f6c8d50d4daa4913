"""Registry of the formats that seal pages."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.kv.int4x2_kv import Int4x2KV
from kernels.kv.int8_kv import Int8KV
from kernels.kv.sealed_format import SealedFormat

SEALED_FORMATS: Mapping[str, SealedFormat] = {each.name: each for each in (Int8KV(), Int4x2KV())}
