"""Flags that several commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings (see configs/).")]
Model = Annotated[str | None, typer.Option(help="Model directory, or `default`.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
TensorParallel = Annotated[int | None, typer.Option("--tensor-parallel-size", help="Ranks per model.")]
Speculation = Annotated[str | None, typer.Option(help="off, auto, or how many tokens to draft per round.")]
Budget = Annotated[int | None, typer.Option(help="KV tokens that one draft step may read per row.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Most tokens of prompt and output together.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads per rank.")]


def gamma(speculation: str) -> int | Literal["auto"]:
    """Tokens drafted per round that `--speculation` asks for. Raises typer.BadParameter."""
    if speculation == "off":
        return 0
    if speculation == "auto":
        return "auto"
    if speculation.isdecimal() and speculation.isascii():
        return int(speculation)
    raise typer.BadParameter(
        f"{speculation!r} is none of `off`, `auto` and a number of tokens", param_hint="--speculation"
    )


def counts(text: str, flag: str) -> list[int]:
    """The numbers of a comma-separated list. Raises typer.BadParameter."""
    values = [value.strip() for value in text.split(",")]
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise typer.BadParameter(f"{text!r} is no list of positive numbers", param_hint=flag)
    return [int(value) for value in values]


def engine_overrides(
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int | None = None,
    speculation: str | None = None,
    budget: int | None = None,
    max_model_len: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Settings for engine.config.load_config; flags that were not given override nothing."""
    settings = {
        "engine.model": model,
        "engine.device": device,
        "engine.dtype": dtype,
        "engine.tensor_parallel_size": tensor_parallel_size,
        "engine.speculation.gamma": None if speculation is None else gamma(speculation),
        "engine.speculation.kv.budget": budget,
        "engine.max_model_len": max_model_len,
        "engine.threads": threads,
    }
    return {key: value for key, value in settings.items() if value is not None}
