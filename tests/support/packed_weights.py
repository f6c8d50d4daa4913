"""Quantized matrices with random codes, in the tensors of each layout, and their values. Packed here without the
product's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = dict[str, Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Number of the code at each place of a word."""


@dataclass
class Packed:
    """A matrix. settings: its `quantization_config`. tensors: by the last part of their names. values: in float64."""

    settings: dict[str, Any]
    values: Tensor
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What layouts pack. group_size: -1: one group. ordered: whether groups are dealt to features at random."""

    seed: int
    rows: int
    features: int
    group_size: int = -1
    bits: int = 4
    symmetric: bool = False
    ordered: bool = False

    @property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def size(self) -> int:
        return self.features if self.group_size == -1 else min(self.group_size, self.features)

    @property
    def groups(self) -> NDArray[np.int64]:
        regular = np.arange(self.features) // self.size
        return self.random.permutation(regular) if self.ordered else regular

    def draw(self, lowest_zero: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        """Draw codes [rows, features], zero points [rows, groups], and scales likewise."""
        random, shape = self.random, (self.rows, -(-self.features // self.size))
        codes = random.integers(0, 1 << self.bits, (self.rows, self.features))
        zeros = random.integers(lowest_zero, 1 << self.bits, shape)
        if self.symmetric:
            zeros[:] = 1 << (self.bits - 1)
        return codes, zeros, torch.from_numpy(random.uniform(0.01, 2, shape)).half()

    def values(self, codes: NDArray[Any], zeros: NDArray[Any], scales: Tensor) -> Tensor:
        groups = self.groups
        return torch.from_numpy(codes - zeros[:, groups]).double() * scales.double()[:, groups]


def pack(codes: NDArray[Any], bits: int) -> Tensor:
    """Pack along the last dimension, the first code in the lowest bits: [n, codes] to [n, words] int32."""
    each = 32 // bits
    padded = np.pad(codes.astype(np.uint32), ((0, 0), (0, -codes.shape[1] % each)))
    words = np.zeros((len(codes), padded.shape[1] // each), np.uint32)
    for place in range(each):
        words |= padded[:, place::each] << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))


def gptq(drawn: Drawn, version: int = 1) -> Packed:
    codes, zeros, scales = drawn.draw(lowest_zero=2 - version)
    names = {1: "gptq", 2: "gptq_v2"}
    settings = {"quant_method": "gptq", "bits": drawn.bits, "group_size": drawn.group_size, "sym": drawn.symmetric}
    settings |= {"desc_act": drawn.ordered, "checkpoint_format": names[version]}
    tensors = {"qweight": pack(codes, drawn.bits).T, "qzeros": pack((zeros - 2 + version).T, drawn.bits)}
    tensors |= {"scales": scales.T, "g_idx": torch.from_numpy(drawn.groups).int()}
    return Packed(settings, drawn.values(codes, zeros, scales), tensors)


def awq(drawn: Drawn) -> Packed:
    codes, zeros, scales = drawn.draw()

    def interleaved(codes: NDArray[Any]) -> Tensor:
        padded = np.pad(codes.T, ((0, 0), (0, -len(codes) % 8)))
        return pack(padded.reshape(len(padded), -1, 8)[..., AWQ_ORDER].reshape(padded.shape), 4)

    settings = {"quant_method": "awq", "bits": 4, "group_size": drawn.group_size, "version": "gemm"}
    tensors = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales.T}
    values = drawn.values(codes, zeros, scales)
    return Packed({**settings, "zero_point": not drawn.symmetric}, values, tensors)


def packed(drawn: Drawn) -> Packed:
    """`pack-quantized` of compressed-tensors."""
    codes, zeros, scales = drawn.draw()
    tensors = {"weight_packed": pack(codes, drawn.bits), "weight_scale": scales.bfloat16()}
    tensors["weight_shape"] = torch.tensor([drawn.rows, drawn.features])
    if not drawn.symmetric:
        tensors["weight_zero_point"] = pack(zeros.T, drawn.bits).T
    if drawn.ordered:
        tensors["weight_g_idx"] = torch.from_numpy(drawn.groups).int()
    weights = {"num_bits": drawn.bits, "type": "int", "symmetric": drawn.symmetric}
    weights |= {"actorder": "group" if drawn.ordered else None}
    values = drawn.values(codes, zeros, tensors["weight_scale"])
    return Packed(_config("pack-quantized", weights | _strategy(drawn)), values, tensors)


def integers(drawn: Drawn) -> Packed:
    """`int-quantized` of compressed-tensors."""
    half = 128
    codes, zeros, scales = Drawn(**vars(drawn) | {"bits": 8}).draw()
    tensors = {"weight": torch.from_numpy(codes - half).to(torch.int8), "weight_scale": scales}
    if not drawn.symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(zeros - half).to(torch.int8)
    weights = {"num_bits": 8, "type": "int", "symmetric": drawn.symmetric}
    return Packed(_config("int-quantized", weights | _strategy(drawn)), drawn.values(codes, zeros, scales), tensors)


def fp8(drawn: Drawn, block: tuple[int, int]) -> Packed:
    codes = _fp8_codes(drawn)
    blocks = -(-drawn.rows // block[0]), -(-drawn.features // block[1])
    scales = torch.from_numpy(drawn.random.uniform(0.01, 2, blocks)).bfloat16()
    spread = scales.double().repeat_interleave(block[0], 0)[: drawn.rows]
    spread = spread.repeat_interleave(block[1], 1)[:, : drawn.features]
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    return Packed(settings, codes.double() * spread, {"weight": codes, "weight_scale_inv": scales})


def fp8_rows(drawn: Drawn) -> Packed:
    codes, (_, _, scales) = _fp8_codes(drawn), Drawn(drawn.seed, drawn.rows, drawn.features).draw()
    tensors = {"weight": codes, "weight_scale": scales.float()}
    return Packed({"quant_method": "fbgemm_fp8"}, codes.double() * scales.double(), tensors)


def fp8_tensor(drawn: Drawn) -> Packed:
    codes = _fp8_codes(drawn)
    tensors = {"weight": codes, "weight_scale": torch.tensor(0.375)}
    return Packed({"quant_method": "fp8", "activation_scheme": "static"}, codes.double() * 0.375, tensors)


def mxfp8(drawn: Drawn) -> Packed:
    codes, exponents = _fp8_codes(drawn), _exponents(drawn)
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    tensors = {"weight": codes, "weight_scale": exponents}
    return Packed(_config("mxfp8-quantized", weights), codes.double() * _powers(drawn, exponents), tensors)


def mxfp4(drawn: Drawn) -> Packed:
    codes, exponents = drawn.random.integers(0, 16, (drawn.rows, drawn.features)), _exponents(drawn)
    padded = np.pad(codes, ((0, 0), (0, drawn.features % 2))).astype(np.uint8)
    tensors = {"weight_packed": torch.from_numpy(padded[:, ::2] | padded[:, 1::2] << 4), "weight_scale": exponents}
    signed = np.array([*E2M1, *(-value for value in E2M1)])[codes]
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    values = torch.from_numpy(signed) * _powers(drawn, exponents)
    return Packed(_config("mxfp4-pack-quantized", weights), values, tensors)


LAYOUTS: dict[str, Callable[[Drawn], Packed]] = {
    "gptq": gptq,
    "gptq_v2": lambda drawn: gptq(drawn, version=2),
    "awq": lambda drawn: awq(Drawn(**vars(drawn) | {"bits": 4, "ordered": False})),
    "packed": packed,
    "integers": lambda drawn: integers(Drawn(**vars(drawn) | {"ordered": False})),
    "fp8": lambda drawn: fp8(drawn, (16, max(drawn.group_size, 8))),
    "fp8_rows": fp8_rows,
    "fp8_tensor": fp8_tensor,
    "mxfp4": mxfp4,
    "mxfp8": mxfp8,
}


def _fp8_codes(drawn: Drawn) -> Tensor:
    codes = drawn.random.integers(0, 256, (drawn.rows, drawn.features)).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # which are NaN
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def _exponents(drawn: Drawn) -> Tensor:
    shape = drawn.rows, -(-drawn.features // 32)
    return torch.from_numpy(drawn.random.integers(90, 160, shape).astype(np.uint8))


def _powers(drawn: Drawn, exponents: Tensor) -> Tensor:
    return (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)[:, : drawn.features]


def _strategy(drawn: Drawn) -> dict[str, Any]:
    if drawn.group_size == -1:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": drawn.group_size}


def _config(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
