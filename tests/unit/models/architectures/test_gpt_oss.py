"""gpt-oss against transformers: dense checkpoints, MXFP4 as OpenAI publishes it, ranks, and broken files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels.ops import CLAMP, STEEPNESS, Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelError, parse_config, read_config
from models.conversion.convert import convert
from models.families.gpt_oss import GATE
from models.known_shapes import SHAPES
from models.loader import load_model
from models.model_config import ExpertsConfig
from models.quantize.quantize_model import quantize
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.oracle_models import VOCAB, OracleRow, check_served, load_served
from tests.support.profiles import each_value, is_all, whole_test_only_in_all
from tests.support.rig import CPU, compiled, run_ranks

WINDOW, ORIGINAL, LENGTH = 20, 32, 130
"""The window, the positions before YaRN, and the length of prompts."""
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": ORIGINAL,
}
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rope_parameters": YARN | {"rope_theta": 150000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD_KEYS: dict[str, Any] = {
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "initial_context_length": ORIGINAL,
    "experts_per_token": 3,
    "swiglu_limit": 7.0,
}
"""As OpenAI publishes it, instead of `rope_parameters`."""
OPS = ["reference", "compiled"]
LAYERS: dict[str, dict[str, Any]] = {
    "alternating": {},
    "layer_types": {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
    "all full, no biases": {"layer_types": ["full_attention"] * 4, "attention_bias": False},
}


def drawn(settings: dict[str, Any]) -> Any:
    """A model whose logits are of order 1, and whose sinks, biases and clamped gates matter."""
    torch.manual_seed(17)
    config = transformers.AutoConfig.for_model("gpt_oss", **SETTINGS | settings)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if name.endswith("sinks"):
                weight.normal_(1, 2)
            elif name.endswith("gate_up_proj"):  # [experts, features, rows]
                weight.normal_(0, 4 * weight.shape[1] ** -0.5)
            elif name.endswith("down_proj"):
                weight.normal_(0, 0.1 * weight.shape[1] ** -0.5)
            elif name.endswith("bias") or weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.3)
            else:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
            if "embed_tokens" in name:
                weight.mul_(0.5)
    return model.float()


def write(directory: Path, settings: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Write a dense checkpoint. Returns the model that transformers reads from it, in float32."""
    model = drawn(settings or {})
    model.to(dtype).save_pretrained(directory)
    return type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def write_mxfp4(directory: Path) -> Any:
    """Write a checkpoint with experts in MXFP4 and the keys of a published one. Returns the model with the values that
    transformers computes of them."""
    model = write(directory, dtype=torch.bfloat16)
    tensors, draw = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, features, rows = tensors.pop(name).shape
        lowest = 122 if "gate_up" in name else 117
        blocks = torch.randint(256, (experts, rows, features // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(lowest, lowest + 4, blocks.shape[:3], generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    change_config(directory, OLD_KEYS | {"quantization_config": quantization})
    return model


def change_config(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "config.json"
    keys = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    file.write_text(json.dumps(keys | changes))


def logits_of(model: Any, text: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([text]), use_cache=False).logits[0]
    return logits


def a_text(length: int = LENGTH) -> list[int]:
    draw = random.Random(3)
    return [draw.randrange(3, VOCAB) for _ in range(length)]


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Ops:
    return REFERENCE if request.param == "reference" else compiled()


@pytest.mark.parametrize(("layers", "ops"), each_value([*LAYERS], OPS), indirect=["ops"])
def test_equals_transformers(layers: str, ops: Ops, tmp_path: Path) -> None:
    theirs = write(tmp_path, LAYERS[layers])
    check_served(tmp_path, theirs, ops=ops, length=LENGTH, new_tokens=33 if is_all() else 9)


@pytest.mark.parametrize(("stored", "ops"), each_value(["bfloat16", "mxfp4"], OPS), indirect=["ops"])
def test_equals_transformers_with_weights_of_fewer_bits(stored: str, ops: Ops, tmp_path: Path) -> None:
    theirs = write_mxfp4(tmp_path) if stored == "mxfp4" else write(tmp_path, dtype=torch.bfloat16)
    check_served(tmp_path, theirs, ops=ops, length=LENGTH, new_tokens=33 if is_all() else 9)


@whole_test_only_in_all
@pytest.mark.parametrize("part", ["sinks", "limit", "window", "positions", "router", "biases"])
def test_every_part_of_the_oracle_matters(part: str, tmp_path: Path) -> None:
    """A model without it has other logits, so that the comparisons here show something."""
    theirs, text = write(tmp_path), a_text()
    expected = logits_of(theirs, text)
    if part == "window":
        change_config(tmp_path, OLD_KEYS | {"sliding_window": 200})
    elif part == "positions":
        change_config(tmp_path, OLD_KEYS | {"rope_scaling": YARN | {"truncate": True}})
    for layer in theirs.model.layers:
        if part == "sinks":
            layer.self_attn.sinks.data -= 30
        elif part == "limit":
            layer.mlp.experts.limit = 100.0
        elif part == "router":
            layer.mlp.router.bias.data.zero_()
        elif part == "biases":
            layer.mlp.experts.gate_up_proj_bias.data.zero_()
            layer.mlp.experts.down_proj_bias.data.zero_()
    if part in ("window", "positions"):
        theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits_of(theirs, text) - expected).abs().amax() > 0.05


def test_values_of_mxfp4_are_exact(tmp_path: Path) -> None:
    """Served as 8-bit codes, with the very values of the checkpoint."""
    write_mxfp4(tmp_path)
    formats = load_served(tmp_path).matrix_formats
    assert formats["int8"] == 4 * 6 * 3 * 64 * 96
    as_stored, dense = (
        OracleRow(
            load_model(
                tmp_path,
                dtype=torch.float64,
                device=CPU,
                group=Group.single(),
                progress=False,
                weights=WeightChoice(own),
            ),
            LENGTH,
        ).forward(a_text())
        for own in (None, "dense")
    )
    torch.testing.assert_close(as_stored, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "write_it"), each_value([1, 2, 3], [write_mxfp4, write]))
def test_ranks(write_it: Callable[[Path], Any], size: int, tmp_path: Path) -> None:
    expected, text = logits_of(write_it(tmp_path), a_text()), a_text()

    def work(group: Group) -> Tensor:
        model = load_model(tmp_path, dtype=torch.float32, device=CPU, group=group, progress=False)
        row = OracleRow(model, LENGTH)
        return torch.cat([row.forward(text[:70]), row.forward(text[70:])])

    torch.testing.assert_close(torch.cat(run_ranks(size, work), 1), expected, rtol=0, atol=1e-4)


# -- config.json -----------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN | {"factor": 32.0, "original_max_position_embeddings": 4096},
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
OF_SIZE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")


def test_published_models_are_the_known_shapes() -> None:
    parsed = parse_config(PUBLISHED)
    assert parsed.eos_token_ids == (200002,)
    assert replace(parsed, eos_token_ids=()) == SHAPES["gpt-oss-20b"]
    larger = PUBLISHED | {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": None}
    assert replace(parse_config(larger), eos_token_ids=()) == SHAPES["gpt-oss-120b"]


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    keys = {key: PUBLISHED[key] for key in OF_SIZE} | {"num_local_experts": 32}
    assert parse_config(keys) == SHAPES["gpt-oss-20b"]
    without_count = parse_config({key: PUBLISHED[key] for key in OF_SIZE}).experts
    assert without_count == ExpertsConfig(count=128, per_token=4, size=2880, biased=True)
    assert parse_config(keys | {"attention_bias": False}) == replace(
        SHAPES["gpt-oss-20b"], qkv_bias=False, o_bias=False
    )


def test_the_gate_is_that_of_kernels() -> None:
    assert GATE == {"swiglu_limit": CLAMP, "swiglu_alpha": STEEPNESS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 10.0}, "swiglu_limit 10 is not supported; 7 is"),
        ({"swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported; 1.702 is"),
        ({"experts_per_token": 2}, "experts_per_token 2 contradicts num_experts_per_tok 4"),
        ({"initial_context_length": 8192}, "initial_context_length 8192 contradicts original_max_position_embeddings"),
        ({"num_experts_per_tok": 33, "experts_per_token": None}, "larger than the number of experts .32."),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 24 layers"),
    ],
)
def test_refused_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(PUBLISHED | changes)


# -- broken checkpoints ----------------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def whole_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `write_mxfp4` writes it."""
    directory = tmp_path_factory.mktemp("whole")
    write_mxfp4(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{LAYER}.gate_up_proj_blocks", None, rf"unexpected tensor {LAYER}\.gate_up_proj_scales"),
        (f"{LAYER}.down_proj_scales", None, rf"expert 0 of tensor {LAYER}\.down_proj_blocks has no .*weight_scale"),
        (f"{LAYER}.down_proj_bias", None, rf"missing from the weight files: {LAYER}\.0\.down_proj\.bias"),
        (f"{LAYER}.down_proj_bias", lambda x: x[:5], rf"{LAYER}\.down_proj_bias has 5 experts, expected 6"),
        (f"{LAYER}.down_proj_blocks", lambda x: x.flatten(2), r"\.down_proj_blocks has 3 dimensions, expected 4"),
        (
            f"{LAYER}.gate_up_proj_blocks",
            lambda x: x[:, :-1],
            rf"expert 0 of tensor {LAYER}\.gate_up_proj_blocks has shape \[95, 32\], expected \[96, 32\]",
        ),
        (f"{LAYER}.gate_up_proj_scales", lambda x: x[..., :1], r"gate_up_proj_scales has shape \[96, 1\], expected"),
        (f"{LAYER}.gate_up_proj_scales", lambda x: x.short(), "gate_up_proj_scales has unsupported type I16"),
        ("model.layers.1.mlp.router.bias", None, r"missing from the weight files: model\.layers\.1\.mlp\.router\.bias"),
        ("model.layers.1.self_attn.sinks", None, r"missing from the weight files: model\.layers\.1\.self_attn\.sinks"),
    ],
)
def test_broken_tensors_are_named(
    name: str, change: Callable[[Tensor], Tensor] | None, message: str, whole_directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_directory, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = tensors.pop(name)
    if change is not None:
        tensors[name] = change(whole).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message) as raised:
        load_served(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_expert_that_is_stored_twice(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.3.up_proj.weight"] = torch.zeros(96, 64)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"tensor {LAYER}\.3\.up_proj\.weight is stored twice"):
        load_served(tmp_path)


def test_converted_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "stacked", dtype=torch.bfloat16)
    words = Tokenizer(WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0"))
    words.save(str(tmp_path / "stacked" / "tokenizer.json"))
    convert(tmp_path / "stacked", tmp_path / "made")
    assert load_file(tmp_path / "made" / "model.safetensors")[f"{LAYER}.3.up_proj.weight"].shape == (96, 64)
    stacked, made = (OracleRow(load_served(tmp_path / name), LENGTH).forward(a_text()) for name in ("stacked", "made"))
    assert torch.equal(stacked, made)


def test_experts_can_be_rounded(tmp_path: Path) -> None:
    """Of a checkpoint in the precision that is written, whose tensors are not copied on the way."""
    write(tmp_path / "stacked", dtype=torch.bfloat16)
    words = Tokenizer(WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0"))
    words.save(str(tmp_path / "stacked" / "tokenizer.json"))
    quantize(tmp_path / "stacked", tmp_path / "int4", [a_text()], group_size=32, symmetric=False)
    stacked, rounded = (
        OracleRow(load_served(tmp_path / name), LENGTH).forward(a_text()) for name in ("stacked", "int4")
    )
    assert 0 < (stacked - rounded).abs().mean() < 0.6 * stacked.std()  # of another model: 1.1


def test_blocks_without_a_quantization_config(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    change_config(tmp_path, {"quantization_config": None, "rope_scaling": YARN})
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.mlp\.experts\.down_proj_blocks"):
        load_served(tmp_path)


def test_the_directory_is_read_as_a_config(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    config = read_config(tmp_path)
    assert config.experts == ExpertsConfig(count=6, per_token=3, size=96, biased=True)
    assert (config.sliding_window, config.sliding_layers, config.max_model_len) == (WINDOW, (0, 2), 256)
