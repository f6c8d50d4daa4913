"""Contenders of a comparison: the engines there are, and variants of magicdec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bench.corpus import BenchError


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender: one line of the table. options: see the docstring of bench/peers/programs/{peer}.py."""

    name: str
    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ("usual",)
    """Those of SETS that it belongs to."""
    modes: Sequence[str] = ()
    """Drafters, or off, of the contenders that share its process (drafting_twins)."""


_VLLM_NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
"""Drafts by looking up the last 4 tokens in what came before; the example of the vLLM documentation."""
_GAMMA = "engine.speculation.gamma"
_DRAFTER = "engine.speculation.drafter"
_OFF = {"engine.weights": "dense", _GAMMA: 0}
_AUTO = {"engine.weights": "dense", _GAMMA: "auto", _DRAFTER: "self"}
_PREFIX = {"engine.cache.prefix": True}


SETS = ("usual", "shared", "weights", "kv")
"""Sets of contenders: of comparisons in general, of prompts that share tokens, of weights and of KV of fewer bits."""


def _pair(name: str, sets: Sequence[str], settings: Mapping[str, Any]) -> tuple[Peer, Peer]:
    """Return magicdec with these settings, without and with speculation."""
    return (
        Peer(f"magicdec {name} off", "magicdec", {**_OFF, **settings}, sets),
        Peer(f"magicdec {name} auto", "magicdec", {**_AUTO, **settings}, sets),
    )


CONTENDERS = (
    Peer("magicdec off", "magicdec", _OFF, SETS),
    Peer("magicdec auto", "magicdec", _AUTO, SETS),
    Peer("magicdec ngram", "magicdec", _AUTO | {_DRAFTER: "ngram"}, ()),
    Peer("magicdec together", "magicdec", _AUTO | {_DRAFTER: "together"}),
    *_pair("int8", ("weights",), {"engine.weights": "int8"}),
    *_pair("int4", ("weights",), {"engine.weights": "int4"}),
    *_pair("int8 KV", ("kv",), {"engine.cache.format": "int8"}),
    *_pair("int4x2 KV", ("kv",), {"engine.cache.format": "int4x2"}),
    Peer("magicdec prefix", "magicdec", _OFF | _PREFIX, ("shared",)),
    Peer("magicdec prefix auto", "magicdec", _AUTO | _PREFIX, ("shared",)),
    Peer("vllm", "vllm", sets=("usual", "weights", "kv")),
    Peer("vllm float32", "vllm", {"dtype": "float32"}, ()),
    Peer("vllm ngram", "vllm", {"speculative_config": _VLLM_NGRAM}),
    Peer("vllm ngram float32", "vllm", {"dtype": "float32", "speculative_config": _VLLM_NGRAM}, ()),
    Peer("vllm prefix", "vllm", {"prefix": True}, ("shared",)),
    Peer("vllm fp8 KV", "vllm", {"kv": "fp8"}, ("kv",)),
    Peer("llama.cpp bf16", "llama_cpp", {"weights": "BF16"}, ("usual", "weights")),
    Peer("llama.cpp ngram", "llama_cpp", {"weights": "BF16", "lookup": 2}),  # what its documentation advises for CPUs
    Peer("llama.cpp prefix", "llama_cpp", {"weights": "BF16", "prefix": True}, ("shared",)),
    Peer("llama.cpp q8_0", "llama_cpp", {"weights": "Q8_0"}, ("weights",)),
    Peer("llama.cpp q4_0", "llama_cpp", {"weights": "Q4_0"}, ("weights",)),
    Peer("llama.cpp as is", "llama_cpp", sets=("weights", "kv")),  # the default model: Q4_1
    Peer("llama.cpp q8_0 KV", "llama_cpp", {"kv": "q8_0", "flash": True}, ("kv",)),
    Peer("transformers", "transformers"),
    Peer("transformers lookup", "transformers", {"lookup": 4}),
    Peer("transformers continuous", "transformers", {"continuous": True}, ()),
)


def variant(text: str) -> Peer:
    """Parse `NAME: key=value key=value` into a magicdec contender with these `engine` settings. Raises BenchError."""
    name, colon, settings = text.partition(":")
    pairs = [setting.partition("=") for setting in settings.split()]
    if not colon or not name.strip() or not all(key and equals for key, equals, _ in pairs):
        raise BenchError(f"--variant {text!r}: expected NAME: key=value key=value")
    return Peer(name.strip(), "magicdec", {f"engine.{key}": yaml.safe_load(value) for key, _, value in pairs})


def quantized(directory: Path) -> list[Peer]:
    """Return the contenders that can read a directory with quantized weights of the same model. Raises BenchError."""
    if not directory.is_dir():
        raise BenchError(f"--quantized {directory}: it is not a directory")
    name, model = directory.resolve().name, str(directory)
    stored = {"engine.model": model, "engine.weights": "auto"}
    return [
        Peer(f"magicdec {name} off", "magicdec", _OFF | stored),
        Peer(f"magicdec {name} auto", "magicdec", _AUTO | stored),
        Peer(f"vllm {name}", "vllm", {"model": model}),
    ]


def mode_of(contender: Peer) -> str | None:
    """Return the drafter of a magicdec that chooses its number of drafts, or off; None for all others."""
    if contender.peer != "magicdec" or (gamma := contender.options.get(_GAMMA, "auto")) not in (0, "auto"):
        return None
    drafter = contender.options.get(_DRAFTER, "auto")
    return "off" if gamma == 0 else "together" if drafter == "auto" else drafter


def share_rows(contenders: Sequence[Peer]) -> dict[str, Peer]:
    """Find the contenders that can take turns on the same rows: magicdec with the same settings, but other drafters or
    none. Returns, by name, the one whose process serves each of them, which has the modes of all.

    A draft model, which would catch up on others' turns, and policies that observe others' verify passes share none.
    """
    groups: dict[str, list[Peer]] = {}
    for contender in contenders:
        observes = contender.options.get("engine.speculation.kv.policy", "window") != "window"
        if mode_of(contender) is not None and not observes and "engine.speculation.model" not in contender.options:
            rest = {key: value for key, value in contender.options.items() if key not in (_GAMMA, _DRAFTER)}
            groups.setdefault(repr(sorted(rest.items())), []).append(contender)
    found: dict[str, Peer] = {}
    for group in groups.values():
        drafting = [one for one in group if mode_of(one) != "off"]
        owner = next((one for one in drafting if mode_of(one) == "together"), drafting[0] if drafting else None)
        if owner is not None:
            both = mode_of(owner) == "together"
            able = [one for one in group if both or mode_of(one) in ("off", mode_of(owner))]
            owner = replace(owner, modes=[mode_of(one) or "" for one in able])
            found |= {one.name: owner for one in able}
    return found


def largest_share(contenders: Sequence[Peer]) -> int:
    """Return the largest number of contenders that take turns on the same rows."""
    return max([1, *(len(owner.modes) for owner in share_rows(contenders).values())])


def choose(names: str | None, more: Sequence[Peer], chosen: str = "usual") -> list[Peer]:
    """Select contenders. Raises BenchError.

    names: comma-separated; None: those of the set `chosen`. more: variants, always included.
    """
    known = {contender.name: contender for contender in (*CONTENDERS, *more)}
    if names is None:
        return [one for one in known.values() if one in more or chosen in one.sets]
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise BenchError(f"no contender {unknown[0]!r}; there are: {', '.join(known)}")
    return list({name: known[name] for name in (*wanted, *(one.name for one in more))}.values())
