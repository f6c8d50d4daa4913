"""Matrices of few bits in a file: what is written is read, whole or in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix, regular_groups
from models.files.json_values import ModelError
from models.layouts.group_layout import SETTINGS, GroupLayout, stored_tensors
from models.layouts.layout import parse_layout
from models.layouts.weight_files import WeightFiles
from models.weights import StoredTensors, find_tensors

NAME = "model.layers.0.mlp.down_proj.weight"
MODULE = NAME.removesuffix(".weight")
ROWS, FEATURES = 6, 24


def matrix(format: str = "int4", *, size: int = 4, mins: bool = True, exact: bool = False) -> QuantizedMatrix:
    """exact: scales that float16 does not hold."""
    generator = torch.Generator().manual_seed(0)
    low, high, dtype = (0, 16, torch.uint8) if format == "int4" else (-127, 128, torch.int8)
    values = torch.randn(2, ROWS, FEATURES // size, generator=generator)
    scales, least = values if exact else values.half().float()
    return QuantizedMatrix(
        format=format,
        codes=torch.randint(low, high, (ROWS, FEATURES), generator=generator).to(dtype),
        scales=scales,
        mins=least if mins else None,
        groups=regular_groups(FEATURES, size),
        group_size=size,
    )


def files(path: Path, tensors: dict[str, Tensor]) -> tuple[WeightFiles, StoredTensors]:
    file = path / "model.safetensors"
    save_file(tensors, file)
    stored = StoredTensors({name: (file, name) for name in tensors}, False, ())
    return WeightFiles(stored), stored


def assert_equal(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    assert (found.format, found.group_size) == (expected.format, expected.group_size)
    assert torch.equal(found.codes, expected.codes)
    assert found.codes.dtype == expected.codes.dtype
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.groups, expected.groups)
    assert (found.mins is None) == (expected.mins is None)
    if found.mins is not None and expected.mins is not None:
        assert torch.equal(found.mins, expected.mins)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mins", [False, True])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_whole(tmp_path: Path, format: str, mins: bool, exact: bool) -> None:
    written = matrix(format, mins=mins, exact=exact)
    tensors = dict(stored_tensors(NAME, written))
    assert set(tensors) == {f"{MODULE}.{part}" for part in ["codes", "scales", *(["mins"] if mins else [])]}
    assert tensors[f"{MODULE}.codes"].shape == (ROWS, FEATURES // (2 if format == "int4" else 1))
    for part in ("scales", "mins")[: 1 + mins]:
        assert tensors[f"{MODULE}.{part}"].dtype == (torch.float32 if exact else torch.float16)
    opened, stored = files(tmp_path, tensors)
    layout = parse_layout({"quantization_config": SETTINGS})
    assert set(layout.tensors(NAME, stored)) == set(tensors)
    with opened:
        layout.check(opened, NAME, (ROWS, FEATURES))
        found = layout.read(opened, NAME, (ROWS, FEATURES), slice(0, ROWS), slice(0, FEATURES))
    assert isinstance(found, QuantizedMatrix)
    assert_equal(found, written)


def test_the_first_of_two_codes_is_in_the_low_bits() -> None:
    written = matrix()
    packed = dict(stored_tensors(NAME, written))[f"{MODULE}.codes"]
    assert torch.equal(packed & 15, written.codes[:, 0::2])
    assert torch.equal(packed >> 4, written.codes[:, 1::2])


@pytest.fixture(scope="module", params=["int4", "int8"])
def stored_matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    written = matrix(request.param)
    opened, _ = files(tmp_path_factory.mktemp(request.param), dict(stored_tensors(NAME, written)))
    with opened:
        yield written, opened


@given(
    rows=st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)),
    features=st.tuples(st.integers(0, FEATURES - 1), st.integers(1, FEATURES)),
)
def test_parts(stored_matrix: Any, rows: tuple[int, int], features: tuple[int, int]) -> None:
    """A part may begin and end anywhere, within a group or a byte."""
    written, opened = stored_matrix
    index = slice(rows[0], rows[0] + rows[1]), slice(features[0], features[0] + features[1])
    index = slice(index[0].start, min(index[0].stop, ROWS)), slice(index[1].start, min(index[1].stop, FEATURES))
    found = GroupLayout(SETTINGS).read(opened, NAME, (ROWS, FEATURES), *index)
    assert isinstance(found, QuantizedMatrix)
    assert_equal(found, written.cut(*index))


def test_a_dense_matrix_beside_them(tmp_path: Path) -> None:
    weight = torch.randn(ROWS, FEATURES)
    opened, stored = files(tmp_path, {NAME: weight})
    layout = GroupLayout(SETTINGS)
    assert layout.tensors(NAME, stored) == (NAME,)
    assert layout.tensors("other.weight", stored) == ()
    with opened:
        part = layout.read(opened, NAME, (ROWS, FEATURES), slice(1, 3), slice(2, 9))
    assert torch.equal(part.dense(torch.float32), weight[1:3, 2:9])


def changed(part: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = dict(stored_tensors(NAME, matrix()))
    del tensors[f"{MODULE}.{part}"]
    return tensors if tensor is None else tensors | {f"{MODULE}.{part}": tensor}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("scales", None), rf"codes has no tensor {MODULE}\.scales"),
        (changed("codes", torch.zeros(ROWS, FEATURES // 2)), "codes has unsupported type F32"),
        (changed("codes", torch.zeros(ROWS, FEATURES, dtype=torch.uint8)), r"codes has shape \[6, 24\], expected"),
        (changed("scales", torch.zeros(ROWS, 5)), r"scales has shape \[6, 5\], which makes no groups of \[6, 24\]"),
        (changed("scales", torch.zeros(5, 6)), "scales has shape"),
        (changed("scales", torch.zeros(ROWS)), "scales has shape"),
        (changed("scales", torch.zeros(ROWS, 0)), "scales has shape"),
        (changed("scales", torch.zeros(ROWS, 6, dtype=torch.float64)), "scales has unsupported type F64"),
        (changed("mins", torch.zeros(ROWS, 3)), r"mins has shape \[6, 3\], expected \[6, 6\]"),
    ],
)
def test_broken_files(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    opened, _ = files(tmp_path, tensors)
    layout = GroupLayout(SETTINGS)
    with opened:
        with pytest.raises(ModelError, match=message):
            layout.check(opened, NAME, (ROWS, FEATURES))
        with pytest.raises(ModelError, match=message):
            layout.read(opened, NAME, (ROWS, FEATURES), slice(0, 2), slice(0, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "magicdec"}, "version None is not supported"),
        (SETTINGS | {"version": 2}, "version 2 is not supported"),
        (SETTINGS | {"group_size": 32}, "'group_size' is no key of quant_method 'magicdec'"),
    ],
)
def test_settings_of_other_versions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_layout({"quantization_config": settings})


def test_what_has_no_place_in_it() -> None:
    by_order = matrix()
    for other in (
        QuantizedMatrix(
            format="int4",
            codes=by_order.codes,
            scales=by_order.scales,
            mins=None,
            groups=by_order.groups.flip(0),
            group_size=4,
        ),
        QuantizedMatrix(
            format="fp8",
            codes=by_order.codes.to(torch.float8_e4m3fn),
            scales=by_order.scales,
            mins=None,
            groups=by_order.groups,
            group_size=4,
        ),
    ):
        with pytest.raises(ValueError, match=NAME):
            list(stored_tensors(NAME, other))


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_head_of_codes_beside_a_dense_embedding(tmp_path: Path, prefix: str) -> None:
    """It is stored, so it is not the embedding's; its name has no prefix in any case."""
    head = dict(stored_tensors("lm_head.weight", matrix()))
    layer = dict(stored_tensors(f"{prefix}layers.0.mlp.down_proj.weight", matrix()))
    embedding = {f"{prefix}embed_tokens.weight": torch.zeros(ROWS, FEATURES)}
    save_file(head | layer | embedding, tmp_path / "model.safetensors")
    found = find_tensors(tmp_path, tied=False)
    assert not found.tied
    assert found.warnings == ()
    assert {*head, f"{MODULE}.codes", "model.embed_tokens.weight"} <= found.sources.keys()
