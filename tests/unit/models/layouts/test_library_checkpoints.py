"""Checkpoints that the formats' own libraries wrote (tests/support/write_quantized.py), and what these libraries make
of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.reference_ops import REFERENCE
from kernels.weights.matrix import QuantizedMatrix
from models.config import ModelError
from models.conversion.convert import convert
from models.decoder import DecoderModel
from models.layouts.layout import find_layout
from models.layouts.weight_files import WeightFiles
from models.loader import check_model, load_model
from models.weights import find_tensors
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.paths import ROOT
from tests.support.profiles import is_all
from tests.support.rig import CPU, PagedRows, run_ranks

DATA = ROOT / "tests" / "data" / "quantized"
DIRECTORIES = {path.name: path for path in sorted(DATA.iterdir())}
SHOWN, SHAPE = "model.layers.0.mlp.down_proj.weight", (64, 160)
EXACT = WeightChoice(own="dense")
ROUNDED = {"ct-w8a8"}
"""Layouts whose products round their inputs."""


@pytest.fixture(params=DIRECTORIES)
def directory(request: pytest.FixtureRequest) -> Path:
    return DIRECTORIES[request.param]


def expected(directory: Path, name: str) -> Tensor:
    tensor: Tensor = load_file(directory / "expected.safetensors")[name]
    return tensor


def load(directory: Path, group: Group, weights: WeightChoice) -> DecoderModel:
    return load_model(
        directory, dtype=torch.float32, device=CPU, group=group, progress=False, ops=REFERENCE, weights=weights
    )


def logits(directory: Path, model: DecoderModel) -> Tensor:
    token_ids = expected(directory, "token_ids").tolist()
    rows = PagedRows(model, [len(token_ids)], 16)
    return rows.forward({0: token_ids}, {0: range(len(token_ids))})


def read(directory: Path, rows: slice, features: slice) -> QuantizedMatrix:
    with WeightFiles(find_tensors(directory, tied=False)) as files:
        matrix = find_layout(directory).read(files, SHOWN, SHAPE, rows, features)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


def test_values_are_those_of_the_library(directory: Path) -> None:
    wanted = expected(directory, SHOWN)
    matrix = read(directory, slice(0, SHAPE[0]), slice(0, SHAPE[1]))
    assert matrix.shape == SHAPE
    assert torch.equal(matrix.dense(torch.float32)[: len(wanted)], wanted)


def test_logits_are_those_of_the_library(directory: Path) -> None:
    wanted = expected(directory, "logits")
    torch.testing.assert_close(logits(directory, load(directory, Group.single(), EXACT)), wanted, atol=1e-4, rtol=1e-4)
    served = logits(directory, load(directory, Group.single(), WeightChoice()))
    if directory.name in ROUNDED:
        assert (served - wanted).norm() < 0.05 * wanted.norm()
    else:
        torch.testing.assert_close(served, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_compute_the_same(directory: Path, size: int) -> None:
    if not is_all() and [*DIRECTORIES].index(directory.name) % 2 == size % 2:
        pytest.skip("only in `make test-all`: other layouts have this number of ranks")
    choice = EXACT if directory.name in ROUNDED else WeightChoice()

    def work(group: Group) -> Tensor:
        check_model(directory, load(directory, group, choice).config, group)
        return logits(directory, load(directory, group, choice))

    shards = run_ranks(size, work)
    torch.testing.assert_close(torch.cat(shards, 1), expected(directory, "logits"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "features"),
    [(slice(0, 64), slice(0, 53)), (slice(5, 6), slice(53, 107)), (slice(33, 63), slice(31, 160))],
    ids=["first", "middle", "last"],
)
def test_parts_hold_the_same_values(directory: Path, rows: slice, features: slice) -> None:
    whole, part = read(directory, slice(0, SHAPE[0]), slice(0, SHAPE[1])), read(directory, rows, features)
    assert torch.equal(part.dense(torch.float32), whole.dense(torch.float32)[rows, features])
    cut = whole.cut(rows, features)
    for name in ("codes", "scales", "groups"):
        assert torch.equal(getattr(part, name).float(), getattr(cut, name).float())
    assert (part.mins is None, part.group_size, part.format) == (cut.mins is None, cut.group_size, cut.format)


def test_scales_that_are_not_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(DIRECTORIES["ct-fp8-kv"], Group.single(), WeightChoice())
    says = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert says == [
        "scales of an 8-bit KV cache are not used: engine.cache.format says what the cache stores",
        "scales of inputs are not used: products round inputs by their own range, or not at all",
    ]


def test_they_are_not_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in DIRECTORIES["awq"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(ModelError, match="has quantized weights, which are served as they are"):
        convert(source, tmp_path / "converted")
