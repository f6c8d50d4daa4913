"""A program that runs our attention on FlashInfer's own Python on a CPU: `python -m tests.support.flashinfer_versions
FOLDER [few]`, with an unpacked FlashInfer. Its compiled modules are replaced by torch, and by checks of what they are
given.

Compares with the oracle and prints one line of JSON: its version, the kernels that ran, and the number of comparisons.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from kernels.attention import shared_reading
from kernels.attention.base import AttentionBatch, GraphBatch, SharedPrefix
from kernels.attention.reference_attention import ReferenceAttention
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_graph import FlashInferGraphAttention
from kernels.flashinfer.flashinfer_modules import needed_modules
from kernels.flashinfer.flashinfer_workspace import Workspace, takes_uniform_queries
from kernels.kv.kv_pool import LayerKV
from tests.support.fake_flashinfer import attend

_ABSENT = ("tvm_ffi", "pynvml", "einops", "tabulate")  # FlashInfer imports these to compile, and to ask the driver
_CPU = torch.device("cpu")
_PAGES, _PAGE = 40, 16
_CAUSAL, _NO_MASK, _HND = 1, 0, 1


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports packages that are missing as mocks."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in _ABSENT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Module:
    """A compiled module of batch prefill: the same functions, in torch."""

    workspace_size = None
    ran: set[str] = set()  # noqa: RUF012

    def __init__(self, kernels: str, *arguments: Any) -> None:
        dtype, head_dim = arguments[0], arguments[4]
        ((_, expected),) = [each for each in needed_modules(dtype, head_dim, (9, 0)) if each[0] == kernels]
        wanted = list(expected.values())
        assert list(arguments[: len(wanted)]) == wanted, "not a module that needed_modules names"
        assert not any(arguments[len(wanted) :])  # options that later versions add
        self.kernels = kernels

    def plan(self, floats: Tensor, ints: Tensor, pinned: Tensor, starts: Tensor, *arguments: Any) -> list[int]:
        indptr, lengths, tokens, rows, _, _, page_size, captured, *_ = arguments
        assert ints.shape == pinned.shape
        assert len(floats) > 0
        assert tokens == int(starts[-1])
        queries = starts.diff()
        counts = indptr.diff()
        uniform = 0
        assert bool(((lengths - 1) // page_size + 1 == counts).all()) or (captured and self.kernels == "fa2")
        if captured:
            assert self.kernels == "fa2"
            uniform = arguments[15] if len(arguments) > 15 else 0
            assert uniform in (0, int(queries[0]))
        else:
            assert bool((queries >= 128).all()) or self.kernels == "fa2"
        assert rows == len(queries)
        return [uniform]

    def paged_run(self, floats: Tensor, ints: Tensor, plan: list[int], *arguments: Any) -> None:
        (
            q,
            k,
            v,
            starts,
            indptr,
            indices,
            last,
            out,
            lse,
            mask,
            layout,
            window,
            *_,
        ) = arguments
        assert layout == _HND
        assert window == -1
        assert mask == _CAUSAL or len(q) == len(last) or (mask == _NO_MASK and not plan[0])
        _Module.ran.add(f"{self.kernels}{' uniform' if plan[0] else ''}")
        scale = [each for each in arguments if isinstance(each, float)][1]  # after logits_soft_cap
        o, sums = attend(q, k, v, starts, indptr, indices, last, scale, causal=mask == _CAUSAL)
        out.copy_(o)
        lse.copy_(sums)


def _import(folder: str) -> Any:
    sys.path.insert(0, folder)
    sys.meta_path.append(_Absent())
    import flashinfer
    from flashinfer import decode, prefill

    modules: dict[Any, _Module] = {}

    def module(*arguments: Any) -> _Module:
        return modules.setdefault(arguments, _Module(*arguments))

    empty = torch.empty

    def without_pinning(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*sizes, **options)

    torch.empty = without_pinning  # type: ignore[assignment]
    for place in (prefill, decode):
        place.get_batch_prefill_module = module
        place.device_support_pdl = lambda device: False
        place.get_compute_capability = lambda device: (9, 0)
    return SimpleNamespace(library=flashinfer, version=flashinfer.__version__)


def _close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], real: Tensor | slice = slice(None)) -> int:
    torch.testing.assert_close(ours[0][real], theirs[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours[1][real], theirs[1], rtol=1e-3, atol=1e-3)
    return 1


def _pages(rows: int, heads: int | None) -> Tensor:
    return torch.randint(_PAGES, (rows, 20) if heads is None else (rows, heads, 20))


def _eager(layer: LayerKV, heads: int, apart: bool, capability: tuple[int, int], workspace: Workspace) -> int:
    ours, oracle, compared = FlashInferAttention(_PAGE, workspace), ReferenceAttention(_PAGE), 0
    batches = [
        ([1] * 6, [30, 200, 17, 90, 64, 25]),  # decode
        ([5, 1, 3, 5], [300, 40, 80, 5]),  # verify
        ([150], [260]),  # a chunk of a prompt
        ([1, 140, 1, 70, 5], [100, 200, 300, 71, 16]),  # both, and a last chunk
    ]
    for queries, lengths in batches:
        lists = _pages(len(queries), layer.k.shape[1] if apart else None)
        prefixes = []
        if lengths[0] == 100:
            lists[[0, 1, 2], ..., :3] = lists[0, ..., :3].clone()
            prefixes = [SharedPrefix((0, 1, 2), 3)]
        elif lengths[0] == 30:
            lists[[0, 2, 5], ..., :1] = lists[0, ..., :1].clone()
            lists[[1, 3], ..., :5] = lists[1, ..., :5].clone()
            prefixes = [SharedPrefix((0, 2, 5), 1), SharedPrefix((1, 3), 5)]
        batch = AttentionBatch(queries, lengths, lists, prefixes=prefixes)
        ours.plan(batch)
        oracle.plan(batch)
        for _ in range(2):
            q = torch.randn(sum(queries), heads + 4, layer.k.shape[3]).bfloat16()[:, :heads]
            compared += _close(ours.run(layer, q, 0.1), oracle.run(layer, q, 0.1))
    return compared


def _captured(layer: LayerKV, heads: int, apart: bool, queries: int, workspace: Workspace) -> int:
    lists = layer.k.shape[1] if apart else None
    batch = GraphBatch(queries, _pages(3, lists), torch.ones(3, dtype=torch.int64))
    ours = FlashInferGraphAttention(_PAGE, workspace, batch)
    oracle, compared = ReferenceAttention(_PAGE), 0
    for lengths in ([300, 17, 64], [1, 2, 320], [3, 1, 1], [33, 96, 16]):
        counts = [min(queries, length, 1 + index) for index, length in enumerate(lengths)]  # the rest is padding
        batch.pages.copy_(_pages(3, lists))
        batch.lengths.copy_(torch.tensor(lengths))
        ours.plan(lengths)
        oracle.plan(AttentionBatch(counts, lengths, batch.pages))
        real = torch.from_numpy(np.concatenate([np.arange(queries) >= queries - n for n in counts]))
        q = torch.randn(3 * queries, heads, layer.k.shape[3]).bfloat16()
        compared += _close(ours.run(layer, q, 0.1), oracle.run(layer, q[real], 0.1), real)
    return compared


def _per_layer(layer: LayerKV, heads: int, apart: bool, workspace: Workspace) -> int:
    """Lists of two layers, eager and captured; plans follow runs of other layers."""
    layers, counts, oracle, compared = [layer, replace(layer, index=1)], [1, 140, 4], ReferenceAttention(_PAGE), 0
    lists = torch.stack([_pages(3, layer.k.shape[1] if apart else None) for _ in layers])
    eager = FlashInferAttention(_PAGE, workspace)
    batch = GraphBatch(4, lists, torch.ones(3, dtype=torch.int64), per_layer=True)
    captured = FlashInferGraphAttention(_PAGE, workspace, batch)
    for lengths in ([300, 150, 64], [16, 320, 33]):
        lists.copy_(torch.randint(_PAGES, lists.shape))
        rows = AttentionBatch(counts, lengths, lists, per_layer=True)
        eager.plan(rows)
        oracle.plan(rows)
        for each in layers:
            q = torch.randn(sum(counts), heads, layer.k.shape[3]).bfloat16()
            compared += _close(eager.run(each, q, 0.1), oracle.run(each, q, 0.1))
        captured.plan(lengths)
        oracle.plan(AttentionBatch([4] * 3, lengths, lists, per_layer=True))
        for each in layers:
            q = torch.randn(12, heads, layer.k.shape[3]).bfloat16()
            compared += _close(captured.run(each, q, 0.1), oracle.run(each, q, 0.1))
    return compared


def main(folder: str, *, few: bool) -> None:
    """Compare all batches, for each number of heads per KV head. few: with lists of rows, or of heads, not both."""
    found = _import(folder)
    shared_reading.LAUNCH_BYTES = -(1 << 60)  # sharing pays however little it saves
    torch.manual_seed(0)
    compared = 0
    kinds = [*itertools.product(((8, 2), (6, 2), (4, 4)), (False, True))]
    for (heads, kv_heads), apart in (kinds[0], kinds[3], kinds[4]) if few else kinds:
        layer = LayerKV(*torch.randn(2, _PAGES, kv_heads, _PAGE, 64).bfloat16())
        for capability in ((9, 0), (8, 0)):
            workspace = Workspace(_CPU, capability, 132)
            compared += _eager(layer, heads, apart, capability, workspace)
        for queries in (1, 4):
            compared += _captured(layer, heads, apart, queries, workspace)
        compared += _per_layer(layer, heads, apart, workspace)
    uniform = takes_uniform_queries(found.library)
    result = {"version": found.version, "uniform": uniform, "kernels": sorted(_Module.ran), "compared": compared}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], few="few" in sys.argv[2:])
