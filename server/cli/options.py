"""Flags that several commands share, and how they become settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings (see configs/).")]
Threads = Annotated[int | None, typer.Option(help="CPU threads per rank.")]
POLICIES = ("window", "snapkv", "topk", "all")
_FLAGS: dict[str, Any] = {
    "model": Annotated[str | None, typer.Option(help="Model directory, or `default`.")],
    "device": Annotated[str | None, typer.Option(help="auto, cpu or cuda.")],
    "dtype": Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or float64.")],
    "kernels": Annotated[str | None, typer.Option(help="auto, cpu, triton, flashinfer or reference.")],
    "weights": Annotated[str | None, typer.Option(help="full, or int8: matrices rounded to 8 bits.")],
    "tensor_parallel_size": Annotated[int | None, typer.Option("--tensor-parallel-size", help="Ranks per model.")],
    "speculation": Annotated[str | None, typer.Option(help="off, auto, or how many tokens to draft per round.")],
    "draft": Annotated[str | None, typer.Option(help="Directory of a draft model; self: the target drafts.")],
    "draft_weights": Annotated[str | None, typer.Option(help="Of drafts: auto, same as the target's, or int8.")],
    "policy": Annotated[str | None, typer.Option(help="Which KV a draft reads: window, snapkv, topk or all.")],
    "budget": Annotated[int | None, typer.Option(help="KV tokens that one draft step may read per row.")],
    "verification": Annotated[str | None, typer.Option(help="Of sampled tokens: coupled or rejection.")],
    "max_model_len": Annotated[int | None, typer.Option(help="Most tokens of prompt and output together.")],
    "gpu_memory_utilization": Annotated[
        float | None,
        typer.Option(help="Share of each GPU's memory to use: KV takes what is left."),
    ],
    "threads": Threads,
}
"""Settings of the engine that have a flag."""


def engine_flags(*but: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of the engine's settings, behind its own flag `config`. What they override reaches its
    parameter `overrides`, for engine.config.deployment.load_config. but: flags that it goes without."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {name: flag for name, flag in _FLAGS.items() if name not in but}
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name != "overrides":
                parameters.append(parameter.replace(annotation=hints[name]))
            if name == "config":
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                parameters += [inspect.Parameter(n, kind, default=None, annotation=flags[n]) for n in flags]

        @functools.wraps(command)
        def with_overrides(**given: Any) -> None:
            overrides = engine_overrides(**{name: given.pop(name, None) for name in flags})
            command(overrides, **given)

        # What typer reads, and how.
        with_overrides.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_overrides.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_overrides

    return decorate


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


def counts(text: str, flag: str, least: int = 1) -> list[int]:
    """The numbers of a comma-separated list. Raises typer.BadParameter."""
    values = [value.strip() for value in text.split(",")]
    if not all(value.isdecimal() and int(value) >= least for value in values):
        positive = "positive numbers" if least else "numbers"
        raise typer.BadParameter(f"{text!r} is no list of {positive}", param_hint=flag)
    return [int(value) for value in values]


def names(text: str, known: Sequence[str], flag: str) -> list[str]:
    """The names of a comma-separated list, each once. Raises typer.BadParameter for one that is not known."""
    values = list(dict.fromkeys(value.strip() for value in text.split(",")))
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=flag)
    return values


def policy_override(policy: str | None) -> dict[str, Any]:
    """As engine_overrides; it must come before a budget."""
    return engine_overrides(policy=policy)


def engine_overrides(
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    weights: str | None = None,
    tensor_parallel_size: int | None = None,
    speculation: str | None = None,
    draft: str | None = None,
    draft_weights: str | None = None,
    policy: str | None = None,
    budget: int | None = None,
    verification: str | None = None,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Settings for engine.config.deployment.load_config; flags that were not given override nothing."""
    settings: dict[str, Any] = {
        "engine.model": model,
        "engine.device": device,
        "engine.dtype": dtype,
        "engine.kernels": kernels,
        "engine.weights": weights,
        "engine.tensor_parallel_size": tensor_parallel_size,
        "engine.speculation.gamma": None if speculation is None else gamma(speculation),
        "engine.speculation.weights": draft_weights,
        "engine.speculation.kv.policy": policy,  # before what belongs to it
        "engine.speculation.kv.budget": budget,
        "engine.speculation.verification": verification,
        "engine.max_model_len": max_model_len,
        "engine.cache.gpu_memory_utilization": gpu_memory_utilization,
        "engine.threads": threads,
    }
    overrides = {key: value for key, value in settings.items() if value is not None}
    if draft == "self":
        return overrides | {"engine.speculation.drafter": "self", "engine.speculation.model": None}
    if draft is not None:
        return overrides | {"engine.speculation.drafter": "model", "engine.speculation.model": draft}
    return overrides


def flags_of(settings: Iterable[str]) -> list[str]:
    """The flags behind overrides that engine_overrides made, each once."""
    other = {
        "engine.speculation.gamma": "speculation",
        "engine.speculation.drafter": "draft",
        "engine.speculation.weights": "draft_weights",
    }
    names = [other.get(name, name.rpartition(".")[2]) for name in settings if name != "engine.speculation.model"]
    return [f"--{name.replace('_', '-')}" for name in names]
