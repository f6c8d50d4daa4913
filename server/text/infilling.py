"""Prompts for a text between a prefix and a suffix, for models whose tokenizer has tokens for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from models.tokenizer import Tokenizer


class Infilling(NamedTuple):
    """Ids of the tokens before the prefix, before the suffix, and before the middle, which the model writes. middle:
    None: the prefix comes last, and the model goes on from there."""

    prefix: int
    suffix: int
    middle: int | None

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Return the prompt for what stands between two texts, given as tokens."""
        if self.middle is None:
            return [self.suffix, *suffix, self.prefix, *prefix]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle]


_NAMES: Sequence[tuple[str, str, str | None]] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Qwen3-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral: the suffix comes first
)


def find_infilling(tokenizer: Tokenizer) -> Infilling | None:
    """Return the tokens of a tokenizer; None if it has none for this."""
    for names in _NAMES:
        ids = [None if name is None else tokenizer.id_of(name) for name in names]
        if all(id is not None for name, id in zip(names, ids, strict=True) if name is not None):
            prefix, suffix, middle = ids
            assert prefix is not None
            assert suffix is not None
            return Infilling(prefix, suffix, middle)
    return None
