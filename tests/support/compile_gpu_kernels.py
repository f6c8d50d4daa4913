"""Compile every Triton kernel for a GPU that need not be present, in the shapes of real models.

    python -m tests.support.compile_gpu_kernels ARCHITECTURE [DTYPE ...]

ARCHITECTURE: 80 for an A100, 90 for an H100. DTYPE: all if none is named. Kernel launchers run on CPU tensors; instead
of launching, Triton compiles to the GPU's machine code. Prints a line for each binary: kernel, bytes of shared memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.attention.base import AttentionBatch
from kernels.attention.triton_attention import GpuAttention
from kernels.gpu import pointwise, sample, snapkv_scores, verdict
from kernels.kv_cache import LayerKV

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compile_only(architecture: int) -> None:
    """Patch Triton so that every later kernel launch only compiles."""
    target = GPUTarget("cuda", architecture, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.fn.__name__, kernel.metadata.shared)

    JITFunction.run = compile_it


def launch_all(dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        for heads, kv_heads, head_dim in ((32, 8, 128), (1, 1, 80)):
            x = torch.zeros(2, heads * head_dim, dtype=dtype)
            pointwise.norm(x, x.clone(), x[0], 1e-5)
            pointwise.norm(x, None, x[0], 1e-5)
            pointwise.silu_mul(x)
            layer = LayerKV(*torch.zeros(2, 9, kv_heads, 16, head_dim, dtype=dtype))
            qkv = torch.zeros(2, heads + 2 * kv_heads, head_dim, dtype=dtype)
            table = torch.zeros(9, head_dim // 2)
            index = torch.zeros(2, dtype=torch.int64)
            norms = torch.ones(head_dim, dtype=dtype), torch.ones(head_dim, dtype=dtype), 1e-5
            for each in (None, norms):
                pointwise.rotary(qkv, table, table, index, index, layer, each)
            for queries in (1, 5, 40):
                for pages in (torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, kv_heads, 64, dtype=torch.int64)):
                    attention = GpuAttention()
                    attention.plan(AttentionBatch([queries] * 2, [900] * 2, pages))
                    attention.run(layer, torch.zeros(2 * queries, heads, head_dim, dtype=dtype), 0.1)
            attention.plan(AttentionBatch([1], [1], pages[:1, ..., :1]))
            attention.run(layer, torch.zeros(1, heads, head_dim, dtype=dtype), 0.1)
            q, k = (torch.zeros(n, h, head_dim, dtype=dtype) for n, h in ((32, heads), (9000, kv_heads)))
            snapkv_scores.snapkv_scores(q, k.transpose(0, 1), 0.1, candidates=8000, kernel=5)
    for rows, size in ((2, 128_256), (1, 100), (1, 1)):
        index = torch.zeros(rows, dtype=torch.int64)
        sample.sample(torch.zeros(rows, size), torch.zeros(rows), index, index, 0)
        sample.noise_bits(index, index, 0, size)
        state = torch.zeros(rows, 64, dtype=torch.int32), index, torch.zeros(rows, 4, dtype=torch.int64)
        verdict.commit(*state, verdict.accept(*state, index, index, rows))


if __name__ == "__main__":
    compile_only(int(sys.argv[1]))
    launch_all([DTYPES[name] for name in sys.argv[2:] or DTYPES])
