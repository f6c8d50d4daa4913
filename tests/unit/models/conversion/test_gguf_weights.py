"""Weights of GGUF files: quantized matrices keep their values, and the model is the one that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from models.config import ModelError, parse_config
from models.conversion.convert import convert
from models.conversion.draft import make_draft
from models.decoder import DecoderModel
from models.loader import load_model, random_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.gguf_files import TOKENS, write_gguf
from tests.support.model_weights import tensors_of
from tests.support.profiles import each_value
from tests.support.rig import CPU, PagedRows, run_ranks

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {
    "model.layers.0.self_attn.q_proj.weight": "Q4_K",
    "model.layers.0.self_attn.k_proj.weight": "Q4_K",
    "model.layers.0.self_attn.v_proj.weight": "Q6_K",
    "model.layers.0.self_attn.o_proj.weight": "Q4_0",
    "model.layers.0.mlp.gate_proj.weight": "Q4_1",
    "model.layers.0.mlp.up_proj.weight": "Q4_1",
    "model.layers.0.mlp.down_proj.weight": "Q8_0",
    "model.layers.1.self_attn.q_proj.weight": "Q6_K",
    "model.layers.1.self_attn.k_proj.weight": "Q4_1",
    "model.layers.1.self_attn.v_proj.weight": "Q5_0",
    "model.layers.1.mlp.gate_proj.weight": "Q8_0",
    "model.layers.1.mlp.up_proj.weight": "Q4_K",
    "model.layers.1.mlp.down_proj.weight": "F16",
}
TEXT = [1, 5, 9, 3, 20, 24, 7, 2, 11]


def weights_of(config: dict[str, Any]) -> dict[str, Tensor]:
    model = random_model(parse_config(config), 0, torch.float32, CPU, Group.single())
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def written(path: Path, types: Mapping[str, str], **changes: Any) -> Path:
    config = CONFIG | changes
    return write_gguf(path / "model.gguf", config, weights_of(config), types=types)


def dequantized(path: Path) -> Any:
    """Return the model that transformers reads from a GGUF file, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def load(path: Path, weights: WeightChoice | None = None) -> DecoderModel:
    choice = weights or WeightChoice()
    return load_model(path, dtype=torch.float32, device=CPU, group=Group.single(), progress=False, weights=choice)


@torch.no_grad()
def logits_of(model: DecoderModel) -> Tensor:
    return PagedRows(model, [len(TEXT)], 16).forward({0: TEXT}, {0: range(len(TEXT))})


@torch.no_grad()
def assert_same_logits(model: DecoderModel, oracle: Any) -> None:
    expected = oracle(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


def stored(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(("embedding", "tied"), each_value(["Q8_0", "Q4_K", "F16", "F32"], [True, False]))
def test_the_model_is_that_of_transformers(tmp_path: Path, embedding: str, tied: bool) -> None:
    types = MIXED | {"model.embed_tokens.weight": embedding} | ({} if tied else {"lm_head.weight": "Q6_K"})
    src, dst = written(tmp_path, types, tie_word_embeddings=tied), tmp_path / "dst"
    convert(src, dst)
    config = json.loads((dst / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {"quant_method": "magicdec", "version": 1}
    assert_same_logits(load(dst), dequantized(src))


def test_what_is_stored(tmp_path: Path) -> None:
    """Scales as GGUF has them, and all that is not quantized in its own type."""
    convert(
        written(tmp_path, MIXED | {"model.embed_tokens.weight": "Q8_0"}, tie_word_embeddings=True), tmp_path / "dst"
    )
    found = stored(tmp_path / "dst")
    layer = "model.layers.0."
    forms = {
        "self_attn.q_proj": ((256, 128), torch.uint8, (256, 8), torch.float32, torch.float32),
        "self_attn.v_proj": ((64, 256), torch.int8, (64, 16), torch.float32, None),
        "self_attn.o_proj": ((256, 128), torch.uint8, (256, 8), torch.float16, None),
        "mlp.gate_proj": ((512, 128), torch.uint8, (512, 8), torch.float16, torch.float16),
        "mlp.down_proj": ((256, 512), torch.int8, (256, 16), torch.float16, None),
    }
    for name, (shape, dtype, groups, of_scales, of_mins) in forms.items():
        codes, scales, mins = (found.get(f"{layer}{name}.{part}") for part in ("codes", "scales", "mins"))
        assert codes is not None
        assert scales is not None
        assert (codes.shape, codes.dtype) == (shape, dtype)
        assert (scales.shape, scales.dtype) == (groups, of_scales)
        assert (None if mins is None else (mins.shape, mins.dtype)) == (of_mins and (groups, of_mins))
        assert f"{layer}{name}.weight" not in found
    assert found["model.embed_tokens.codes"].dtype == torch.int8
    assert found["model.layers.1.mlp.down_proj.weight"].dtype == torch.float16
    assert found["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float32
    assert found["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q5_K"])
def test_dense_weights(tmp_path: Path, kind: str) -> None:
    """All in bf16, as what transformers reads is rounded; so also types of which nothing is kept."""
    src, dst = written(tmp_path, {"model.layers.0.self_attn.q_proj.weight": kind}), tmp_path / "dst"
    convert(src, dst, weights="dense")
    assert "quantization_config" not in json.loads((dst / "config.json").read_text(encoding="utf-8"))
    found, expected = stored(dst), dequantized(src).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name
    if kind != "Q4_1":
        convert(src, tmp_path / "again")
        assert stored(tmp_path / "again").keys() == found.keys()


def test_a_quantized_directory_is_a_source_too(tmp_path: Path) -> None:
    src, kept, dense, draft = (tmp_path / name for name in ("src", "kept", "dense", "draft"))
    gguf_file = written(tmp_path, MIXED | {"model.embed_tokens.weight": "Q8_0"}, tie_word_embeddings=True)
    convert(gguf_file, src)
    convert(src, kept)
    assert stored(kept).keys() == stored(src).keys()
    assert all(torch.equal(tensor, stored(src)[name]) for name, tensor in stored(kept).items())
    convert(src, dense, weights="dense")
    convert(gguf_file, tmp_path / "direct", weights="dense")
    assert all(torch.equal(tensor, stored(dense)[name]) for name, tensor in stored(tmp_path / "direct").items())
    assert (dense / "config.json").read_bytes() == (tmp_path / "direct" / "config.json").read_bytes()
    make_draft(src, draft, [1])
    load(draft)


def test_ranks_read_their_parts(tmp_path: Path) -> None:
    """A quarter of 512 features is a part of the groups, and a quarter of 8 heads a part of the rows."""
    src = written(tmp_path, MIXED | {"lm_head.weight": "Q6_K"}, num_key_value_heads=4)
    convert(src, tmp_path / "dst")
    oracle = dequantized(src)
    expected = oracle(torch.tensor([TEXT])).logits[0]

    def work(group: Group) -> None:
        model = load_model(tmp_path / "dst", dtype=torch.float32, device=CPU, group=group, progress=False)
        logits = logits_of(model)
        mine = slice(model.vocab_start, model.vocab_start + model.vocab_size)
        torch.testing.assert_close(logits, expected[:, mine].detach(), atol=1e-4, rtol=1e-4)

    run_ranks(3, work)


@pytest.mark.parametrize("own", ["dense", "int4", "int8"])
def test_other_formats_when_loaded(tmp_path: Path, own: str) -> None:
    """dense computes with the same values; formats of 4 and 8 bits are near them."""
    src, dst = written(tmp_path, MIXED), tmp_path / "dst"
    convert(src, dst)
    model, oracle = load(dst, WeightChoice(own)), dequantized(src)
    if own == "dense":
        assert_same_logits(model, oracle)
        return
    expected = oracle(torch.tensor([TEXT])).logits[0].detach()
    error = (logits_of(model) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.3


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("model.norm.weight", "F64", "tensor output_norm.weight has unsupported type F64"),
        ("blk.0.odd.weight", None, "unexpected tensor blk.0.odd.weight"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, name: str, kind: str | None, match: str) -> None:
    weights = weights_of(CONFIG) | ({} if kind else {name: torch.zeros(2, 2)})
    src = write_gguf(tmp_path / "model.gguf", CONFIG, weights, types={name: kind} if kind else {})
    with pytest.raises(ModelError, match=match):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_missing_tensors(tmp_path: Path) -> None:
    weights = weights_of(CONFIG)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"1 tensors are missing, among them model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(write_gguf(tmp_path / "model.gguf", CONFIG, weights), tmp_path / "dst")
