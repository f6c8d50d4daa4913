"""Architectures that rotate otherwise than Llama: longrope within the original positions, and keys of configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models.config import ModelError, parse_config, read_config
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group
from tests.support.architecture_variants import VARIANTS, write_variant
from tests.support.oracle_models import SIZES, OracleRow, draw_text, load_served
from tests.support.rig import CPU

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("name", ["phi3-128k", "phi4-mini"])
def test_longrope_within_the_original_positions(name: str, tmp_path: Path) -> None:
    """Factors are those of the positions that are served, not of the text. Fewer positions, set when memory is known,
    count as well."""
    theirs = write_variant(VARIANTS[name], tmp_path)
    tokens = draw_text(30)
    with torch.inference_mode():
        short = theirs(torch.tensor([tokens])).logits[0]

    def logits(model: DecoderModel) -> Tensor:
        return OracleRow(model, 30).forward(tokens)

    limited = load_served(tmp_path)
    torch.testing.assert_close(logits(load_served(tmp_path, max_positions=32)), short, rtol=0, atol=1e-4)
    assert (logits(limited) - short).abs().max() > 0.01
    limited.limit_positions(33)
    assert (logits(limited) - short).abs().max() > 0.01
    limited.limit_positions(32)
    torch.testing.assert_close(logits(limited), short, rtol=0, atol=1e-4)
    (warning,) = read_config(tmp_path).warnings
    assert re.search("longrope: texts of up to 32 tokens .* at most 32; transformers decides by the text", warning)


def test_dynamic_rope_goes_by_the_positions_that_are_served(tmp_path: Path) -> None:
    """All texts are rotated as transformers rotates one of that length, and as without scaling within the original
    positions if there are no more."""
    theirs = write_variant(VARIANTS["internlm3"], tmp_path)
    served = load_served(tmp_path)
    tokens = draw_text(served.config.max_model_len)
    assert len(tokens) == 6 * 32
    with torch.inference_mode():
        long, between, short = (theirs(torch.tensor([tokens[:length]])).logits[0] for length in (None, 90, 31))

    def check(length: int, expected: Tensor, *, equal: bool = True) -> None:
        found = OracleRow(served, length).forward(tokens[:length])
        if equal:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        else:
            assert (found - expected).abs().max() > 0.01

    check(len(tokens), long)
    check(90, between)
    check(31, short, equal=False)
    served.limit_positions(90)
    check(90, between, equal=False)
    with torch.inference_mode():
        check(90, theirs(torch.tensor([tokens[:90]])).logits[0])  # the short text before it made transformers forget
    served.limit_positions(32)
    check(31, short)


def test_relative_positions_need_rotations_without_a_factor() -> None:
    """`DecoderModel.rotary` turns queries that were rotated before."""
    sizes = SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = parse_config({"model_type": "llama", **sizes, "rope_scaling": YARN})
    model = random_model(config, 0, torch.float32, CPU, Group.single())
    rotary = model.rotary
    assert rotary is not None
    cos, sin = rotary
    assert cos.shape == (128, 8)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(128, 8))


def test_ministral_of_absent_parameters() -> None:
    sizes = SIZES | {"max_position_embeddings": 262144}
    stated = {"model_type": "ministral3", **sizes}
    parameters = transformers.AutoConfig.for_model("ministral3", **sizes).to_dict()["rope_parameters"]
    assert parameters["llama_4_scaling_beta"] == 0.1
    assert parse_config(stated) == parse_config({**stated, "rope_parameters": parameters})


@pytest.mark.parametrize(
    ("changes", "sliding", "unrotated"),
    [
        ({"sliding_window_pattern": 4}, (0, 1, 2, 4, 5), (3,)),
        ({}, (0, 1, 2, 4, 5), (3,)),
        ({"sliding_window_pattern": "LG"}, (0, 2, 4), (1, 3, 5)),
        ({"sliding_window_pattern": "L"}, (0, 1, 2, 3, 4), (5,)),
        ({"sliding_window_pattern": None}, (), (0, 1, 2, 3, 4, 5)),
        ({"sliding_window": 256}, (), (3,)),
        ({"sliding_window": None}, (), ()),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 6}, (), ()),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, (1, 3, 5), (0, 2, 4)),
    ],
)
def test_layers_of_exaone(changes: dict[str, Any], sliding: tuple[int, ...], unrotated: tuple[int, ...]) -> None:
    """A window that hides nothing decides which layers rotate all the same."""
    data = {"model_type": "exaone4", **SIZES, "num_hidden_layers": 6, "num_attention_heads": 3, "sliding_window": 16}
    config = parse_config({**data, "num_key_value_heads": 3, **changes})
    assert (config.sliding_layers, config.unrotated_layers) == (sliding, unrotated)


def test_what_is_missing() -> None:
    with pytest.raises(ModelError, match="'hunyuan_v1_dense' is not supported: it needs norms of queries and keys aft"):
        parse_config({"model_type": "hunyuan_v1_dense", **SIZES})
    with pytest.raises(ModelError, match="sliding_window_pattern 'LX'"):
        parse_config({"model_type": "exaone4", **SIZES, "num_hidden_layers": 2, "sliding_window_pattern": "LX"})
