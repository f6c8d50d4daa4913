"""Matrices of 4 bits as compressed-tensors stores them (`pack-quantized`), which vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.weights.int4_weights import LEVELS, Int4Format
from kernels.weights.matrix import QuantizedMatrix, zero_points
from models.layouts.compressed_tensors import SHAPE, ZEROS
from models.layouts.mxfp4 import PACKED, SCALES
from models.layouts.packed_codes import pack

_BITS = 4


def stored_tensors(name: str, matrix: QuantizedMatrix) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of the tensors that hold an int4 matrix, whose groups are regular.

    name: of its weight, `….weight`. Scales have the type of Int4Format.scale_dtype bfloat16.
    """
    prefix = name.removesuffix("weight")
    yield prefix + PACKED, pack(matrix.codes, _BITS)
    yield prefix + SCALES, matrix.scales.bfloat16().contiguous()
    if matrix.mins is not None:
        zeros = zero_points(matrix.scales, matrix.mins, LEVELS)
        assert zeros is not None
        yield prefix + ZEROS, pack(zeros.to(torch.uint8).t(), _BITS).t().contiguous()
    yield prefix + SHAPE, torch.tensor(matrix.shape)


def compression_settings(int4: Int4Format, dense: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose linear layers have this format, all but the LM head and those
    whose names are in `dense`."""
    weights = {
        "num_bits": _BITS,
        "type": "int",
        "strategy": "group",
        "group_size": int4.group_size,
        "symmetric": int4.symmetric,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *dense],
        "kv_cache_scheme": None,
    }
