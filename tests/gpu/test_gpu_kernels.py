"""Triton kernels on a GPU only: shapes of real models, and CUDA graphs.

tests/unit/kernels/test_gpu_kernels.py tests parity in small shapes, on the GPU if there is one. What takes time here is
compiling: every dtype, shape and number of queries is another kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import LayerKV
from kernels.reference_ops import REFERENCE, QuantizedLinear
from kernels.weights.matrix import QuantizedMatrix
from kernels.weights.weight_format import FORMATS
from tests.support.ballots import VoteCase, check_votes, draw_batch
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import only_in_all

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is present", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install 'magicdec[cuda]'")

from kernels.attention.triton_attention import GpuAttention
from kernels.gpu.attention import attend
from kernels.gpu.cuda_graphs import CudaGraphs
from kernels.gpu.products.few_bit_layout import lay_out
from kernels.gpu.products.few_bit_products import few_bit_product
from kernels.gpu.products.fp8_products import Fp8Linear, multiplies_fp8, round_inputs
from kernels.gpu.query_tiles import assign_tiles
from kernels.gpu.sample import sample

CUDA = torch.device("cuda")
ROWS = [
    ([1] * 6, [30, 4000, 17, 900, 64, 2500]),  # decode
    ([5, 1, 3, 5], [3000, 40, 800, 5]),  # verify
    ([700, 1, 5], [1000, 2000, 300]),  # a chunk of a prompt in the same batch
]


def layer_of(kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerKV:
    k, v = torch.randn(2, 300, kv_heads, 16, head_dim, device=CUDA).to(dtype)
    return LayerKV(k, v)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (32, 8, 128, torch.bfloat16),
        (32, 32, 128, torch.bfloat16),
        (64, 8, 128, torch.bfloat16),
        (9, 3, 64, torch.bfloat16),
        (9, 3, 64, torch.float16),
        (9, 3, 64, torch.float32),
        # Each takes seconds to compile.
        only_in_all(32, 8, 128, torch.float32),
        only_in_all(32, 32, 128, torch.float32),
        only_in_all(8, 1, 256, torch.bfloat16),
        only_in_all(71, 1, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, per_head: bool) -> None:
    torch.manual_seed(0)
    layer = draw_sinks(layer_of(kv_heads, head_dim, dtype), heads)
    oracle, backend = ReferenceAttention(16), GpuAttention()
    for queries, lengths in ROWS:
        pages = torch.randint(300, (len(queries), kv_heads, 256) if per_head else (len(queries), 256), device=CUDA)
        batch = AttentionBatch(queries, lengths, pages)
        q = torch.randn(sum(queries), heads, head_dim, device=CUDA).to(dtype)
        oracle.plan(batch)
        backend.plan(batch)
        expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
        o, lse = backend.run(layer, q, head_dim**-0.5)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "by_page"),
    [
        (32, 8, 128, torch.bfloat16, True),
        (9, 3, 64, torch.float32, False),
        only_in_all(32, 32, 128, torch.bfloat16, False),
        only_in_all(9, 3, 64, torch.float32, True),
        only_in_all(8, 1, 256, torch.bfloat16, True),
        only_in_all(71, 1, 64, torch.bfloat16, True),
    ],
    ids=str,
)
def test_votes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, by_page: bool) -> None:
    """Counted in the same read, and in one of their own; attention's results are the same to the bit."""
    for rows in (
        ((1, 30, (0, -1)), (1, 3999, (0, 0)), (1, 16, (-1, -1)), (1, 899, (0, -1))),
        ((5, 2995, (0, 4)), (1, 39, (-1, -1)), (3, 797, (2, 1)), (5, 0, (0, 1))),
        ((700, 300, (0, 699)), (1, 1999, (0, -1)), (5, 295, (-1, -1))),
    ):
        sizes, unit = (16, kv_heads, heads // kv_heads, head_dim), 16 if by_page else 1
        case = VoteCase(rows, *sizes, per_head=False, per_layer=True, unit=unit, shared=False, sinks=by_page, seed=0)
        check_votes(GpuAttention(), draw_batch(case, dtype, "cuda"), 2e-3)


def test_a_step_is_captured_and_replayed_for_other_lengths() -> None:
    """Attention and sampling read their inputs on the device; a replay uses the values that are there then."""
    torch.manual_seed(0)
    layer = layer_of(8, 128, torch.bfloat16)
    queries = torch.tensor([5, 1, 3], device=CUDA)
    lengths = torch.tensor([300, 40, 90], device=CUDA)
    pages = torch.randint(300, (3, 64), device=CUDA)
    q = torch.randn(9, 32, 128, device=CUDA).bfloat16()
    logits = torch.randn(9, 32_000, device=CUDA)
    temperature, seeds, positions = torch.ones(9, device=CUDA), torch.arange(9, device=CUDA), lengths.repeat(3)
    held: dict[str, Tensor] = {}

    def work() -> None:
        held["o"], _ = attend(assign_tiles(queries, lengths, pages, len(q)), layer, q, 0.1)
        held["values"], held["tokens"] = sample(logits, temperature, seeds, positions, 0)

    replay = CudaGraphs(CUDA).capture(work)
    lengths.copy_(torch.tensor([17, 1000, 5]))
    positions.copy_(lengths.repeat(3))
    replay()
    oracle = ReferenceAttention(16)
    oracle.plan(AttentionBatch([5, 1, 3], [17, 1000, 5], pages))
    torch.testing.assert_close(held["o"], oracle.run(layer, q, 0.1)[0], rtol=1e-2, atol=1e-2)
    values, chosen = REFERENCE.sample(logits.clone(), temperature, seeds, positions, 0)
    torch.testing.assert_close(held["values"], values, rtol=1e-5, atol=1e-5)
    assert torch.equal(held["tokens"], chosen)


def rounded(format: str, columns: int, features: int) -> QuantizedMatrix:
    matrix = FORMATS[format].quantize(torch.randn(columns, features, device=CUDA) * features**-0.5)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, only_in_all(torch.float16), only_in_all(torch.float32)], ids=str)
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_products(format: str, dtype: torch.dtype) -> None:
    """Codes are unpacked by instructions that the interpreter does not have. Rows with the same inputs, in one tile or
    in several, have the same results."""
    torch.manual_seed(0)
    matrix = rounded(format, 1536, 4096)
    weights, bias = lay_out(matrix), torch.randn(1536, device=CUDA).to(dtype)
    for rows in (3, 150):
        x = torch.randn(rows, 4096, device=CUDA).to(dtype)
        x[-1] = x[0]
        found = few_bit_product(x, weights, bias, wide=True)
        torch.testing.assert_close(found, QuantizedLinear(matrix, bias, None, True)(x), rtol=1e-3, atol=1e-3)
        assert torch.equal(found[-1], found[0])
        assert torch.equal(found, few_bit_product(x, weights, bias, wide=True))


def test_products_of_few_bits_are_captured_and_replayed() -> None:
    """With several programs for each column, and features in another order."""
    torch.manual_seed(0)
    matrix = rounded("int4", 512, 4096).cut(slice(0, 512), slice(24, 4096))
    weights, x, held = lay_out(matrix), torch.randn(4, 4072, device=CUDA).bfloat16(), {}

    def work() -> None:
        held["y"] = few_bit_product(x, weights, None, wide=True)

    replay = CudaGraphs(CUDA).capture(work)
    x.copy_(torch.randn(4, 4072))
    replay()
    torch.testing.assert_close(held["y"], QuantizedLinear(matrix, None, None, True)(x), rtol=1e-3, atol=1e-3)


def test_products_of_fp8_by_fp8() -> None:
    if not multiplies_fp8(CUDA, torch.bfloat16):
        pytest.skip("the device does not multiply fp8")
    torch.manual_seed(0)
    matrix = rounded("fp8", 1536, 4096)
    for bias in (None, torch.randn(1536, device=CUDA).bfloat16()):
        linear = Fp8Linear(matrix, bias, wide=True)
        for rows in (1, 150):
            x = torch.randn(rows, 4096, device=CUDA).bfloat16()
            codes, scales = round_inputs(x)
            expected = (codes.float() * scales) @ matrix.dense(torch.float32).t()
            expected = expected if bias is None else expected + bias
            torch.testing.assert_close(linear(x), expected, rtol=2e-2, atol=2e-2)
