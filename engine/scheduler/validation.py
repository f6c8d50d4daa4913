"""Validation of requests, for HTTP and the offline API alike: what can never run is refused before it is queued."""

from __future__ import annotations

from collections.abc import Iterable

from engine.messages import AddRequest
from engine.params import SamplingParams


class RequestError(ValueError):
    """A request that this engine can never serve, or cannot queue now."""


class QueueFull(RequestError):
    """Too many requests are running or waiting."""


def check_fields(request: AddRequest, vocab_size: int, eos_token_ids: Iterable[int], no_grammars: str | None) -> None:
    """Raise RequestError for fields that are invalid, or that contradict each other.

    no_grammars: why this model's output cannot be constrained by a grammar, if so.
    """
    params = request.params
    if not request.prompt:
        raise RequestError("the prompt has no tokens")
    if params.max_tokens < 1 and params.prompt_logprobs is None:
        raise RequestError("max_tokens must be at least 1, or 0 with prompt_logprobs")
    if not all(params.bad_words):
        raise RequestError("bad_words: a word has no tokens")
    for field, ids in (
        ("prompt", request.prompt),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_words", [token for word in params.bad_words for token in word]),
    ):
        # min and max are fast: a prompt can have 100,000 tokens, and running rows wait for this check.
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            token = next(token for token in ids if not 0 <= token < vocab_size)
            raise RequestError(f"{field}: token id {token} is not in the vocabulary of {vocab_size}")
    if params.grammar is not None and no_grammars is not None:
        raise RequestError(f"grammar: {no_grammars}")
    _check_first_token(params, vocab_size, eos_token_ids)


def _check_first_token(params: SamplingParams, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
    """Raise RequestError if the fields exclude every token as the first one of the output. What a grammar excludes is
    known only when it is sampled from."""
    excluded: dict[str, set[int]] = {"bad_words": {word[0] for word in params.bad_words if len(word) == 1}}
    if params.min_tokens:
        excluded["min_tokens"] = {*params.stop_token_ids, *(eos_token_ids if params.ends_at_eos else ())}
    every = set().union(*excluded.values())
    allowed = params.allowed_token_ids
    if every.issuperset(allowed) if allowed else len(every) == vocab_size:
        fields = [field for field, tokens in excluded.items() if tokens]
        if allowed:
            fields.append("allowed_token_ids")
        verb = "exclude" if len(fields) > 1 else "excludes"
        raise RequestError(f"{' and '.join(fields)} {verb} every token")
