"""Random matrices in every layout: any part of one is read with the values that the layout states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kernels.weights.matrix import Matrix, QuantizedMatrix
from models.layouts.layout import parse_layout
from models.layouts.weight_files import WeightFiles
from models.weights import StoredTensors
from tests.support.packed_weights import LAYOUTS, Drawn, Packed
from tests.support.profiles import examples

MODULE = "model.layers.3.mlp.up_proj"


def read(packed: Packed, rows: slice, features: slice) -> Matrix:
    layout = parse_layout({"quantization_config": packed.settings})
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({f"{MODULE}.{part}": tensor.contiguous() for part, tensor in packed.tensors.items()}, file)
        names = [f"{MODULE}.{part}" for part in packed.tensors]
        stored = StoredTensors({name: (file, name) for name in names}, tied=False, warnings=())
        name, (height, width) = f"{MODULE}.weight", packed.values.shape
        assert set(layout.tensors(name, stored)) == set(names)
        with WeightFiles(stored) as files:
            layout.check(files, name, (height, width))
            return layout.read(files, name, (height, width), rows, features)


@st.composite
def parts(draw: st.DrawFn, size: int) -> slice:
    first = draw(st.integers(0, size - 1))
    return slice(first, draw(st.integers(first + 1, size)))


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(10, 40)
@given(data=st.data())
def test_parts_of_random_matrices(layout: str, data: st.DataObject) -> None:
    drawn = Drawn(
        seed=data.draw(st.integers(0, 2**31)),
        rows=data.draw(st.integers(1, 40)),
        features=data.draw(st.integers(1, 90)),
        group_size=data.draw(st.sampled_from([-1, 8, 16, 32])),
        bits=data.draw(st.sampled_from([4, 8])),
        symmetric=data.draw(st.booleans()),
        ordered=data.draw(st.booleans()),
    )
    packed = LAYOUTS[layout](drawn)
    rows, features = data.draw(parts(drawn.rows)), data.draw(parts(drawn.features))
    matrix = read(packed, rows, features)
    wanted = packed.values[rows, features]
    assert torch.equal(matrix.dense(torch.float32), wanted.float())
    assert matrix.shape == tuple(wanted.shape)
    assert isinstance(matrix, QuantizedMatrix)
    assert int(torch.bincount(matrix.groups).max()) <= matrix.group_size
    assert matrix.scales.shape == (len(wanted), int(matrix.groups.max()) + 1)


def whole(packed: Packed) -> QuantizedMatrix:
    matrix = read(packed, slice(0, packed.values.shape[0]), slice(0, packed.values.shape[1]))
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "packed", "integers"])
def test_symmetric_matrices_have_no_minima(name: str) -> None:
    drawn = Drawn(1, 16, 64, group_size=32, symmetric=True)
    assert whole(LAYOUTS[name](drawn)).mins is None
    assert whole(LAYOUTS[name](replace(drawn, symmetric=False))).mins is not None


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_stored_zero_points_count_where_settings_say_that_there_are_none(name: str) -> None:
    packed = LAYOUTS[name](Drawn(1, 16, 64, group_size=32))
    packed.settings |= {"sym": True, "zero_point": False}
    assert torch.equal(whole(packed).dense(torch.float32), packed.values.float())


def test_zero_points_may_be_left_out_of_symmetric_awq() -> None:
    packed = LAYOUTS["awq"](Drawn(1, 16, 64, group_size=32, symmetric=True))
    del packed.tensors["qzeros"]
    assert torch.equal(whole(packed).dense(torch.float32), packed.values.float())


@pytest.mark.parametrize(
    "index", [None, torch.zeros(64), torch.full((64,), -1), torch.zeros(0)], ids=["none", "zeros", "unset", "empty"]
)
def test_an_index_without_groups_means_regular_ones(index: Tensor | None) -> None:
    packed = LAYOUTS["gptq"](Drawn(1, 16, 64, group_size=16))
    del packed.tensors["g_idx"]
    if index is not None:
        packed.tensors["g_idx"] = index.int()
    assert torch.equal(whole(packed).dense(torch.float32), packed.values.float())


def test_exponents_stored_as_such() -> None:
    packed = LAYOUTS["mxfp8"](Drawn(1, 16, 64))
    packed.tensors["weight_scale"] = packed.tensors["weight_scale"].view(torch.float8_e8m0fnu)
    assert torch.equal(whole(packed).dense(torch.float32), packed.values.float())
    packed.tensors["weight_scale"].view(torch.uint8)[0, 0] = 255
    assert not whole(packed).is_finite(torch.float32)


def test_only_int8_in_one_group_rounds_inputs() -> None:
    """And only where the checkpoint says that inputs have 8 bits."""

    def rounds(packed: Packed) -> bool:
        kept = whole(packed)
        for group in packed.settings.get("config_groups", {}).values():
            group["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
        assert not kept.rounds_inputs
        return whole(packed).rounds_inputs

    assert rounds(LAYOUTS["integers"](Drawn(1, 16, 64, symmetric=True)))
    for packed in (
        LAYOUTS["integers"](Drawn(1, 16, 64)),
        LAYOUTS["integers"](Drawn(1, 16, 64, group_size=32, symmetric=True)),
        LAYOUTS["packed"](Drawn(1, 16, 64, symmetric=True)),
        *(LAYOUTS[name](Drawn(1, 16, 64)) for name in ("fp8", "fp8_rows", "fp8_tensor", "mxfp4")),
    ):
        assert not rounds(packed)
