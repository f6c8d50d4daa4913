"""Write tiny quantised checkpoints with the libraries that define their layouts, and what each should load as.

    python write_quantized.py DIRECTORY [layout ...]

Each layout becomes a directory: config.json and model.safetensors as its library writes them, and expected.safetensors
with `token_ids`, `logits` of transformers in float32 with every weight that the library dequantised, and the first rows
of one of those weights under its name. Activations and keys and values are not quantised for `logits`. Libraries
multiply codes by scales in float32 here; in a checkpoint's own dtype they would round products to it.

Needs torch 2.13.0, transformers 5.23.0, compressed-tensors 0.20.1, gptqmodel 7.7.0 and autoawq 0.2.9 (the last two
installed with --no-deps, then the small packages that they import). compressed-tensors 0.20.1 no longer knows
`weight_g_idx`: write ct-w4a16-actorder by itself, with compressed-tensors 0.14.0.1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32
TOKENS = torch.tensor([5, 17, 3, 80, 41, 95, 0, 62, 33, 17, 8, 54])
SHOWN, SHOWN_ROWS = "model.layers.0.mlp.down_proj.weight", 16
"""Weight that expected.safetensors holds dequantised, and how many rows of it."""


def tiny(dtype: torch.dtype, shifted: bool = False) -> LlamaForCausalLM:
    """Build the model that is quantised, with seeded weights. shifted: groups of weights have means other than 0, so
    that zero points vary."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(20)
    for name, weight in model.named_parameters():
        normal = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(1 + normal / 10)
        elif "embed_tokens" in name:
            weight.copy_(normal)
        else:
            weight.copy_(normal / weight.shape[1] ** 0.5)
            if shifted and "layers" in name:
                means = torch.rand(weight.shape[0], weight.shape[1] // GROUP, generator=generator) * 2 - 1
                weight += means.repeat_interleave(GROUP, 1) / weight.shape[1] ** 0.5
    converted: LlamaForCausalLM = model.to(dtype)
    return converted


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the linear layers that are quantised: all but the language-model head. Libraries add to them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def permuted_groups(columns: int) -> Tensor:
    """Deal columns to groups in a seeded random order, and return each column's group."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    groups = torch.empty(columns, dtype=torch.int32)
    groups[order] = torch.arange(columns, dtype=torch.int32) // GROUP
    return groups


def finish(
    directory: Path,
    model: LlamaForCausalLM,
    tensors: Mapping[str, Tensor],
    dequantized: Mapping[str, Tensor],
    quantization: Mapping[str, Any],
) -> None:
    """Write a checkpoint, and what transformers computes with its dequantised weights."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.quantization_config = dict(quantization)
    model.config.save_pretrained(directory)
    metadata = {"format": "pt"}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", metadata
    )
    plain = tiny(torch.float32)
    weights = {name: tensors[name].float() for name in plain.state_dict() if name not in dequantized}
    plain.load_state_dict(weights | {name: weight.float() for name, weight in dequantized.items()})
    expected = {SHOWN: plain.state_dict()[SHOWN][:SHOWN_ROWS]}
    expected |= {"token_ids": TOKENS, "logits": plain(TOKENS[None]).logits[0]}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")


def write_compressed_tensors(
    directory: Path,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
    kv: bool = False,
    preset: str | None = None,
) -> None:
    """Write a layout of compressed-tensors. weights, inputs: `QuantizationArgs`. preset: a scheme's name instead."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    model = tiny(torch.bfloat16, shifted=not weights.get("symmetric", True))
    scheme = (
        preset_name_to_scheme(preset, ["Linear"])
        if preset
        else QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=QuantizationArgs(**inputs) if inputs else None,
        )
    )
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        kv_cache_scheme=QuantizationArgs(**static) if kv else None,
        ignore=["lm_head"],
    )
    apply_quantization_config(model, config)
    for _, module in linears(model):
        _set_weight_scales(module)
    _calibrate(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "quantization_scheme"):
            module.quantization_status = QuantizationStatus.FROZEN

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, module in linears(model):
        if module.weight_scale.is_floating_point():
            module.weight_scale.data = module.weight_scale.data.float()
    quantization = compressor.quantization_config.model_copy(deep=True)
    compressor.decompress_model(model)
    dequantized = {f"{name}.weight": module.weight for name, module in linears(model)}
    compressor.quantization_config = quantization
    finish(directory, model, tensors, dequantized, {})
    compressor.update_config(str(directory))


def _set_weight_scales(module: Any) -> None:
    """Set a layer's scales and zero points from its weights' smallest and largest values."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args, weight = module.quantization_scheme.weights, module.weight
    if hasattr(module, "weight_g_idx"):
        module.weight_g_idx.copy_(permuted_groups(weight.shape[1]))
        weight = weight[:, module.weight_g_idx.argsort()]
    if args.strategy == "tensor":
        lowest, highest = weight.min(), weight.max()
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded: Any = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        lowest, highest = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        lowest, highest = groups.amin(2), groups.amax(2)
    scale, zero = calculate_qparams(lowest, highest, args)
    module.weight_scale.copy_(scale.view_as(module.weight_scale))
    module.weight_zero_point.copy_(zero.view_as(module.weight_zero_point))


def _calibrate(model: LlamaForCausalLM) -> None:
    """Set static scales of layers' inputs and of keys and values from those that `TOKENS` cause."""
    from compressed_tensors.modeling.kvcache import KV_CACHE_ATTR, register_key_hook, register_value_hook
    from compressed_tensors.quantization.utils import calculate_qparams

    def observe(name: str, module: Any, value: Any) -> None:
        """Set the scale called `name` from one value."""
        value = value[0] if isinstance(value, tuple) else value
        args = module.quantization_scheme.input_activations
        getattr(module, name).copy_(calculate_qparams(value.min(), value.max(), args)[0])

    hooks: list[Any] = []
    modules: list[Any] = list(model.modules())
    for module in modules:
        module.quantization_enabled = False
        if hasattr(module, "input_scale"):
            hooks.append(module.register_forward_pre_hook(partial(observe, "input_scale")))
        if hasattr(module, KV_CACHE_ATTR):
            hooks.append(register_key_hook(module, partial(observe, "k_scale")))
            hooks.append(register_value_hook(module, partial(observe, "v_scale")))
    model(TOKENS[None])
    for hook in hooks:
        hook.remove()
    for module in modules:
        del module.quantization_enabled


def write_gptq(
    directory: Path, bits: int = 4, symmetric: bool = True, version: int = 1, act_order: bool = False
) -> None:
    """Write a layout of gptqmodel. version: of the format of zero points, 1 of which stores them less 1."""
    from gptqmodel import __version__
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    model = tiny(torch.float16, shifted=not symmetric)
    config = QuantizeConfig(
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        desc_act=act_order,
        act_group_aware=False,
        format=FORMAT.GPTQ if version == 1 else FORMAT.GPTQ_V2,
        offload_to_disk=False,
    )
    config.meta_set_versionable(key="quantizer", value=[f"gptqmodel:{__version__}"])
    tensors, dequantized, levels = dict(model.state_dict()), {}, 2**bits - 1
    for name, module in linears(model):
        groups = permuted_groups(module.in_features) if act_order else torch.arange(module.in_features).int() // GROUP
        weight: Any = module.weight
        grouped = weight[:, groups.argsort()].float().unflatten(1, (-1, GROUP))
        if symmetric:
            scales = grouped.abs().amax(2) * 2 / levels
            zeros = torch.full_like(scales, 2 ** (bits - 1))
        else:
            lowest = grouped.amin(2).clamp(max=0)
            scales = (grouped.amax(2).clamp(min=0) - lowest) / levels
            zeros = (-lowest / scales).round().clamp(min=2 - version)  # version 1 has no code for 0
        layer = TorchLinear(
            bits, GROUP, symmetric, act_order, module.in_features, module.out_features, format=config.format
        ).eval()
        layer.pack_original(module.float(), scales, zeros, groups)
        layer.qzero_format(2)
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, config)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}
        if version == 1:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.scales = layer.scales.float()
        dequantized[f"{name}.weight"] = layer.dequantize_weight().T
    finish(directory, model, tensors, dequantized, config.to_dict())


def write_awq(directory: Path) -> None:
    """Write the GEMM layout of AutoAWQ, without its search for scales of activations."""
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    model = tiny(torch.float16, shifted=True)
    config = AwqConfig(q_group_size=GROUP)
    rounding = SimpleNamespace(group_size=GROUP, zero_point=config.zero_point, w_bit=config.w_bit)
    tensors, dequantized = dict(model.state_dict()), {}
    for name, module in linears(model):
        module.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(rounding, module.weight.data)
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        layer = WQLinear_GEMM.from_linear(module, config.w_bit, GROUP, False, scales, zeros)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        whole = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), config.w_bit, GROUP)
        dequantized[f"{name}.weight"] = whole.T
    finish(directory, model, tensors, dequantized, config.to_transformers_dict())


def write_fp8_blocks(directory: Path) -> None:
    """Write the layout of DeepSeek-V3 and Qwen3-FP8. No size is a multiple of a block's: as their kernels expect, the
    last block of a row or column is cut short."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations import finegrained_fp8

    library: Any = finegrained_fp8
    model = tiny(torch.bfloat16)
    config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
    rows, columns = config.weight_block_size
    quantize = library.Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors, dequantized = dict(model.state_dict()), {}
    for name, module in linears(model):
        weight = module.weight.data
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        made = quantize.convert({f"{name}.weight": padded})
        codes, scales = made[f"{name}.weight"][: weight.shape[0], : weight.shape[1]], made[f"{name}.weight_scale_inv"]
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
        whole = library._dequantize_fp8_weight(codes, scales, [rows, columns], torch.float32)
        dequantized[f"{name}.weight"] = whole
    finish(directory, model, tensors, dequantized, config.to_dict())


def write_fbgemm_fp8(directory: Path) -> None:
    """Write the layout of Llama-3.1-405B-FP8, which also leaves some layers of the model as they were. FBGEMM itself
    needs a GPU: rows are scaled here as it scales them, and multiplied as transformers' `FbgemmFp8Linear` does."""
    from transformers import FbgemmFp8Config
    from transformers.integrations import fbgemm_fp8

    library: Any = fbgemm_fp8
    model = tiny(torch.bfloat16)
    left = ["model.layers.0.self_attn.o_proj", "lm_head"]
    config = FbgemmFp8Config(modules_to_not_convert=left)
    tensors, dequantized = dict(model.state_dict()), {}
    for name, module in linears(model):
        if name in left:
            continue
        layer = library.FbgemmFp8Linear(module.in_features, module.out_features, False).requires_grad_(False)
        weight = module.weight.float()
        layer.weight_scale.copy_(weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max)
        layer.weight.copy_((weight / layer.weight_scale).to(torch.float8_e4m3fn))
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        identity = torch.eye(module.in_features).to(torch.float8_e4m3fn)
        dequantized[f"{name}.weight"] = torch._scaled_mm(
            identity,
            layer.weight.t(),
            scale_a=torch.ones(module.in_features, 1),
            scale_b=layer.weight_scale.t(),
            out_dtype=torch.float32,
        ).T
    finish(directory, model, tensors, dequantized, config.to_dict())


INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
TOKEN: dict[str, Any] = {"strategy": "token", "dynamic": True}
GROUPS: dict[str, Any] = {"strategy": "group", "dynamic": True}

LAYOUTS: dict[str, Callable[[Path], None]] = {
    "ct-w4a16-g32": partial(write_compressed_tensors, weights=INT4),
    "ct-w4a16-g32-asym": partial(write_compressed_tensors, weights=INT4 | {"symmetric": False}),
    "ct-w4a16-actorder": partial(write_compressed_tensors, weights=INT4 | {"actorder": "group"}),
    "ct-w4a16-channel": partial(write_compressed_tensors, weights=INT8 | {"num_bits": 4}),
    "ct-w8a16": partial(write_compressed_tensors, weights=INT8),
    "ct-w8a16-g32": partial(write_compressed_tensors, weights=INT4 | {"num_bits": 8}),
    "ct-w8a8": partial(write_compressed_tensors, weights=INT8, inputs=INT8 | TOKEN),
    "ct-w8a8-asym": partial(write_compressed_tensors, weights=INT8 | {"symmetric": False}, inputs=INT8 | TOKEN),
    "ct-fp8": partial(write_compressed_tensors, weights=FP8, inputs=FP8),
    "ct-fp8-dynamic": partial(write_compressed_tensors, weights=FP8 | {"strategy": "channel"}, inputs=FP8 | TOKEN),
    "ct-fp8-block": partial(
        write_compressed_tensors,
        weights=FP8 | {"strategy": "block", "block_structure": [32, 32]},
        inputs=FP8 | GROUPS | {"group_size": 32},
    ),
    "ct-fp8-block-128": partial(
        write_compressed_tensors,
        weights=FP8 | {"strategy": "block", "block_structure": [128, 128]},
        inputs=FP8 | GROUPS | {"group_size": 128},
    ),
    "ct-fp8-kv": partial(write_compressed_tensors, weights=FP8, inputs=FP8, kv=True),
    "ct-mxfp4": partial(write_compressed_tensors, weights={}, preset="MXFP4A16"),
    "ct-mxfp8": partial(write_compressed_tensors, weights={}, preset="MXFP8A16"),
    "gptq-v1": write_gptq,
    "gptq-v1-asym": partial(write_gptq, symmetric=False),
    "gptq-v2": partial(write_gptq, symmetric=False, version=2),
    "gptq-actorder": partial(write_gptq, act_order=True),
    "gptq-8bit": partial(write_gptq, bits=8),
    "awq": write_awq,
    "fp8-block": write_fp8_blocks,
    "fbgemm-fp8": write_fbgemm_fp8,
}
APART = ("ct-w4a16-actorder",)
"""Layouts that need another release of their library, so are written only when named."""


def main() -> None:
    """Write the layouts that the command line names, or all that one environment can write."""
    for layout in sys.argv[2:] or (name for name in LAYOUTS if name not in APART):
        LAYOUTS[layout](Path(sys.argv[1]) / layout)


if __name__ == "__main__":
    with torch.no_grad():
        main()
