"""The table of products by format of weights, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import weight_products
from bench.gpu.weight_products import HEAD, ProductLine, lines, main, matrices
from kernels.reference_ops import REFERENCE
from tests.support.engines import TINY

CPU = torch.device("cpu")


def test_matrices_are_those_of_a_layer() -> None:
    heads, kv_heads = TINY.num_heads * TINY.head_dim, TINY.num_kv_heads * TINY.head_dim
    hidden, intermediate = TINY.hidden_size, TINY.intermediate_size
    assert [matrix[:2] for matrix in matrices(TINY)] == [
        (heads + 2 * kv_heads, hidden),
        (hidden, heads),
        (2 * intermediate, hidden),
        (hidden, intermediate),
    ]
    assert [gated for *_, gated in matrices(TINY)] == [False, False, True, False]


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_products, "_SECONDS", 1e-4)
    kinds = {name: (REFERENCE, name) for name in ("dense", "int4")}
    found = list(lines(TINY, kinds, [1, 3], CPU, 1e9))
    assert [(line.format, line.rows) for line in found] == [("dense", 1), ("dense", 3), ("int4", 1), ("int4", 3)]
    assert found[0].nbytes == sum(2 * columns * features for columns, features, _ in matrices(TINY))
    assert [line.dense_seconds for line in found[2:]] == [line.seconds for line in found[:2]]


def test_a_line_of_the_table() -> None:
    line = str(ProductLine("int4", 16, 50e-6, 100_000_000, 4e12, 120e-6))
    assert line.split() == ["int4", "16", "50.0", "100.0", "2000", "50%", "2.40"]
    assert len(line) == len(HEAD)


def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weight_products, "_SECONDS", 1e-4)
    monkeypatch.setattr(weight_products, "SHAPES", {"llama-3.1-8b": TINY})
    monkeypatch.setattr(weight_products, "copy_bandwidth", lambda device, size: 1e9)
    assert main(["--device", "cpu", "--kernels", "reference", "--formats", "int8", "--rows", "2"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["dense", "2"], ["int8", "2"]]
    with pytest.raises(SystemExit):
        main(["--formats", "int3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
