"""Flags that several commands share, and the engine settings they override."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from engine.config.kv import POLICIES

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings (see configs/).")]


@dataclass(frozen=True, slots=True)
class EngineFlag:
    """A flag for a setting of the engine. read: turns the flag's value into the setting's."""

    setting: str
    type: type
    help: str
    read: Callable[[Any], Any] = lambda value: value

    def option(self, name: str) -> Any:
        """The annotation of a command's parameter. name: of that parameter. A bool has a flag for each value."""
        flag = f"{_flag(name)}/{_flag(f'no_{name}')}" if self.type is bool else _flag(name)
        return Annotated[self.type | None, typer.Option(flag, help=self.help)]


def gamma(speculation: str) -> int | Literal["auto"]:
    """Number of tokens drafted per round, from `--speculation`. Raises typer.BadParameter."""
    if speculation == "off":
        return 0
    if speculation == "auto":
        return "auto"
    if speculation.isdecimal() and speculation.isascii():
        return int(speculation)
    raise typer.BadParameter(
        f"{speculation!r} is not one of `off`, `auto` and a number of tokens", param_hint="--speculation"
    )


_DRAFTER, _DRAFT_MODEL = "engine.speculation.drafter", "engine.speculation.model"
_TARGET_KV = "engine.target_kv"
_TARGET_POLICY = f"{_TARGET_KV}.policy"

ENGINE_FLAGS = {
    "model": EngineFlag("engine.model", str, "Model directory, or a name that `magicdec fetch` knows."),
    "device": EngineFlag("engine.device", str, "auto, cpu or cuda."),
    "dtype": EngineFlag("engine.dtype", str, "auto, float32, bfloat16, float16 or float64."),
    "kernels": EngineFlag("engine.kernels", str, "auto, cpu, triton, flashinfer or reference."),
    "weights": EngineFlag("engine.weights", str, "auto: as stored, dense, int8, int4 or fp8."),
    "kv_format": EngineFlag(
        "engine.cache.format",
        str,
        "Numbers that KV is stored in: dense; fp8, int8 and int4x2 change the text.",
    ),
    "tensor_parallel_size": EngineFlag("engine.tensor_parallel_size", int, "Ranks per model."),
    "speculation": EngineFlag(
        "engine.speculation.gamma", str, "off, auto, or the number of tokens to draft per round.", gamma
    ),
    "draft": EngineFlag("engine.speculation.model", str, "Directory of a draft model; self: the target drafts."),
    "drafter": EngineFlag(
        _DRAFTER,
        str,
        "Where drafts come from: auto, self, model (with --draft DIR), ngram: the text itself, or together.",
    ),
    "store": EngineFlag("engine.speculation.store", str, "Text store to search, beside the request's own text."),
    "draft_weights": EngineFlag(
        "engine.speculation.weights", str, "Weights of drafts: auto, same as the target's, int8, int4 or fp8."
    ),
    # Before the budget, which is a setting of the policy.
    "policy": EngineFlag(
        "engine.speculation.kv.policy",
        str,
        f"KV that a draft reads: {', '.join(POLICIES)}. topk measures what choosing could reach; it saves no time.",
    ),
    "budget": EngineFlag("engine.speculation.kv.budget", int, "KV tokens that one draft step may read per row."),
    "verification": EngineFlag(
        "engine.speculation.verification", str, "Verification of sampled tokens: coupled or rejection."
    ),
    # Before its budget, as above.
    "target_kv": EngineFlag(
        _TARGET_POLICY,
        str,
        "KV that the target itself reads after a prompt: quest, which changes the text, or none: all.",
    ),
    "target_budget": EngineFlag(
        f"{_TARGET_KV}.budget", int, "KV tokens that a target with --target-kv chooses per row and KV head."
    ),
    "max_model_len": EngineFlag("engine.max_model_len", int, "Largest number of tokens of prompt and output together."),
    "gpu_memory_utilization": EngineFlag(
        "engine.cache.gpu_memory_utilization", float, "Share of each GPU's memory to use; KV takes what is left."
    ),
    "prefix_cache": EngineFlag(
        "engine.cache.prefix", bool, "Keep the KV of finished requests, for prompts that begin with the same tokens."
    ),
    "threads": EngineFlag("engine.threads", int, "CPU threads per rank."),
}
"""Flags by the name of a command's parameter."""


def engine_flags(*but: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of the engine's settings, after its own flag `config`.

    Settings that were given reach the command's parameter `overrides`, for load_config. but: flags to leave out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {name: flag for name, flag in ENGINE_FLAGS.items() if name not in but}
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name != "overrides":
                parameters.append(parameter.replace(annotation=hints[name]))
            if name == "config":
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                parameters += [
                    inspect.Parameter(name, kind, default=None, annotation=flag.option(name))
                    for name, flag in flags.items()
                ]

        @functools.wraps(command)
        def with_overrides(**given: Any) -> None:
            overrides = engine_overrides({name: given.pop(name, None) for name in flags})
            command(overrides, **given)

        # typer reads both.
        with_overrides.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_overrides.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_overrides

    return decorate


def engine_overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Settings for load_config. given: values by flag, in any order; None overrides nothing."""
    overrides = {
        flag.setting: flag.read(given[name]) for name, flag in ENGINE_FLAGS.items() if given.get(name) is not None
    }
    if (draft := overrides.get(_DRAFT_MODEL)) is not None:
        overrides = {_DRAFTER: "auto"} | overrides | {_DRAFT_MODEL: None if draft == "self" else draft}
    if overrides.get(_TARGET_POLICY) == "none":
        del overrides[_TARGET_POLICY]
        overrides = {_TARGET_KV: None, **overrides}
    return overrides


def flags_of(settings: Iterable[str]) -> list[str]:
    """The flags that gave these overrides."""
    names = {flag.setting: name for name, flag in ENGINE_FLAGS.items()} | {_TARGET_KV: "target_kv"}
    return [_flag(names[setting]) for setting in settings if setting in names]


def policy_override(policy: str | None) -> dict[str, Any]:
    """`engine_overrides` of a policy alone; it must come before a budget."""
    return engine_overrides({"policy": policy})


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def counts(text: str, flag: str, minimum: int = 1) -> list[int]:
    """Read the numbers of a comma-separated list. Raises typer.BadParameter."""
    values = [value.strip() for value in text.split(",")]
    if not all(value.isdecimal() and int(value) >= minimum for value in values):
        positive = "positive numbers" if minimum else "numbers"
        raise typer.BadParameter(f"{text!r} is not a list of {positive}", param_hint=flag)
    return [int(value) for value in values]


def temperatures(text: str, flag: str) -> list[float]:
    """Read the temperatures of a comma-separated list, each once. Raises typer.BadParameter."""
    try:
        values = list(dict.fromkeys(float(value) for value in text.split(",")))
    except ValueError:
        values = []
    if not values or not all(0 <= value <= 100 for value in values):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 0 to 100", param_hint=flag)
    return values


def names(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Read the names of a comma-separated list, each once. Raises typer.BadParameter for one that is not known."""
    values = list(dict.fromkeys(value.strip() for value in text.split(",")))
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=flag)
    return values
