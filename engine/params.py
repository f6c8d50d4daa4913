"""What a request asks of sampling. Shared by the HTTP server, the offline API and the engine; free of torch."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for per token."""
MIN_TEMPERATURE = 1e-4
"""Lower temperatures are greedy: dividing by them would overflow, and leaves nothing to chance anyway."""
_COUNT = Meta(ge=0, le=2**31 - 1)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the target's tokens are chosen, and when a request ends.

    The defaults sample from the model's own distribution (temperature 1, nothing cut). Every field acts on the
    target's logits before the one sampling rule, so speculation never changes what any of them does.
    """

    max_tokens: Annotated[int, _COUNT] = 16
    """Most tokens to generate."""
    min_tokens: Annotated[int, _COUNT] = 0
    """End-of-sequence and stop tokens cannot be drawn before this many tokens."""
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """0 is greedy, and so is anything below MIN_TEMPERATURE."""
    top_k: Annotated[int, _COUNT] = 0
    """Keep the k most likely tokens, and what ties with the last of them; 0 keeps all."""
    top_p: Annotated[float, Meta(ge=1e-6, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    """Same seed, same request, same text - whatever the drafter. Callers that want variety draw one at random."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    logit_bias: dict[int, float] = {}
    """Added to the logit of each token id."""
    stop_token_ids: tuple[Token, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """None: no log-probabilities. k: that of each output token and of the k most likely, of the unchanged logits."""
    grammar: str | None = None
    """What the output has to match, as llguidance writes it: Lark, or its JSON. It ends where the grammar does."""
    allowed_token_ids: tuple[Token, ...] = ()
    """No other token can be drawn; empty: all can."""
    bad_words: tuple[tuple[Token, ...], ...] = ()
    """Sequences of tokens of which the last one cannot be drawn behind the others."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """The same of each prompt token but the first."""
    max_draft_tokens: Annotated[int, _COUNT] | None = None
    """Most tokens a draft may propose per round for this request (0: never speculate); None leaves it to the engine."""

    # The rest is about text: read where tokens become text, never by the engine.
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
        """Whether tokens are drawn; else the likeliest is taken."""
        return self.temperature >= MIN_TEMPERATURE

    @property
    def penalised(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def truncated(self) -> bool:
        """Whether the distribution is cut (which needs the whole vocabulary's logits of the row)."""
        return self.sampled and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
