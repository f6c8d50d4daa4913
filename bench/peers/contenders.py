"""Contenders of a comparison: the engines there are, and variants of magicdec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    usual: bool = True
    """Whether it is measured if --contenders is not given."""
    shares: bool = False
    """The same where prompts share tokens."""
    few_bits: bool = False
    """The same where weights of fewer bits are compared."""


_VLLM_NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
"""Drafts by looking up the last 4 tokens in what came before; the example of the vLLM documentation."""
_OFF, _AUTO = ({"engine.weights": "dense", "engine.speculation.gamma": gamma} for gamma in (0, "auto"))
_PREFIX = {"engine.cache.prefix": True}


def _weights(name: str) -> tuple[Peer, Peer]:
    """Return magicdec with these weights, without and with speculation."""
    chosen = {"engine.weights": name}
    return (
        Peer(f"magicdec {name} off", "magicdec", _OFF | chosen, usual=False, few_bits=True),
        Peer(f"magicdec {name} auto", "magicdec", _AUTO | chosen, usual=False, few_bits=True),
    )


CONTENDERS = (
    Peer("magicdec off", "magicdec", _OFF, shares=True, few_bits=True),
    Peer("magicdec auto", "magicdec", _AUTO, shares=True, few_bits=True),
    *_weights("int8"),
    *_weights("int4"),
    Peer("magicdec prefix", "magicdec", _OFF | _PREFIX, usual=False, shares=True),
    Peer("magicdec prefix auto", "magicdec", _AUTO | _PREFIX, usual=False, shares=True),
    Peer("vllm", "vllm", few_bits=True),
    Peer("vllm ngram", "vllm", {"speculative_config": _VLLM_NGRAM}),
    Peer("vllm prefix", "vllm", {"prefix": True}, usual=False, shares=True),
    Peer("llama.cpp bf16", "llama_cpp", {"weights": "BF16"}, few_bits=True),
    Peer("llama.cpp ngram", "llama_cpp", {"weights": "BF16", "lookup": 2}),  # what its documentation advises for CPUs
    Peer("llama.cpp prefix", "llama_cpp", {"weights": "BF16", "prefix": True}, usual=False, shares=True),
    Peer("llama.cpp q8_0", "llama_cpp", {"weights": "Q8_0"}, usual=False, few_bits=True),
    Peer("llama.cpp q4_0", "llama_cpp", {"weights": "Q4_0"}, usual=False, few_bits=True),
    Peer("llama.cpp as is", "llama_cpp", usual=False, few_bits=True),  # the default model: Q4_1
    Peer("transformers", "transformers"),
    Peer("transformers lookup", "transformers", {"lookup": 4}),
    Peer("transformers continuous", "transformers", {"continuous": True}, usual=False),
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


def choose(names: str | None, more: Sequence[Peer], *, sharing: bool = False, few_bits: bool = False) -> list[Peer]:
    """Select contenders. Raises BenchError.

    names: comma-separated; None: the usual ones. more: variants, always included. sharing: whether prompts share
    tokens. few_bits: whether weights of fewer bits are compared.
    """

    def is_usual(one: Peer) -> bool:
        return one.few_bits if few_bits else one.shares if sharing else one.usual

    known = {contender.name: contender for contender in (*CONTENDERS, *more)}
    if names is None:
        return [one for one in known.values() if one in more or is_usual(one)]
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise BenchError(f"no contender {unknown[0]!r}; there are: {', '.join(known)}")
    return list({name: known[name] for name in (*wanted, *(one.name for one in more))}.values())
