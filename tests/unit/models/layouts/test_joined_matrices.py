"""Matrices that a checkpoint has joined, in all layouts: each part of a product reads its own rows."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.weights.matrix import DenseMatrix
from models.config import ModelConfig, ModelError, parse_config
from models.conversion.convert import convert
from models.decoder import DecoderModel
from models.loader import check_model, load_model, random_model
from models.model_config import WeightNames
from models.quantize.quantize_model import quantize
from parallel.group import Group
from parallel.matrix_layer import Placement
from tests.support.model_weights import tensors_of
from tests.support.packed_weights import LAYOUTS, Drawn, Packed
from tests.support.profiles import each_value, is_all
from tests.support.rig import CPU, PagedRows, run_ranks
from tests.support.tiny import write_tokenizer

# Parts begin within words of eight codes and blocks of 16 rows: at rows 36 and 54 of 72, and 27 of 54.
PHI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOKENS = [5, 17, 3, 39, 0, 8, 21, 11]


def load(path: Path, group: Group | None = None) -> DecoderModel:
    return load_model(path, dtype=torch.float32, device=CPU, group=group or Group.single(), progress=False)


def logits(model: DecoderModel) -> Tensor:
    return PagedRows(model, [len(TOKENS)], 16).forward({0: TOKENS}, {0: range(len(TOKENS))})


def write(path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(PHI | changes))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def dense_weights() -> dict[str, Tensor]:
    model = random_model(parse_config(PHI), 0, torch.float32, CPU, Group.single())
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def parted(tensors: dict[str, Tensor], inner: int = 27) -> dict[str, Tensor]:
    """Return a checkpoint with the parts of joined matrices and biases. inner: intermediate features."""
    found, sizes = {}, {"qkv_proj": (36, 18, 18), "gate_up_proj": (inner, inner)}
    for name, tensor in tensors.items():
        *prefix, module, kind = name.split(".")
        if module not in PARTS:
            found[name] = tensor
            continue
        for part, rows in zip(PARTS[module], tensor.split_with_sizes(sizes[module]), strict=True):
            found[".".join([*prefix, part, kind])] = rows
    return found


def scaled(packed: Packed, features: int) -> Packed:
    """Scale the values of a matrix to those of weights."""
    power = 2.0 ** torch.tensor(features**-0.5 / float(packed.values.std())).log2().round()
    for name in packed.tensors:
        if name.endswith(("scale", "scales", "scale_inv")):
            scale = packed.tensors[name]
            if scale.dtype == torch.uint8:
                packed.tensors[name] = (scale.int() + int(power.log2())).to(torch.uint8)
            else:
                packed.tensors[name] = (scale * power).to(scale.dtype)
    packed.values = packed.values * power
    return packed


@pytest.mark.parametrize("layout", [*LAYOUTS, "dense"])
def test_layouts(layout: str, tmp_path: Path) -> None:
    """Every number of ranks up to one query head each has the logits of the dense values in parts. `make test` has one
    number for each layout."""
    values, stored, settings = dense_weights(), {}, None
    for name, value in values.items():
        module, rows = name.removesuffix(".weight"), value.shape[0]
        if layout == "dense" or not module.endswith(tuple(PARTS)):
            stored[name] = value
            continue
        drawn = Drawn(len(stored), rows, 32, group_size=16, ordered=layout.startswith("gptq"))
        packed = scaled(LAYOUTS[layout](drawn), 32)
        settings = packed.settings
        stored |= {f"{module}.{part}": tensor for part, tensor in packed.tensors.items()}
        values[name] = packed.values.float()
    write(tmp_path / "joined", stored, quantization_config=settings)
    expected = logits(load(write(tmp_path / "parts", parted(values), model_type="llama", rms_norm_eps=1e-5)))
    sizes = [1, 2, 3, 4, 6]
    for size in sizes if is_all() else [sizes[[*LAYOUTS, "dense"].index(layout) % len(sizes)]]:
        found = run_ranks(size, lambda group: logits(load(tmp_path / "joined", group)))
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)
        run_ranks(size, lambda group: check_model(tmp_path / "joined", parse_config(PHI), group))


def test_biases() -> None:
    joined = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=27,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=6,
        max_position_embeddings=64,
        qkv_bias=True,
        mlp_bias=True,
        names=WeightNames(qkv="qkv_proj", gate_up="gate_up_proj"),
    )
    whole = random_model(joined, 1, torch.float64, CPU, Group.single())
    shapes: dict[str, tuple[int, ...]] = {slot.source: slot.full_shape for slot in whole.weight_slots()}
    shapes |= {slot.source: slot.full_shape for slot in whole.matrix_slots()}
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator).double() / 6 for name, shape in shapes.items()}

    def run(config: ModelConfig, checkpoint: dict[str, Tensor], size: int) -> Tensor:
        def work(group: Group) -> Tensor:
            model = DecoderModel(config, Placement(group, torch.float64, CPU))
            for slot in model.weight_slots():
                assert checkpoint[slot.source].shape == slot.full_shape
                slot.tensor.copy_(checkpoint[slot.source][slot.index])
            for place in model.matrix_slots():
                place.fill(DenseMatrix(checkpoint[place.source][place.reads]))
            model.prepare()
            return logits(model)

        return torch.cat(run_ranks(size, work), 1)

    expected = run(replace(joined, names=WeightNames()), parted(weights), 1)
    for size in (1, 2, 3, 5):
        torch.testing.assert_close(run(joined, weights, size), expected, rtol=0, atol=1e-10)


def test_what_is_missing_or_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, name = dense_weights(), "model.layers.0.self_attn.qkv_proj.weight"
    lacking = write(tmp_path / "lacking", {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ModelError, match=f"tensors missing from the weight files: {name}$"):
        load(lacking)
    q = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ModelError, match=f"unexpected tensor {q}"):
        load(write(tmp_path / "more", weights | {q: torch.ones(36, 32)}))
    with pytest.raises(ModelError, match=r"qkv_proj.weight has shape \[71, 32\], expected \[72, 32\]"):
        load(write(tmp_path / "less", weights | {name: weights[name][1:]}))
    zeros = {"model.layers.1.mlp.gate_up_proj.bias": torch.zeros(54)}  # which libraries add
    torch.testing.assert_close(
        logits(load(write(tmp_path / "zeros", weights | zeros))), logits(load(tmp_path / "zeros"))
    )
    weights[name][:] = float("nan")
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "nan", weights))
    (said,) = (record.getMessage() for record in caplog.records if "NaN" in record.getMessage())
    assert f"tensor {name} holds values" in said


def test_conversion_keeps_them(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in dense_weights().items()}
    write_tokenizer(write(tmp_path / "source", weights))
    convert(tmp_path / "source", tmp_path / "converted")
    made = load_file(tmp_path / "converted" / "model.safetensors")
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weights[name]) for name in made)


@pytest.mark.parametrize(
    ("symmetric", "texts"),
    each_value([False, True], [[], [[1 + (7 * i + j) % 39 for i in range(24)] for j in range(8)]]),
)
def test_quantized_like_their_parts(symmetric: bool, texts: list[list[int]], tmp_path: Path) -> None:
    """`magicdec quantize` rounds a joined matrix to what it makes of the parts: their rows have the same inputs."""
    changes = {"intermediate_size": 32}
    model = random_model(parse_config(PHI | changes), 0, torch.float32, CPU, Group.single())
    weights = {name: tensor.bfloat16() for name, tensor in tensors_of(model).items()}
    joined = write(tmp_path / "joined", weights, **changes)
    split = write(tmp_path / "parts", parted(weights, 32), model_type="llama", rms_norm_eps=1e-5, **changes)
    for source in (joined, split):
        write_tokenizer(source)
        quantize(source, source / "int4", texts, group_size=4, symmetric=symmetric, device="cpu")
    found = load_file(joined / "int4" / "model.safetensors")
    assert "model.layers.0.self_attn.qkv_proj.weight_packed" in found
    assert found["model.layers.0.mlp.gate_up_proj.weight_shape"].tolist() == [64, 32]
    torch.testing.assert_close(logits(load(joined / "int4")), logits(load(split / "int4")), rtol=0, atol=1e-5)
