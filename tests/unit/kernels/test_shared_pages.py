"""CPU attention of rows that list the same pages, which it reads once: results are those of rows with pages of their
own, to the bit."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.cpu_attention import CpuAttention
from kernels.attention.reference_attention import ReferenceAttention
from kernels.cpu.compiler import InstructionSet, build_kernels
from kernels.cpu.library import SEGMENT, CpuKernels
from kernels.kv.kv_pool import LayerKV
from models.default import user_cache
from tests.support.paths import ROOT
from tests.support.profiles import each_value, examples
from tests.support.rig import pool_layer, sets_to_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
COMPILER = shutil.which("g++") or shutil.which("clang++")
STRETCH = SEGMENT


def test_stretch_is_a_segment_of_the_kernels() -> None:
    source = (ROOT / "kernels/cpu/csrc/attention_cut.h").read_text(encoding="utf-8")
    assert re.findall(r"constexpr int SEGMENT = (\d+);", source) == [str(STRETCH)]


def with_own_pages(layer: LayerKV, batch: AttentionBatch) -> tuple[LayerKV, AttentionBatch]:
    """Copy the pages of every list, so that no two list the same one."""
    listed = batch.pages.flatten()
    own = torch.randperm(len(listed))
    _, kv_heads, page_size, head_dim = layer.k.shape
    copied = pool_layer(len(listed), kv_heads, page_size, head_dim, layer.k.dtype)
    copied.k[own], copied.v[own] = layer.k[listed], layer.v[listed]
    return copied, replace(batch, pages=own.view_as(batch.pages))


def run(kernels: CpuKernels, layer: LayerKV, batch: AttentionBatch, q: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    backend, before = CpuAttention(kernels), torch.get_num_threads()
    backend.plan(batch)
    torch.set_num_threads(threads)
    try:
        return backend.run(layer, q, q.shape[2] ** -0.5)
    finally:
        torch.set_num_threads(before)


def check(kernels: CpuKernels, layer: LayerKV, batch: AttentionBatch, heads: int, threads: int) -> None:
    """Compare the batch with itself on pages of its own, and with plain torch."""
    dtype, head_dim = layer.k.dtype, layer.k.shape[3]
    q = torch.randn(sum(batch.query_lengths), heads, head_dim).to(dtype)
    o, lse = run(kernels, layer, batch, q, threads)
    own_o, own_lse = run(kernels, *with_own_pages(layer, batch), q, 1)
    assert torch.equal(o, own_o)
    assert torch.equal(lse, own_lse)
    oracle = ReferenceAttention(layer.k.shape[2])
    oracle.plan(batch)
    expected, expected_lse = oracle.run(layer, q, head_dim**-0.5)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=max(1e-5, tolerance / 2))


LENGTHS = (900, STRETCH, STRETCH + 1, STRETCH + 7, 1500, 2 * STRETCH - 1, 2 * STRETCH, 2 * STRETCH + 5, 3100)
ROWS = st.tuples(
    st.sampled_from([1, 1, 2, 3, 4, 8, 70]),  # queries; 70 are not cut by segment
    st.sampled_from(LENGTHS),
    st.integers(0, 4),  # the row before that it shares with
    st.sampled_from([0, 500, STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH, 4000]),  # slots that it shares
    st.sampled_from([None, None, 0, STRETCH - 1, STRETCH, 1800]),  # a slot in a page of its own
    st.booleans(),  # whether it shares its last pages too
)


@given(
    rows=st.lists(ROWS, min_size=2, max_size=5),
    page_size=st.sampled_from([7, 16, 48, 64, 100, 256]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    per_head=st.sampled_from([False, False, False, True]),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(12, 80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_of_a_tree(
    kernels: CpuKernels,
    rows: list[tuple[int, int, int, int, int | None, bool]],
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    per_head: bool,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    queries, lengths = [row[0] for row in rows], [row[1] for row in rows]
    width = -(-max(lengths) // page_size)
    pages = torch.randperm(len(rows) * width).view(len(rows), width)
    spare = iter(range(len(rows) * width, len(rows) * (width + 1)))
    for index, (_, _, other, shared, own, ends_alike) in enumerate(rows[1:], 1):
        elder = pages[other % index]
        pages[index, : shared // page_size] = elder[: shared // page_size]
        if own is not None and own // page_size < width:
            pages[index, own // page_size] = next(spare)
        if ends_alike:
            pages[index, width * 2 // 3 :] = elder[width * 2 // 3 :]
    if per_head:
        pages = pages[:, None].repeat(1, kv_heads, 1)
    layer = pool_layer(len(rows) * (width + 1), kv_heads, page_size, head_dim, dtype)
    check(kernels, layer, AttentionBatch(queries, lengths, pages), kv_heads * group, threads)


@pytest.mark.parametrize(("queries", "dtype"), each_value([1, 4, 7], DTYPES), ids=str)
def test_pages_of_many_rows(kernels: CpuKernels, queries: int, dtype: torch.dtype) -> None:
    """The queries of one segment are more than one piece of work holds."""
    torch.manual_seed(queries)
    count, width, page_size = 40, 72, 16
    pages = torch.randperm(count * width).view(count, width)
    pages[:, :64] = pages[0, :64]
    layer = pool_layer(count * width, 2, page_size, 64, dtype)
    lengths = [1 + queries + STRETCH + row % 100 for row in range(count)]
    check(kernels, layer, AttentionBatch([queries] * count, lengths, pages), 6, 2)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness, to be linked with kernels."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    compiled = tmp_path_factory.mktemp("harness") / "harness.o"
    flags = ["-std=gnu++17", "-O1", "-pthread", f"-I{ROOT / 'kernels/cpu/csrc'}"]
    source = ROOT / "tests/support/kernels_harness.cpp"
    subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(compiled)], check=True)
    return compiled


@pytest.mark.parametrize("target", sets_to_test(), ids=lambda target: target.name)
def test_pages_are_read_once(harness: Path, tmp_path: Path, target: InstructionSet) -> None:
    """The harness counts pieces of work; see support/attention_harness.h."""
    program, library = tmp_path / "kernels", build_kernels(target, user_cache() / "kernels")
    link = [str(COMPILER), str(harness), str(library), f"-Wl,-rpath,{library.parent}", "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    ran = subprocess.run([str(program), "12"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "12 cases, 0 failures\n"), ran.stdout
