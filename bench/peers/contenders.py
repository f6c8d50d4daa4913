"""Contenders of a comparison: the engines there are, and variants of magicdec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


_VLLM_NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
"""Drafts by looking up the last 4 tokens in what came before; the example of the vLLM documentation."""
_PREFIX = {"engine.cache.prefix": True}
CONTENDERS = (
    Peer("magicdec off", "magicdec", {"engine.speculation.gamma": 0}, shares=True),
    Peer("magicdec auto", "magicdec", {"engine.speculation.gamma": "auto"}, shares=True),
    Peer("magicdec prefix", "magicdec", _PREFIX | {"engine.speculation.gamma": 0}, usual=False, shares=True),
    Peer("magicdec prefix auto", "magicdec", _PREFIX | {"engine.speculation.gamma": "auto"}, usual=False, shares=True),
    Peer("vllm", "vllm"),
    Peer("vllm ngram", "vllm", {"speculative_config": _VLLM_NGRAM}),
    Peer("vllm prefix", "vllm", {"prefix": True}, usual=False, shares=True),
    Peer("llama.cpp bf16", "llama_cpp", {"weights": "BF16"}),
    Peer("llama.cpp ngram", "llama_cpp", {"weights": "BF16", "lookup": 2}),  # what its documentation advises for CPUs
    Peer("llama.cpp prefix", "llama_cpp", {"weights": "BF16", "prefix": True}, usual=False, shares=True),
    Peer("llama.cpp q8_0", "llama_cpp", {"weights": "Q8_0"}, usual=False),
    Peer("llama.cpp as is", "llama_cpp", usual=False),
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


def choose(names: str | None, more: Sequence[Peer], *, sharing: bool = False) -> list[Peer]:
    """Select contenders. Raises BenchError.

    names: comma-separated; None: the usual ones. more: variants, always included. sharing: whether prompts share
    tokens.
    """
    known = {contender.name: contender for contender in (*CONTENDERS, *more)}
    if names is None:
        return [one for one in known.values() if one in more or (one.shares if sharing else one.usual)]
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise BenchError(f"no contender {unknown[0]!r}; there are: {', '.join(known)}")
    return list({name: known[name] for name in (*wanted, *(one.name for one in more))}.values())
