"""The model `default-int4`: the numbers of the file that `default` is made from, before rounding to bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix
from models.decoder import DecoderModel
from models.layouts.group_layout import SETTINGS, GroupLayout
from models.loader import load_model
from models.weights import find_tensors
from parallel.group import Group
from tests.support.profiles import whole_test_only_in_all
from tests.support.rig import CPU, PagedRows

LENGTH = 96


def weights(directory: Path) -> Iterator[tuple[str, Tensor | QuantizedMatrix]]:
    return GroupLayout(SETTINGS).read_all(find_tensors(directory, tied=True))


def values(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)
        for name, weight in weights(directory)
    }


def test_it_is_default_but_for_the_rounding(model_dir: Path, int4_model_dir: Path) -> None:
    expected, found = load_file(model_dir / "model.safetensors"), values(int4_model_dir, torch.bfloat16)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (int4_model_dir / file).read_bytes() == (model_dir / file).read_bytes()
    config = json.loads((int4_model_dir / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config") == SETTINGS
    assert config == json.loads((model_dir / "config.json").read_text(encoding="utf-8"))


def test_formats(int4_model_dir: Path) -> None:
    """Layers have 4 bits with a minimum per 32 weights, embedding and head 8 bits; norms are those of the file."""
    for name, weight in weights(int4_model_dir):
        if name.endswith("norm.weight"):
            assert isinstance(weight, Tensor)
            assert weight.dtype == torch.float32
            continue
        assert isinstance(weight, QuantizedMatrix)
        assert weight.group_size == 32
        assert (weight.format, weight.mins is None) == (("int8", True) if "embed" in name else ("int4", False))


@pytest.fixture(scope="module")
def model(int4_model_dir: Path) -> DecoderModel:
    return load_model(int4_model_dir, dtype=torch.float32, device=CPU, group=Group.single(), progress=False)


@whole_test_only_in_all
def test_logits(model: DecoderModel, int4_model_dir: Path) -> None:
    """Those of transformers with the same values in float32; see test_default_model_logits for the tolerance."""
    config = transformers.AutoConfig.from_pretrained(int4_model_dir)
    del config.quantization_config
    oracle: Any = transformers.LlamaForCausalLM(config)
    oracle.float().eval()
    missing, unexpected = oracle.load_state_dict(values(int4_model_dir, torch.float32), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    text = Tokenizer.from_file(str(int4_model_dir / "tokenizer.json")).encode(topics["assert"]).ids[:LENGTH]
    found = PagedRows(model, [LENGTH], 16).forward({0: text}, {0: range(LENGTH)})
    with torch.inference_mode():
        expected = oracle(torch.tensor([text])).logits[0]
    errors = (found - expected).abs().amax(-1)
    assert float(errors.max()) <= 4e-4
    assert float(errors.median()) <= 1e-4
