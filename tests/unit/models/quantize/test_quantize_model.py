"""`magicdec quantize`: the directory that it writes, and what its matrices are rounded by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from kernels.attention.base import AttentionBatch
from kernels.kv.kv_pool import KVPool
from kernels.ops import Gate
from kernels.reference_ops import ReferenceLinear, ReferenceOps
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, regular_groups
from models.batch import ForwardBatch
from models.config import ModelError
from models.layouts.group_layout import SETTINGS, stored_tensors
from models.layouts.packed_codes import pack
from models.loader import load_model
from models.model_config import ExpertsConfig
from models.quantize.gptq_rounding import gptq
from models.quantize.layer_rounder import token_hessian
from models.quantize.quantize_model import quantize
from parallel.group import Group
from server.cli.app import app
from tests.support.engines import TINY
from tests.support.ranks import write_random_model
from tests.support.rig import CPU
from tests.support.tiny import CORPUS
from tests.support.workloads import prompt_of

SIZE = 16
CONFIG = replace(TINY, vocab_size=320, num_layers=3, qkv_bias=True, o_bias=True, tie_word_embeddings=True)
TEXTS = [prompt_of(48, number) for number in range(12)]
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""The first matrix of each product of a layer."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_model(tmp_path_factory.mktemp("models") / "dense", CONFIG, torch.bfloat16)
    settings = json.loads((directory / "config.json").read_text()) | {"attention_bias": True}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def unpacked(words: Tensor, count: int) -> Tensor:
    """Return the codes of words of eight, [rows, words] to [rows, count]."""
    return torch.stack([words >> 4 * place & 15 for place in range(8)], 2).flatten(1)[:, :count]


def matrices_of(directory: Path, symmetric: bool) -> dict[str, QuantizedMatrix]:
    """Read the matrices as compressed-tensors does."""
    tensors, found = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_packed")]:
        prefix = name.removesuffix("_packed")
        rows, features = tensors[f"{prefix}_shape"].tolist()
        assert tensors[f"{prefix}_scale"].dtype == torch.bfloat16
        scales, mins = tensors[f"{prefix}_scale"].float(), None
        if not symmetric:
            mins = -unpacked(tensors[f"{prefix}_zero_point"].t(), rows).t() * scales
        found[prefix] = QuantizedMatrix(
            format="int4",
            codes=unpacked(tensors[name], features).to(torch.uint8),
            scales=scales,
            mins=mins,
            groups=regular_groups(features, SIZE),
            group_size=SIZE,
        )
    return found


class RecordingOps(ReferenceOps):
    """Plain torch that keeps the inputs of each product, in the order in which they were made."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def linear(
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> ReferenceLinear:
        assert isinstance(matrix, DenseMatrix)
        number, inputs = len(self.inputs), self.inputs
        inputs.append(torch.empty(0))

        class Recorded(ReferenceLinear):
            def __call__(self, x: Tensor) -> Tensor:
                inputs[number] = x.clone()
                return super().__call__(x)

        return Recorded(matrix.weight, bias, gated, wide)


def inputs_of(directory: Path) -> dict[str, Tensor]:
    """Run TEXTS through a dense model, and return the inputs of its products by their first matrix."""
    ops, length = RecordingOps(), len(TEXTS[0])
    model = load_model(directory, dtype=torch.float32, device=CPU, group=Group.single(), progress=False, ops=ops)
    attention, pages = model.ops.attention(length, model.head_dim), torch.arange(len(TEXTS))[:, None]
    batch = ForwardBatch(
        token_ids=torch.tensor(TEXTS).flatten(),
        positions=torch.arange(length).repeat(len(TEXTS)),
        slots=torch.arange(length * len(TEXTS)),
        attention=AttentionBatch([length] * len(TEXTS), [length] * len(TEXTS), pages),
        logit_index=torch.arange(0),
    )
    pool: KVPool = model.make_pool(len(TEXTS), length)
    model.forward(batch, pool, attention)
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(CONFIG.num_layers) for name in INPUTS]
    return dict(zip(names, ops.inputs, strict=False))


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_matrix_is_rounded_by_the_inputs_that_the_rounded_ones_before_it_cause(
    source: Path, tmp_path: Path, symmetric: bool
) -> None:
    quantize(source, tmp_path / "int4", TEXTS, group_size=SIZE, symmetric=symmetric)
    found, dense = matrices_of(tmp_path / "int4", symmetric), load_file(source / "model.safetensors")
    assert set(found) == {name for name in dense if name.endswith("_proj.weight")}
    (tmp_path / "back").mkdir()
    save_file(
        dense | {name: matrix.dense(torch.float32) for name, matrix in found.items()},
        tmp_path / "back" / "model.safetensors",
    )
    (tmp_path / "back" / "config.json").symlink_to(source / "config.json")
    inputs = inputs_of(tmp_path / "back")
    int4, first = Int4Format(SIZE, symmetric, scale_dtype=torch.bfloat16), ""
    differing = total = better = 0
    for name in sorted(found, key=lambda name: (name.split(".")[2], "qkvogud".index(name.split(".")[4][0]))):
        first = name if name in inputs else first
        x, weight = inputs[first], dense[name].float()
        expected = gptq(weight, token_hessian(x), int4)
        differing += int((expected.codes != found[name].codes).sum())
        total += weight.numel()
        errors = [
            float((x / x.norm(dim=1, keepdim=True) @ (matrix.dense(torch.float32) - weight).t()).square().sum())
            for matrix in (found[name], int4.quantize(weight))
        ]
        better += errors[0] < errors[1]
    assert differing <= total // 1000  # numbers halfway between two codes
    assert better == len(found)


def test_all_tokens_weigh_the_same() -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-6, 6, 9)[:, None]
    torch.testing.assert_close(token_hessian(sizes * x), token_hessian(x))
    assert token_hessian(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_text_matrices_are_rounded_to_nearest(source: Path, tmp_path: Path, symmetric: bool) -> None:
    quantize(source, tmp_path / "int4", [], group_size=SIZE, symmetric=symmetric)
    dense, int4 = load_file(source / "model.safetensors"), Int4Format(SIZE, symmetric, scale_dtype=torch.bfloat16)
    for name, matrix in matrices_of(tmp_path / "int4", symmetric).items():
        nearest = int4.quantize(dense[name])
        assert torch.equal(matrix.codes, nearest.codes)
        assert torch.equal(matrix.dense(torch.float32), nearest.dense(torch.float32))


def test_all_else_stays(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "int4", TEXTS[:1], group_size=SIZE, symmetric=False)
    dense, stored = (load_file(path / "model.safetensors") for path in (source, tmp_path / "int4"))
    kept = {name: tensor for name, tensor in dense.items() if not name.endswith("_proj.weight")}
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(stored[name], tensor) for name, tensor in kept.items())
    assert len(stored) == len(kept) + 4 * 7 * CONFIG.num_layers
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "int4" / name).read_bytes() == (source / name).read_bytes()
    settings = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    described = settings.pop("quantization_config")
    assert (described["quant_method"], described["format"], described["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    (group,) = described["config_groups"].values()
    expected: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": SIZE}
    assert group["weights"] == expected | {"symmetric": False, "dynamic": False}
    assert settings.items() >= (json.loads((source / "config.json").read_text())).items()


def test_words_of_eight_codes() -> None:
    """The first code is in the lowest bits; places that are left hold 0."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 0, 0, 15, 15]], dtype=torch.uint8)
    expected = [[0x87654321, 9], [0xF0000000, 15]]
    assert (pack(codes, 4).to(torch.int64) & 0xFFFFFFFF).tolist() == expected


def changed(source: Path, directory: Path, name: str, value: float) -> Path:
    """Write a copy of a model with one number changed."""
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name][0] = value
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_what_cannot_be_rounded(source: Path, tmp_path: Path) -> None:
    def refused(says: str, src: Path = source, texts: Any = TEXTS, size: int = SIZE) -> None:
        with pytest.raises(ModelError, match=says):
            quantize(src, tmp_path / "new", texts, group_size=size, symmetric=False)
        assert not (tmp_path / "new").exists()
        assert not list(tmp_path.glob(".new*"))

    refused("has 48 features, no multiple of --group-size 32", size=32)
    refused("token 320, but the model embeds 320", texts=[[320]])
    refused("not a directory", src=source / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    refused(f"tensor {down} holds values that are NaN", src=changed(source, tmp_path / "nan", down, float("nan")))
    norm = "model.layers.1.post_attention_layernorm.weight"
    refused("layer 1: the text leads to activations", src=changed(source, tmp_path / "large", norm, 3e38))
    quantize(source, tmp_path / "int4", [], group_size=SIZE, symmetric=True)
    refused("quantized weights|quantization_config", src=tmp_path / "int4")
    with pytest.raises(ModelError, match="not empty"):
        quantize(source, tmp_path / "int4", [], group_size=SIZE, symmetric=True)


def test_converted_gguf_is_quantized_already(source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "config.json").read_text())
    made = changed(source, tmp_path / "converted", "model.norm.weight", 1.0)
    tensors = load_file(made / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        tensors |= dict(stored_tensors(name, Int4Format(SIZE).quantize(tensors.pop(name))))
    save_file(tensors, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(settings | {"quantization_config": SETTINGS}), encoding="utf-8")
    for texts in (TEXTS, []):
        with pytest.raises(ModelError, match="converted: has quantized weights, which are served as they are"):
            quantize(made, tmp_path / "new", texts, group_size=SIZE, symmetric=False)
    assert not (tmp_path / "new").exists()


def test_the_command(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "int4"), *arguments])
        said = str(done.exception) if isinstance(done.exception, ValueError) else done.output
        return done.exit_code, " ".join(said.replace("│", " ").split())

    text = tmp_path / "text"
    text.write_text(" ".join(CORPUS * 10), encoding="utf-8")
    calibrated = ("--text", str(text), "--tokens", "200", "--group-size", str(SIZE))
    code, said = run(*calibrated, "--device", "cpu")
    assert (code, said) == (0, str(tmp_path / "int4"))
    first = matrices_of(tmp_path / "int4", False)
    assert run("--group-size", str(SIZE), "--force", "--asymmetric")[0] == 0
    nearest = matrices_of(tmp_path / "int4", False)
    assert any(not torch.equal(first[name].codes, nearest[name].codes) for name in first)
    assert run("--group-size", str(SIZE), "--force", "--symmetric")[0] == 0
    assert len(matrices_of(tmp_path / "int4", True)) == len(first)
    assert "needs --text" in run("--tokens", "200", "--force")[1]
    assert "not empty (--force replaces it)" in run(*calibrated)[1]
    text.write_text("", encoding="utf-8")
    assert "the text has 0 tokens" in run(*calibrated, "--force")[1]


@pytest.mark.parametrize("texts", [[], TEXTS[:1]])
def test_routers_stay_and_every_expert_is_rounded(texts: list[list[int]], tmp_path: Path) -> None:
    """Also experts that no token of the text chooses."""
    experts = ExpertsConfig(count=40, per_token=2, size=SIZE * 2)
    config = replace(
        TINY, model_type="qwen3_moe", vocab_size=320, qk_norm="head", experts=experts, tie_word_embeddings=True
    )
    source = write_random_model(tmp_path / "dense", config, torch.bfloat16)
    keys = {"model_type": "qwen3_moe", "num_experts": experts.count, "num_experts_per_tok": experts.per_token}
    keys |= {"moe_intermediate_size": experts.size, "norm_topk_prob": True, "rope_scaling": None}
    settings = json.loads((source / "config.json").read_text()) | keys
    (source / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    quantize(source, tmp_path / "int4", texts, group_size=SIZE, symmetric=False)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "int4" / "model.safetensors")
    routers = [name for name in before if name.endswith("mlp.gate.weight")]
    assert len(routers) == config.num_layers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    packed = [name for name in after if "experts." in name and name.endswith("_packed")]
    assert len(packed) == 3 * experts.count * config.num_layers
    ignored = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(name.removesuffix(".weight") for name in routers)]
    model = load_model(tmp_path / "int4", dtype=torch.float32, device=CPU, group=Group.single(), progress=False)
    assert model.matrix_formats["int4"] > model.matrix_formats["dense"] >= sum(before[name].numel() for name in routers)
