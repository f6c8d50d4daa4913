"""Layers of quantized matrices: any rank count multiplies by the same numbers, whatever the parts' formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference_ops import ReferenceOps
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix
from kernels.weights.weight_format import FORMATS, WeightFormat
from parallel.group import Group
from parallel.layers import ColumnLinear, Columns, GateUpLinear, LMHead, RowLinear, VocabEmbedding
from parallel.matrix_layer import JoinedLinear, Placement, WeightChoice
from parallel.module import Module
from parallel.split import split
from tests.support.rig import CPU, run_ranks

CODED = ("int8", "int4", "fp8")
INNER, HIDDEN = 150, 40
"""Features of a row layer: neither a multiple of a group nor of ranks."""


def place(group: Group, weights: WeightChoice, ops: ReferenceOps | None = None) -> Placement:
    return Placement(group, torch.float64, CPU, ops or ReferenceOps(), weights)


def randn(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.div_(shape[-1] ** 0.5)


def fill(layer: Module, matrices: dict[str, Matrix]) -> None:
    for slot in layer.weight_slots():
        slot.tensor.fill_(0.25)
    for place in layer.matrix_slots():
        place.fill(matrices[place.source].cut(*place.reads))
    layer.prepare()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("stored", [False, True], ids=["rounded", "stored"])
def test_all_rank_counts_multiply_by_the_same_numbers(size: int, name: str, stored: bool) -> None:
    """Whether ranks round their parts of dense matrices, or a checkpoint is rounded already."""
    values = {"a.weight": randn(INNER, HIDDEN, seed=1), "b.weight": randn(HIDDEN, INNER, seed=2)}
    rounded = {key: FORMATS[name].quantize(value) for key, value in values.items()}
    given: dict[str, Matrix] = dict(rounded) if stored else {key: DenseMatrix(each) for key, each in values.items()}
    x = randn(3, HIDDEN, seed=3) * HIDDEN**0.5

    def work(group: Group) -> Tensor:
        mine = split(INNER, group.size)[group.rank].slice()
        chosen = place(group, WeightChoice(None if stored else name))
        column = ColumnLinear([Columns("a", INNER, mine)], HIDDEN, bias=True, place=chosen)
        row = RowLinear("b", INNER, HIDDEN, mine=mine, bias=True, place=chosen)
        fill(column, given)
        fill(row, given)
        return row(column(x))

    first = F.linear(x, rounded["a.weight"].dense(torch.float64)) + 0.25
    expected = F.linear(first, rounded["b.weight"].dense(torch.float64)) + 0.25
    for found in run_ranks(size, work):
        if name == "int8":  # rounds inputs too
            assert (found - expected).norm() < 0.02 * expected.norm()
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("own", [None, *CODED])
@pytest.mark.parametrize("drafts", CODED)
def test_drafts_have_matrices_of_their_own(own: str | None, drafts: str) -> None:
    values = {"a.weight": randn(INNER, HIDDEN, seed=1)}
    x = randn(3, HIDDEN)

    def made(weights: WeightChoice) -> ColumnLinear:
        layer = ColumnLinear([Columns("a", INNER, slice(0, INNER))], HIDDEN, bias=False, place=place(one, weights))
        fill(layer, {"a.weight": DenseMatrix(values["a.weight"])})
        return layer

    one = Group.single()
    layer = made(WeightChoice(own, drafts))
    assert torch.equal(layer(x), made(WeightChoice(own))(x))
    assert torch.equal(layer.drafting()(x), made(WeightChoice(drafts))(x))
    assert (layer.drafting().linear is layer.linear) == (own == drafts)


def permuted(matrix: Matrix) -> QuantizedMatrix:
    """Return the matrix with its groups over features in another order."""
    assert isinstance(matrix, QuantizedMatrix)
    order = torch.randperm(len(matrix.groups), generator=torch.Generator().manual_seed(5))
    return replace(matrix, groups=matrix.groups[order])


FUSED: dict[str, tuple[WeightFormat, WeightFormat]] = {
    "formats": (Int4Format(32), FORMATS["int8"]),
    "groups": (Int4Format(32), Int4Format(16)),
    "zeros": (Int4Format(32), Int4Format(32, symmetric=True)),
    "dense": (FORMATS["dense"], FORMATS["fp8"]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [*FUSED, "orders"])
def test_parts_without_a_common_format_are_products_side_by_side(kind: str, bias: bool) -> None:
    forms = FUSED.get(kind, (Int4Format(16), Int4Format(16)))
    matrices = [form.quantize(randn(rows, HIDDEN, seed=rows)) for form, rows in zip(forms, (9, 6), strict=True)]
    if kind == "orders":
        matrices[1] = permuted(matrices[1])
    given = {f"{name}.weight": matrix for name, matrix in zip("ab", matrices, strict=True)}
    x = randn(4, HIDDEN)
    parts = [Columns("a", 9, slice(0, 9)), Columns("b", 6, slice(0, 6))]
    layer = ColumnLinear(parts, HIDDEN, bias=bias, place=place(Group.single(), WeightChoice()))
    fill(layer, given)
    assert isinstance(layer.linear, JoinedLinear)
    expected = torch.cat([F.linear(x, each.dense(torch.float64)) for each in given.values()], 1) + 0.25 * bias
    torch.testing.assert_close(layer(x), expected, rtol=0.02 if kind == "formats" else 1e-9, atol=0.02)

    halves = [form.quantize(randn(INNER, HIDDEN, seed=seed)) for seed, form in enumerate(forms)]
    names = ("m.gate_proj.weight", "m.up_proj.weight")
    mlp = GateUpLinear(
        "m", HIDDEN, INNER, mine=slice(0, INNER), bias=False, place=place(Group.single(), WeightChoice())
    )
    if kind == "orders":
        halves[1] = permuted(halves[1])
    fill(mlp, dict(zip(names, halves, strict=True)))
    gate, up = (F.linear(x, each.dense(torch.float64)) for each in halves)
    torch.testing.assert_close(mlp(x), F.silu(gate) * up)


def test_formats_that_a_device_lacks_become_dense() -> None:
    class Few(ReferenceOps):
        weight_formats = frozenset(("dense", "int8"))

    matrix = Int4Format(16).quantize(randn(9, HIDDEN))
    layer = ColumnLinear(
        [Columns("a", 9, slice(0, 9))], HIDDEN, bias=False, place=place(Group.single(), WeightChoice(), Few())
    )
    fill(layer, {"a.weight": matrix})
    assert layer.matrix_bytes == 9 * HIDDEN * 8
    x = randn(2, HIDDEN)
    torch.testing.assert_close(layer(x), F.linear(x, matrix.dense(torch.float64)))


@pytest.mark.parametrize("wanted", [None, "int8"])
def test_stored_matrices_that_a_device_does_not_take(wanted: str | None) -> None:
    """Dense as stored, and rounded anew where the format is asked for by name."""

    class NoMinima(ReferenceOps):
        def takes(self, matrix: Matrix) -> bool:
            return not isinstance(matrix, QuantizedMatrix) or matrix.mins is None

    plain = FORMATS["int8"].quantize(randn(9, HIDDEN))
    assert isinstance(plain, QuantizedMatrix)
    matrix = replace(plain, mins=torch.full_like(plain.scales, 0.01), rounds_inputs=False)
    layer = ColumnLinear(
        [Columns("a", 9, slice(0, 9))],
        HIDDEN,
        bias=False,
        place=place(Group.single(), WeightChoice(wanted), NoMinima()),
    )
    fill(layer, {"a.weight": matrix})
    assert dict(layer.matrix_formats) == {wanted or "dense": 9 * HIDDEN}
    x = randn(2, HIDDEN)
    expected = F.linear(x, matrix.dense(torch.float64))
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()


def test_a_tied_head_multiplies_by_what_is_stored() -> None:
    """The embedding is rounded to the model's precision; the head of int4 has 8 bits."""
    values = randn(30, HIDDEN).bfloat16()
    x, ids = randn(2, HIDDEN).bfloat16(), torch.arange(30)
    stored = Int4Format(16).quantize(values)
    for weights, given in ((None, stored), ("int4", DenseMatrix(values)), (None, DenseMatrix(values))):
        place = Placement(Group.single(), torch.bfloat16, CPU, ReferenceOps(), WeightChoice(weights))
        embedding = VocabEmbedding("e", 30, HIDDEN, place=place, shared=True)
        head = LMHead("h", 30, HIDDEN, tied=embedding, place=place)
        for layer in (embedding, head):
            fill(layer, {"e.weight": given})
        assert torch.equal(embedding(ids), given.dense(torch.bfloat16))
        assert head.shares_embedding == (weights is None and isinstance(given, DenseMatrix))
        used = FORMATS["int8"].quantize(values) if weights else given
        expected = F.linear(x.float(), used.dense(torch.float32))
        assert (head(x) - expected).norm() < 0.02 * expected.norm()


def test_what_is_missing() -> None:
    parts = [Columns("a", 9, slice(0, 9)), Columns("b", 6, slice(0, 6))]
    layer = ColumnLinear(parts, HIDDEN, bias=False, place=place(Group.single(), WeightChoice()))
    first, _ = layer.matrix_slots()
    first.fill(DenseMatrix(randn(9, HIDDEN)))
    with pytest.raises(RuntimeError, match="not filled: b"):
        layer.prepare()


@pytest.mark.parametrize("size", [1, 3])
def test_a_format_that_is_asked_for_is_rounded_to_what_a_device_takes(size: int) -> None:
    """Codes with minima have the format by name, but a device may lack their product."""

    class WithoutMinima(ReferenceOps):
        def takes(self, matrix: Matrix) -> bool:
            return isinstance(matrix, DenseMatrix) or (isinstance(matrix, QuantizedMatrix) and matrix.mins is None)

    rounded = FORMATS["int8"].quantize(randn(9, INNER))
    assert isinstance(rounded, QuantizedMatrix)
    matrix = replace(rounded, mins=rounded.scales * 3, rounds_inputs=False)
    values = matrix.dense(torch.float64)
    x = randn(2, INNER)
    expected = F.linear(x, FORMATS["int8"].quantize(values).dense(torch.float64))

    def work(group: Group) -> tuple[Tensor, list[str]]:
        mine = split(INNER, group.size)[group.rank].slice()
        layers = [
            RowLinear("a", INNER, 9, mine=mine, bias=False, place=place(group, WeightChoice(*choice), WithoutMinima()))
            for choice in (("int8",), (None, "int8"))
        ]
        for layer in layers:
            fill(layer, {"a.weight": matrix})
        asked, drafts = layers[0], layers[1].drafting()
        found = [next(iter(layer.matrix_formats)) for layer in (asked, layers[1], drafts)]
        assert torch.equal(asked(x[:, mine]), drafts(x[:, mine]))
        return asked(x[:, mine]), found

    for found, formats in run_ranks(size, work):
        assert formats == ["int8", "dense", "int8"]
        assert (found - expected).norm() < 0.02 * expected.norm()
