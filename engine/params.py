"""Sampling parameters of a request. Shared by the HTTP server, the offline API and the engine; free of torch."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]

MAX_LOGPROBS = 20
"""Largest number of alternatives a request may ask for per token."""
MIN_TEMPERATURE = 1e-4
"""Lower temperatures sample greedily: dividing logits by them would overflow, and would leave no randomness anyway."""
_COUNT = Meta(ge=0, le=2**31 - 1)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters that control how a request's tokens are sampled and when the request ends.

    The defaults sample from the model's own distribution (temperature 1, no truncation). Every field acts on the
    target's logits before the one sampling rule, so speculation never changes the effect of any of them.
    """

    max_tokens: Annotated[int, _COUNT] = 16
    """Maximum number of tokens to generate. 0, with `prompt_logprobs`: only score the prompt."""
    min_tokens: Annotated[int, _COUNT] = 0
    """Number of tokens before which end-of-sequence and stop tokens cannot be sampled. If a grammar allows nothing else
    there, the request ends with an error."""
    temperature: Annotated[float, Meta(ge=0, le=1e30)] = 1.0
    """0 samples greedily, and so does any value below MIN_TEMPERATURE. At large values all tokens are equally likely;
    beyond 1e30 single precision ends."""
    top_k: Annotated[int, _COUNT] = 0
    """Keep the k most likely tokens, and tokens that tie with the last of them; 0 keeps all."""
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Keep the most likely tokens of this total probability, and tokens that tie with the last of them; 0 keeps the
    most likely token and its ties."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    """The same request with the same seed yields the same text, whatever the drafter (with coupled verification).
    Callers that want variety draw a seed at random."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    logit_bias: dict[int, float] = {}
    """Value to add to the logit of each token id."""
    stop_token_ids: tuple[Token, ...] = ()
    ignore_eos: bool = False
    """Continue past the model's end-of-sequence tokens, except where a grammar ends the output with one."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """None: no log-probabilities. k: those of each output token and of the k most likely tokens, under the unchanged
    logits."""
    grammar: str | None = None
    """Grammar that the output must match, in llguidance's Lark or JSON format. The output ends where the grammar
    does."""
    allowed_token_ids: tuple[Token, ...] = ()
    """The only tokens that can be sampled; empty: all."""
    bad_words: tuple[tuple[Token, ...], ...] = ()
    """Token sequences whose last token cannot be sampled right after the others."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Same as `logprobs`, for each prompt token except the first."""
    max_draft_tokens: Annotated[int, _COUNT] | None = None
    """Maximum number of drafts per round for this request (0: never speculate); None: the engine decides."""

    # The engine ignores the remaining fields: engine.text applies them when it converts tokens to text.
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        floats = (
            *(self.temperature, self.top_p, self.min_p, *self.logit_bias.values()),
            *(self.presence_penalty, self.frequency_penalty, self.repetition_penalty),
        )
        if not all(math.isfinite(value) for value in floats):
            raise ValueError("sampling parameters must be finite numbers")

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn at random; otherwise the most likely token is taken."""
        return self.temperature >= MIN_TEMPERATURE

    @property
    def ends_at_eos(self) -> bool:
        """Whether the model's end-of-sequence tokens end the output."""
        return not self.ignore_eos or self.grammar is not None

    @property
    def penalised(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def truncated(self) -> bool:
        """Whether the distribution is truncated (which needs the row's logits over the whole vocabulary)."""
        return self.sampled and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
