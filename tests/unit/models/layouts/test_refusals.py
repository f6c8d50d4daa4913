"""Quantizations that are not served, and tensors that contradict theirs: one line says which and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.config import ModelError
from models.layouts.layout import find_layout, parse_layout
from models.layouts.weight_files import WeightFiles
from models.weights import StoredTensors
from tests.support.packed_weights import LAYOUTS, Drawn, Packed

MODULE = "model.layers.0.mlp.up_proj"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(form: object = "pack-quantized", weights: object = INT4, **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **others}


DEEP = "(" * 10**4 + ")" * 10**4
SERVED = "awq, compressed-tensors, fbgemm_fp8, fp8, gptq, mxfp4, magicdec"
IN_GROUP = "config_groups: 'group_0': "


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *(
            ({"quant_method": method}, f"quant_method '{method}' is not supported; these are: {SERVED}")
            for method in ("bitsandbytes", "hqq", "quip", "exl2", "modelopt", "auto-round")
        ),
        ([], f"quant_method None is not supported; these are: {SERVED}"),
        (GPTQ | {"bits": 3}, "bits 3 is not served; 4 and 8 are"),
        (GPTQ | {"bits": 2}, "bits 2 is not served; 4 and 8 are"),
        (GPTQ | {"bits": "4"}, "bits '4' is not an integer from 1 to 2147483647"),
        (GPTQ | {"group_size": 0}, "group_size 0 is neither a number of features nor -1"),
        (GPTQ | {"group_size": None}, "group_size None is not an integer from -1 to 2147483647"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not served; gptq and gptq_v2 are"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format true is not served; checkpoint_format gptq is"),
        (GPTQ | {"desc_act": "group"}, "desc_act 'group' is neither true nor false"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16' is not served; int32 is"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "dynamic: '+:(' is not a regular expression: "),
        (GPTQ | {"dynamic": {"a{99999999999}": {}}}, "dynamic: 'a{99999999999}' is not a regular expression: "),
        (GPTQ | {"dynamic": {DEEP: {}}}, "dynamic: '(((("),
        (GPTQ | {"dynamic": {"+:a": {"bits": 3}}}, "bits 3 is not served; 4 and 8 are"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not served; gemm is"),
        (AWQ | {"bits": 3}, "bits 3 is not served; 4 is"),
        (AWQ | {"zero_point": "no"}, "zero_point 'no' is neither true nor false"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' is not served; e4m3 is"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size [128] is not a list of two positive integers"),
        (compressed(config_groups=None), "config_groups None is not an object"),
        (compressed(config_groups={}), "config_groups is empty: a kv_cache_scheme alone is not served"),
        (compressed(transform_config={"config_groups": {"a": 1}}), "transform_config is not served"),
        (
            compressed(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: format 'sparse-24-bitmask' is not served; dense is",
        ),
        (compressed("marlin-24"), f"{IN_GROUP}format 'marlin-24' is not served; these are: pack-quantized, "),
        (compressed("nvfp4-pack-quantized"), f"{IN_GROUP}format 'nvfp4-pack-quantized' is not served"),
        (compressed("dense"), f"{IN_GROUP}format 'dense' is not served"),
        (compressed(weights=[]), f"{IN_GROUP}weights [] is not an object"),
        (
            compressed(weights=INT4 | {"num_bits": 3}),
            f"{IN_GROUP}weights: num_bits 3 of type int is not served; 4 and 8 are",
        ),
        (
            compressed("float-quantized", INT4 | {"type": "float"}),
            f"{IN_GROUP}weights: num_bits 4 of type float is not served; 8 is",
        ),
        (compressed("float-quantized"), f"{IN_GROUP}weights: type 'int' is not served in format float-quantized"),
        (
            compressed(weights=INT4 | {"strategy": "tensor_group"}),
            f"{IN_GROUP}weights: strategy 'tensor_group' is not served; tensor, channel, group and block are",
        ),
        (compressed(weights=INT4 | {"group_size": None}), f"{IN_GROUP}weights: strategy group without group_size"),
        (
            compressed("int-quantized", INT4 | {"actorder": "group"}),
            f"{IN_GROUP}weights: actorder 'group' is not served in format int-quantized",
        ),
        (compressed(ignore=["re:("]), "ignore: 're:(' is not a regular expression: "),
        (compressed(ignore=["re:a{99999999999}"]), "ignore: 're:a{99999999999}' is not a regular expression: "),
        (compressed(ignore=["re:" + DEEP]), "ignore: 're:(((("),
        (compressed(ignore="lm_head"), "ignore 'lm_head' is not a list of strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_are_not_served(settings: object, says: str) -> None:
    with pytest.raises(ModelError) as error:
        parse_layout({"quantization_config": settings})
    assert str(error.value).startswith(f"quantization_config: {says}")
    assert "\n" not in str(error.value)


def test_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"compression_config": {"quant_method": "hqq"}}')
    with pytest.raises(ModelError) as error:
        find_layout(tmp_path)
    assert str(error.value) == f"{file}: compression_config: quant_method 'hqq' is not supported; these are: {SERVED}"


LONG = "y" * 10**4


@pytest.mark.parametrize(
    "settings",
    [
        *(compressed(value) for value in (LONG, {"x": LONG}, [LONG])),
        *(compressed(ignore=value) for value in (LONG, {"x": LONG}, [LONG, 1], [f"re:({LONG}"])),
        *(compressed(config_groups=value) for value in (LONG, [LONG], {LONG: LONG}, {LONG: {"weights": LONG}})),
        *(compressed(weights=INT4 | {key: LONG}) for key in INT4),
        *(GPTQ | {key: LONG} for key in ("bits", "group_size", "sym", "checkpoint_format", "pack_dtype", "dynamic")),
        *(GPTQ | {"dynamic": {f"+:({LONG}": {}}}, AWQ | {"version": LONG}, FP8 | {"fmt": LONG}),
        *(FP8 | {"weight_block_size": LONG}, {"quant_method": LONG}),
    ],
    ids=lambda value: "",
)
def test_messages_stay_short(settings: Any) -> None:
    with pytest.raises(ModelError) as error:
        parse_layout({"quantization_config": settings})
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def remove(part: str) -> Callable[[Packed], None]:
    def change(packed: Packed) -> None:
        del packed.tensors[part]

    return change


def cast(part: str, dtype: torch.dtype) -> Callable[[Packed], None]:
    def change(packed: Packed) -> None:
        packed.tensors[part] = packed.tensors[part].to(dtype)

    return change


def shorten(part: str) -> Callable[[Packed], None]:
    def change(packed: Packed) -> None:
        packed.tensors[part] = packed.tensors[part][:-1]

    return change


def fill(part: str, value: int) -> Callable[[Packed], None]:
    """Set the first element of a part, which is an index of groups or a shape."""

    def change(packed: Packed) -> None:
        packed.tensors[part][0] = value

    return change


def regroup(packed: Packed) -> None:
    """State groups of other sizes than the tensors have."""
    weights = packed.settings.get("config_groups", {}).get("group_0", {}).get("weights", packed.settings)
    key = "weight_block_size" if "weight_block_size" in weights else "group_size"
    weights[key] = [8, 8] if key == "weight_block_size" else 8


def crowd(packed: Packed) -> None:
    packed.tensors["g_idx"] = torch.arange(64, dtype=torch.int32) % 4
    packed.tensors["g_idx"][1] = 0


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        ("gptq", remove("scales"), "tensor M.qweight has no M.scales beside it"),
        ("gptq", remove("qzeros"), "tensor M.qweight has no M.qzeros beside it"),
        ("gptq", shorten("qweight"), "tensor M.qweight has shape [7, 24], expected [8, 24]"),
        ("gptq", cast("qweight", torch.int64), "tensor M.qweight has unsupported type I64"),
        ("gptq", cast("scales", torch.int32), "tensor M.scales has unsupported type I32"),
        ("gptq", shorten("g_idx"), "tensor M.g_idx has shape [63], expected [64]"),
        ("gptq", fill("g_idx", 4), "tensor M.g_idx names groups from 0 to 4, expected 0 to 3"),
        ("gptq", fill("g_idx", -1), "tensor M.g_idx names groups from -1 to 3, expected 0 to 3"),
        ("gptq", crowd, "tensor M.g_idx has 17 features in one group, expected at most 16"),
        ("gptq", regroup, "tensor M.qzeros has shape [4, 3], expected [8, 3]"),
        ("ordered gptq", remove("g_idx"), "tensor M.qweight has no M.g_idx beside it"),
        ("awq", remove("qzeros"), "tensor M.qweight has no M.qzeros beside it"),
        ("awq", regroup, "tensor M.scales has shape [4, 24], expected [8, 24]"),
        ("awq", shorten("qweight"), "tensor M.qweight has shape [63, 3], expected [64, 3]"),
        ("packed", remove("weight_scale"), "tensor M.weight_packed has no M.weight_scale beside it"),
        ("packed", remove("weight_zero_point"), "tensor M.weight_packed has no M.weight_zero_point beside it"),
        ("packed", fill("weight_shape", 7), "tensor M.weight_shape is [7, 64], expected [24, 64]"),
        ("packed", regroup, "tensor M.weight_scale has shape [24, 4], expected [24, 8]"),
        ("packed", cast("weight_packed", torch.uint8), "tensor M.weight_packed has unsupported type U8"),
        ("ordered packed", remove("weight_g_idx"), "tensor M.weight_packed has no M.weight_g_idx beside it"),
        ("ordered packed", fill("weight_g_idx", 4), "tensor M.weight_g_idx names groups from 0 to 4, expected 0 to 3"),
        ("integers", remove("weight_scale"), "tensor M.weight has no M.weight_scale beside it"),
        ("integers", cast("weight", torch.int16), "tensor M.weight has unsupported type I16"),
        ("fp8", remove("weight_scale_inv"), "tensor M.weight has no M.weight_scale_inv beside it"),
        ("fp8", cast("weight", torch.float8_e5m2), "tensor M.weight has unsupported type F8_E5M2"),
        ("fp8", cast("weight", torch.bfloat16), "tensor M.weight has unsupported type BF16"),
        ("fp8", regroup, "tensor M.weight_scale_inv has shape [2, 4], expected [3, 8]"),
        ("fp8_rows", shorten("weight_scale"), "tensor M.weight_scale has shape [23, 1], expected [24, 1]"),
        ("mxfp4", shorten("weight_packed"), "tensor M.weight_packed has shape [23, 32], expected [24, 32]"),
        ("mxfp4", shorten("weight_scale"), "tensor M.weight_scale has shape [23, 2], expected [24, 2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_contradict_their_settings(
    layout: str, change: Callable[[Packed], None], says: str, tmp_path: Path
) -> None:
    kind = layout.removeprefix("ordered ")
    packed = LAYOUTS[kind](Drawn(1, 24, 64, group_size=16, ordered=kind != layout))
    change(packed)
    file = tmp_path / "model.safetensors"
    save_file({f"{MODULE}.{part}": tensor.contiguous() for part, tensor in packed.tensors.items()}, file)
    names = [f"{MODULE}.{part}" for part in packed.tensors]
    stored = StoredTensors({name: (file, name) for name in names}, tied=False, warnings=())
    found = parse_layout({"quantization_config": packed.settings})
    name, shape = f"{MODULE}.weight", (24, 64)
    assert found.tensors(name, stored)
    with WeightFiles(stored) as files:
        for check in (
            lambda: found.check(files, name, shape),
            lambda: found.read(files, name, shape, slice(0, 8), slice(0, 8)),
        ):
            with pytest.raises(ModelError) as error:
                check()
            assert str(error.value) == f"{file}: {says.replace('M.', f'{MODULE}.')}"


def test_zero_points_of_symmetric_integers_are_0(tmp_path: Path) -> None:
    packed = LAYOUTS["integers"](Drawn(1, 24, 64, symmetric=True))
    packed.tensors["weight_zero_point"] = torch.zeros(24, 1, dtype=torch.int8)
    layout = parse_layout({"quantization_config": packed.settings})
    for zero in (0, 3):
        packed.tensors["weight_zero_point"][5] = zero
        file = tmp_path / f"{zero}.safetensors"
        save_file({f"{MODULE}.{part}": tensor for part, tensor in packed.tensors.items()}, file)
        names = [f"{MODULE}.{part}" for part in packed.tensors]
        with WeightFiles(StoredTensors({name: (file, name) for name in names}, False, ())) as files:
            if zero:
                with pytest.raises(
                    ModelError, match="weight_zero_point is not 0, but the configuration says symmetric"
                ):
                    layout.check(files, f"{MODULE}.weight", (24, 64))
            else:
                layout.check(files, f"{MODULE}.weight", (24, 64))
