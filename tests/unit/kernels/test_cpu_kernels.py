"""The compiled CPU kernels of every instruction set that this processor supports, and tiles in software, against plain
torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.cpu import compiler
from kernels.cpu.compiler import InstructionSet, KernelsUnavailable
from kernels.cpu.cpu_ops import CpuOps
from kernels.cpu.library import CpuKernels
from kernels.cpu.packing import PackedWeights, pack
from kernels.kv.kv_pool import write_kv
from kernels.noise import gumbel_noise
from kernels.reference_ops import REFERENCE
from kernels.rope import apply_rope, rotary_frequencies, rotary_tables
from kernels.weights.int8_weights import Int8Format
from models.default import user_cache
from tests.support.kv_layers import draw_sinks
from tests.support.profiles import examples
from tests.support.rig import pool_layer

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 7, 30, 70]), st.sampled_from([0, 1, 15, 63, 64, 65, 1023, 1500])),
        min_size=1,
        max_size=4,
    ),
    page_size=st.sampled_from([1, 7, 16, 32]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128]),
    per_head=st.booleans(),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@examples(14, 80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention(
    kernels: CpuKernels,
    rows: list[tuple[int, int]],
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    sinks: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    queries = [n for n, _ in rows]
    lengths = [n + before for n, before in rows]
    width = -(-max(lengths) // page_size)
    layer = pool_layer(97, kv_heads, page_size, head_dim, dtype)
    if sinks:
        layer = draw_sinks(layer, kv_heads * group)
    pages = torch.randint(97, (len(rows), kv_heads, width) if per_head else (len(rows), width))
    q = torch.randn(sum(queries), kv_heads * group, head_dim).to(dtype)
    batch = AttentionBatch(queries, lengths, pages)
    oracle, backend = ReferenceAttention(page_size), CpuAttention(kernels)
    oracle.plan(batch)
    backend.plan(batch)
    expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
    o, lse = backend.run(layer, q, head_dim**-0.5)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=max(1e-5, tolerance / 2))
    assert torch.equal(backend.run(layer, q, head_dim**-0.5)[0], o)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_a_query_depends_on_nothing_else(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Neither the queries in the same chunk, nor other rows, nor the number of threads change the result, to the
    bit."""
    torch.manual_seed(1)
    length, n, page_size = 2500, 300, 16
    layer = draw_sinks(pool_layer(200, 3, page_size, 64, dtype), 9)
    pages = torch.randperm(200)[None, : -(-length // page_size)]
    q = torch.randn(n, 9, 64).to(dtype)
    backend = CpuAttention(kernels)

    def run(first: int, count: int, before: int = 0) -> Tensor:
        """Attend from queries first … first + count - 1, after another row of `before` queries."""
        ends = length - n + first + count
        rows = [before, count] if before else [count]
        backend.plan(AttentionBatch(rows, [ends] * len(rows), pages.repeat(len(rows), 1)))
        return backend.run(layer, torch.cat([q[:before], q[first : first + count]]), 0.125)[0][before:]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(0, n)
        for count in (1, 2):
            torch.set_num_threads(count)
            for first, queries, before in (
                (299, 1, 0),
                (296, 4, 1),
                (100, 1, 7),
                (100, 16, 0),
                (280, 20, 40),
                (270, 25, 0),
            ):
                assert torch.equal(run(first, queries, before), whole[first : first + queries])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_attention_of_drafts_depends_on_nothing_else(kernels: CpuKernels, group: int, head_dim: int) -> None:
    """A query has the same result to the bit alone, in a verify pass and in a chunk, however many query rows share
    a KV head."""
    torch.manual_seed(head_dim + group)
    length, n, page_size, kv_heads = 1100, 40, 16, 2
    layer = pool_layer(80, kv_heads, page_size, head_dim, torch.bfloat16)
    if group != 3:
        layer = draw_sinks(layer, kv_heads * group)
    pages = torch.randperm(80)[None, : -(-length // page_size)]
    q = torch.randn(n, kv_heads * group, head_dim).bfloat16()
    backend = CpuAttention(kernels)

    def run(first: int, count: int) -> tuple[Tensor, Tensor]:
        backend.plan(AttentionBatch([count], [length - n + first + count], pages))
        return backend.run(layer, q[first : first + count], head_dim**-0.5)

    whole, whole_lse = run(0, n)
    for count in (1, 2, 3, 5, 7, 16, 17):
        for first in (0, 11, n - count):
            o, lse = run(first, count)
            assert torch.equal(o, whole[first : first + count])
            assert torch.equal(lse, whole_lse[first : first + count])


def test_attention_ignores_what_is_not_there(kernels: CpuKernels) -> None:
    """Slots past the end of a row can hold overflow of another request."""
    layer = pool_layer(5, 1, 16, 64, torch.bfloat16)
    backend = CpuAttention(kernels)
    backend.plan(AttentionBatch([2], [70], torch.arange(5)[None]))
    q = torch.randn(2, 3, 64).bfloat16()
    expected, _ = backend.run(layer, q, 0.125)
    layer.k[4, :, 6:] = layer.v[4, :, 6:] = float("nan")
    assert torch.equal(backend.run(layer, q, 0.125)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "columns"), [(1, 576, 960), (5, 577, 100), (13, 64, 31), (250, 96, 96)])
def test_linear(kernels: CpuKernels, dtype: torch.dtype, rows: int, features: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, features).to(dtype)
    weight, bias = (torch.randn(columns, features) * features**-0.5).to(dtype), torch.randn(columns).to(dtype)
    expected = x.double() @ weight.double().T + bias
    y = kernels.linear(x, PackedWeights(weight, bias), float_out=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    quantized = kernels.linear(x, PackedWeights(weight, bias))
    assert quantized.dtype == dtype
    torch.testing.assert_close(quantized.float(), y, rtol=2**-8, atol=1e-6)
    coarse = kernels.linear(
        x,
        pack(
            Int8Format().quantize(weight),
            bias,
        ),
        float_out=True,
    )
    assert (coarse - expected).norm() < 0.02 * (expected - bias).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_a_row_depends_on_nothing_else(kernels: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 576).to(dtype), torch.randn(200, 576).to(dtype)
    for packed in (PackedWeights(weight), pack(Int8Format().quantize(weight))):
        whole = kernels.linear(x, packed, float_out=True)
        for first, last in ((0, 1), (3, 8), (10, 40), (299, 300)):
            assert torch.equal(kernels.linear(x[first:last], packed, float_out=True), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [576, 37])
def test_norm(kernels: CpuKernels, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(9, size).to(dtype), torch.randn(9, size).to(dtype), torch.randn(size).to(dtype)
    added = x + delta
    out = kernels.norm(x, delta, weight, 1e-5)
    assert torch.equal(x, added)
    expected = torch.nn.functional.rms_norm(added.float(), (size,), weight.float(), 1e-5)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(kernels: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, head_dim, page_size = 11, 4, 2, 48, 7
    layer, expected = (pool_layer(5, kv_heads, page_size, head_dim, dtype) for _ in range(2))
    expected.k.copy_(layer.k)
    expected.v.copy_(layer.v)
    cos, sin = rotary_tables(rotary_frequencies(head_dim, 1e4), 100, dtype=torch.float32, device=torch.device("cpu"))
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    positions, slots = torch.randint(100, (tokens,)), torch.randperm(5 * page_size)[:tokens]
    q, k, v = qkv.clone().split_with_sizes([heads, kv_heads, kv_heads], 1)
    q, k = (apply_rope(part, cos[positions], sin[positions]) for part in (q, k))
    write_kv(expected, slots, k, v)
    kernels.rotary(qkv, cos, sin, positions, slots, layer.k, layer.v)
    torch.testing.assert_close(qkv[:, :heads], q, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(layer.k, expected.k, rtol=2**-7, atol=1e-5)
    assert torch.equal(layer.v, expected.v)


def test_sample(kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    rows, size, first = 40, 5003, 700
    logits = torch.randn(rows, size) * 3
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 8000, (rows,))
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0]).repeat(rows // 4)
    values, tokens = kernels.sample(logits, temperature, seeds, positions, first)
    noise = gumbel_noise(seeds, positions, first, first + size)
    scaled = torch.where(temperature[:, None] > 0, logits / temperature[:, None].clamp(min=0.1) + noise, logits)
    torch.testing.assert_close(values, scaled.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.gather(1, tokens[:, None] - first)[:, 0], values, rtol=1e-5, atol=1e-5)


def test_sample_takes_the_lowest_of_equals(kernels: CpuKernels) -> None:
    logits = torch.zeros(3, 20_000)
    logits[1, [19_999, 4097, 8000]] = 1.0
    logits[2, [5, 16_500]] = 2.0
    zeros = torch.zeros(3, dtype=torch.int64)
    _, tokens = kernels.sample(logits, torch.zeros(3), zeros, zeros, 10)
    assert tokens.tolist() == [10, 4107, 15]


def test_sample_where_all_is_impossible(kernels: CpuKernels) -> None:
    """A rank whose whole slice is forbidden still returns a token, with value -inf, so that another rank's token
    wins."""
    zeros = torch.zeros(2, dtype=torch.int64)
    values, tokens = kernels.sample(torch.full((2, 50), float("-inf")), torch.tensor([0.0, 1.0]), zeros, zeros, 10)
    assert values.tolist() == [float("-inf")] * 2
    assert tokens.tolist() == [10, 10]


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 17), (48, 470), (5, 7503)])
def test_best(kernels: CpuKernels, rows: int, size: int) -> None:
    """Many are equal; so are zeros of both signs."""
    torch.manual_seed(size)
    for x in (torch.randn(rows, size).exp(), torch.randn(rows, size).round(), torch.zeros(rows, size)):
        x[:, size // 2] = float("-inf")
        order = x.sort(dim=1, descending=True, stable=True).indices
        for count in {0, 1, min(size, 15), size // 15, size}:
            best = CpuOps(kernels).best(x, count)
            assert torch.equal(best, order[:, :count])
            assert torch.equal(REFERENCE.best(x, count), best)
    with pytest.raises(RuntimeError, match=f"best: {size + 1} of {size}"):
        kernels.best(x, size + 1)


def test_what_does_not_fit_is_refused(kernels: CpuKernels) -> None:
    with pytest.raises(RuntimeError, match="weights are"):
        kernels.linear(torch.randn(2, 64), PackedWeights(torch.randn(32, 64).bfloat16()))
    with pytest.raises(RuntimeError, match="features"):
        kernels.linear(torch.randn(2, 48), PackedWeights(torch.randn(32, 64)))  # weights are padded by up to 15


def test_memory_that_is_not_there_is_not_touched(kernels: CpuKernels) -> None:
    """A wrong index raises an error, as in plain torch, instead of writing to unrelated memory."""
    layer, angles, norms = pool_layer(2, 1, 16, 32, torch.float32), torch.randn(9, 16), torch.randn(31)
    for position, slot, message in ((9, 0, "positions: 9"), (-1, 0, "positions: -1"), (0, 32, "slots: 32")):
        with pytest.raises(RuntimeError, match=message):
            kernels.rotary(
                torch.randn(1, 3, 32), angles, angles, torch.tensor([position]), torch.tensor([slot]), layer.k, layer.v
            )
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rotary: norms"):
        kernels.rotary(torch.randn(1, 3, 32), angles, angles, zero, zero, layer.k, layer.v, (norms, norms, 1e-5))
    backend, q = CpuAttention(kernels), torch.randn(3, 1, 32)
    for queries, length in ((3, 33), (3, 2), (0, 5), (2, 5), (4, 5)):
        backend.plan(AttentionBatch([queries], [length], torch.arange(2)[None]))
        with pytest.raises(RuntimeError, match=f"{queries} queries over {length} slots|3 queries, not {queries}"):
            backend.run(layer, q, 0.125)


def test_nothing_comes_of_nothing(kernels: CpuKernels) -> None:
    weights = PackedWeights(torch.empty(0, 8))
    assert kernels.linear(torch.randn(3, 8), weights).shape == (3, 0)
    assert kernels.linear(torch.randn(3, 8), pack(Int8Format().quantize(torch.empty(0, 8)))).shape == (3, 0)
    assert kernels.linear(torch.randn(0, 8), PackedWeights(torch.randn(5, 8))).shape == (0, 5)


def test_sums_of_bytes_are_exact(kernels: CpuKernels) -> None:
    """Kernels store inputs with an offset of 128; over a long sum that offset exceeds the precision of float32."""
    x = torch.tensor([127.0, -127.0]).repeat(4096)[None]
    x[0, 0] = 126.0
    y = kernels.linear(x, pack(Int8Format().quantize(torch.full((2, x.shape[1]), 127.0))))
    assert y.tolist() == [[-127.0, -127.0]]


@pytest.mark.parametrize("rows", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_show(kernels: CpuKernels, bad: float, rows: int) -> None:
    packed, x = pack(Int8Format().quantize(torch.randn(40, 101))), torch.randn(rows, 101)
    expected = kernels.linear(x, packed)
    for place in (0, 40, 100):
        spoilt = x.clone()
        spoilt[1, place] = bad
        y = kernels.linear(spoilt, packed)
        assert y[1].isnan().all()
        assert torch.equal(y[2:], expected[2:])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear_of_rows_that_begin_within_a_word(kernels: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide, weights = torch.randn(5, 66).to(dtype), PackedWeights(torch.randn(40, 64).to(dtype))
    assert torch.equal(kernels.linear(wide[:, 1:65], weights), kernels.linear(wide[:, 1:65].contiguous(), weights))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelsUnavailable, match=r"no C\+\+ compiler"):
        CpuKernels(tmp_path)


@pytest.mark.parametrize("part", ["build_operators", "build_kernels"])
def test_a_library_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    CpuKernels(user_cache() / "kernels")  # build the operators that load the kernel library
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF, but no more than that")
    monkeypatch.setattr(f"kernels.cpu.library.{part}", lambda *_: broken)
    with pytest.raises(KernelsUnavailable, match=r"broken\.so cannot be loaded; remove it"):
        CpuKernels(user_cache() / "kernels")


@pytest.mark.parametrize("left", [0, 40, 0.3, 0.8], ids=str)
def test_a_library_that_was_cut_off_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: float) -> None:
    """Loading a truncated library would end the process with SIGBUS."""
    whole = compiler.build_operators(user_cache() / "kernels")
    monkeypatch.setattr(compiler, "BUILT", Path("/nowhere"))
    cut = tmp_path / whole.name
    content = whole.read_bytes()
    cut.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelsUnavailable, match=r"no C\+\+ compiler"):
        compiler.build_operators(tmp_path)
    cut.write_bytes(content)
    assert compiler.build_operators(tmp_path) == cut


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without read permission, for example another user's home."""
    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(compiler, "BUILT", Path("/nowhere"))
    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(KernelsUnavailable, match=r"cannot read kernels: .*Permission denied"):
        CpuKernels(tmp_path)


def test_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache folder, the kernels installed with the package are used."""
    monkeypatch.setattr(compiler, "BUILT", Path("/nowhere"))
    with pytest.raises(KernelsUnavailable, match="set HOME or XDG_CACHE_HOME"):
        CpuKernels(None)
    monkeypatch.setattr(compiler, "BUILT", user_cache() / "kernels")
    CpuKernels(user_cache() / "kernels")
    assert CpuKernels(None).name == CpuKernels(user_cache() / "kernels").name


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailable, match=r"fails: .*error"):
        compiler.build_kernels(InstructionSet("none", frozenset(), ("-mno-such-thing",)), tmp_path)
    assert not list(tmp_path.rglob("*.so"))
