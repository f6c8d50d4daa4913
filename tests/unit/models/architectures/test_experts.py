"""Mixtures of experts over ranks, with weights of few bits, and as configs and files describe them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from kernels.weights.weight_format import FORMATS
from models.config import ModelConfig, ModelError, parse_config, read_config
from models.decoder import DecoderModel
from models.loader import load_model, random_model
from models.model_config import ExpertsConfig
from models.parts.feed_forward import FeedForward
from models.parts.mixture import MixtureOfExperts
from parallel.group import Group
from parallel.matrix_layer import Placement, WeightChoice
from parallel.module import MatrixSlot
from tests.support.architecture_variants import VARIANTS, write_variant
from tests.support.rig import CPU, PagedRows, compiled, run_ranks


def test_mixtral_turns_by_its_own_theta() -> None:
    default: Any = transformers.MixtralConfig()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = parse_config({"model_type": "mixtral", **{key: getattr(default, key) for key in keys}})
    assert ours.rope.theta == default.rope_parameters["rope_theta"] == 1e6


def block(config: ModelConfig, experts: ExpertsConfig, group: Group, ops: Ops, weights: WeightChoice) -> Any:
    """A block with random weights."""
    layer = MixtureOfExperts("mlp", config, experts, Placement(group, torch.float32, CPU, ops, weights))
    for place in layer.matrix_slots():
        place.fill(_drawn(place))
    layer.prepare()
    return layer


def _drawn(place: MatrixSlot) -> Any:
    from kernels.weights.matrix import DenseMatrix

    generator = torch.Generator().manual_seed(sum(place.source.encode()))
    whole = torch.randn(place.full_shape, generator=generator) * 2 * place.full_shape[1] ** -0.5
    return DenseMatrix(whole[place.reads])


SHAPE = ModelConfig(
    vocab_size=53,
    hidden_size=40,
    intermediate_size=31,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    max_position_embeddings=64,
    experts=ExpertsConfig(count=7, per_token=3, size=29, shared_size=19, dense_layers=(0,)),
)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_every_expert(size: int, weights: str) -> None:
    """Uneven parts of each expert's features; all ranks return the same bits, and all together what one computes."""
    assert SHAPE.experts is not None
    experts = SHAPE.experts
    x = torch.randn(11, 40, generator=torch.Generator().manual_seed(3))
    work = lambda group: block(SHAPE, experts, group, REFERENCE, WeightChoice(weights))(x.clone())  # noqa: E731
    (expected,) = run_ranks(1, work)
    parts = run_ranks(size, work)
    assert all(torch.equal(part, parts[0]) for part in parts)
    if weights == "int8" and size > 1:  # each rank rounds its own features of an input
        assert (parts[0] - expected).norm() < 0.02 * expected.norm()
    else:
        torch.testing.assert_close(parts[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_models_of_ranks_agree_with_one(size: int) -> None:
    text = random.Random(1).choices(range(53), k=19)

    def work(group: Group) -> Tensor:
        rows = PagedRows(random_model(SHAPE, 5, torch.float64, CPU, group), [len(text)], page_size=4)
        return torch.cat([rows.forward({0: part}, {0: range(len(part))}) for part in (text[:9], text[9:18], text[18:])])

    (expected,) = run_ranks(1, work)
    torch.testing.assert_close(torch.cat(run_ranks(size, work), 1), expected, rtol=0, atol=1e-10)


def test_more_ranks_than_features() -> None:
    def work(group: Group) -> None:
        config = replace(SHAPE, experts=ExpertsConfig(count=3, per_token=1, size=2))
        with pytest.raises(ModelError, match="tensor parallel size 3: cannot split 2 into 3"):
            DecoderModel(config, Placement(group, torch.float32, CPU))

    run_ranks(3, work)


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_experts_of_few_bits(weights: str, kernels: str) -> None:
    """They compute what dense experts with the same values compute; the router keeps its own."""
    ops: Ops = REFERENCE if kernels == "reference" else compiled()
    experts = ExpertsConfig(count=6, per_token=2, size=64)
    config = replace(SHAPE, hidden_size=64, experts=experts)
    x = torch.randn(13, 64, generator=torch.Generator().manual_seed(3))
    layer = block(config, experts, Group.single(), ops, WeightChoice(weights))
    assert layer.matrix_formats == {weights: 6 * 3 * 64 * 64, "dense": 6 * 64}
    exact = MixtureOfExperts("mlp", config, experts, Placement(Group.single(), torch.float32, CPU))
    for place in exact.matrix_slots():
        matrix = _drawn(place)
        if not place.source.endswith("gate.weight"):
            values = FORMATS[weights].quantize(matrix.weight).dense(torch.float32)
            assert not torch.equal(values, matrix.weight)
            matrix = type(matrix)(values)
        place.fill(matrix)
    exact.prepare()
    expected = exact(x)
    # Products of int8, and of int4 on kernels, round their inputs to 8 bits.
    assert (layer(x) - expected).norm() < (0.02 if weights != "fp8" else 1e-5) * expected.norm()
    assert layer.drafting()(x).equal(layer(x))


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_experts_that_draft_in_fewer_bits(kernels: str) -> None:
    ops: Ops = REFERENCE if kernels == "reference" else compiled()
    assert SHAPE.experts is not None
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(3))
    mixed, dense, drafts = (
        block(SHAPE, SHAPE.experts, Group.single(), ops, WeightChoice(*each))
        for each in (("dense", "int8"), ("dense", None), ("int8", None))
    )
    assert mixed(x).equal(dense(x))
    assert mixed.drafting()(x).equal(drafts(x))
    assert not mixed(x).equal(drafts(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_token_does_not_depend_on_others(weights: str, dtype: torch.dtype) -> None:
    """To the bit, on CPU kernels: whatever other tokens are computed with it, and wherever it stands."""
    assert SHAPE.experts is not None
    experts = replace(SHAPE.experts, count=19, per_token=6)
    place = Placement(Group.single(), dtype, CPU, compiled(), WeightChoice(weights))
    layer = MixtureOfExperts("mlp", SHAPE, experts, place)
    for slot in layer.matrix_slots():
        slot.fill(_drawn(slot))
    layer.prepare()
    x = torch.randn(130, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = layer(x)
    rng = random.Random(weights)
    for count in (1, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 64, 129):
        picked = torch.tensor(rng.sample(range(130), count))
        assert torch.equal(layer(x[picked]), whole[picked])


def test_dense_layers_are_plain_networks() -> None:
    model = random_model(SHAPE, 1, torch.float32, CPU, Group.single())
    assert [type(layer._mlp) for layer in model._layers] == [FeedForward, MixtureOfExperts]
    assert [type(layer._mlp) for layer in model.with_layers([1])._layers] == [MixtureOfExperts]
    assert model.with_layers([1]).config.experts == replace(SHAPE.experts, dense_layers=())  # type: ignore[type-var]


def test_names_and_sizes_in_config_json(tmp_path: Path) -> None:
    write_variant(VARIANTS["qwen3_moe-plain-layers"], tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    expected = ExpertsConfig(count=4, per_token=2, size=20, normalised=True, dense_layers=(0,))
    assert read_config(tmp_path).experts == expected
    del data["num_local_experts"]
    assert parse_config(data | {"num_experts": 4}).experts == expected
    assert parse_config(data).experts == replace(expected, count=128)
    for broken, message in (
        ({"num_experts_per_tok": 200}, "num_experts_per_tok .200. is larger than the number of experts .128."),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size 0"),
    ):
        with pytest.raises(ModelError, match=message):
            parse_config(data | broken)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_variant(VARIANTS["mixtral"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.3\.w3"):
        load_model(tmp_path, dtype=torch.float32, device=CPU, group=Group.single(), progress=False)
