"""What API processes and the engine process say to each other: msgspec structs, msgpack on a ZeroMQ socket.

Free of torch, so that an API process never loads it.
"""

from __future__ import annotations

import msgspec

from engine.params import SamplingParams

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
RETRY_FULL = "queue_full"
RETRY_MEMORY = "out_of_memory"


class AddRequest(msgspec.Struct, tag="add", omit_defaults=True):
    """Queue a request. `id` is the caller's, unique among its live requests."""

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: float = 0.0
    """time.monotonic() when the request reached the server (one clock for all processes of a machine)."""
    priority: int = 0
    """Those with lower ones are admitted first."""
    like: str | None = None
    """A request with the same prompt that was queued before: pages of the prompt that it has computed are shared."""


class AbortRequests(msgspec.Struct, tag="abort"):
    """Forget these requests; unknown and finished ids are fine. No output follows for them."""

    ids: list[str]


ToEngine = AddRequest | AbortRequests


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one output position, of the target's unchanged logits."""

    logprob: float
    """Of the token that was output."""
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities of one prompt token, given those before it."""

    token: int
    logprob: float
    rank: int
    """How many tokens are likelier, and one."""
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, omit_defaults=True):
    """What one round yielded for one request. The last one carries `finish_reason`."""

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """One per token, if asked for."""
    prompt_logprobs: list[PromptLogprobs] | None = None
    """With the first output, if asked for: one per prompt token but the first."""
    drafted: int = 0
    accepted: int = 0
    """Of this round: tokens proposed by the draft, and how many of `tokens` were among them (the first ones)."""
    finish_reason: str | None = None
    stop_reason: int | None = None
    """The token id that ended the request, unless it was the model's own end-of-sequence token."""
    error: str | None = None
    """Set when the engine could not serve an accepted request; `finish_reason` is then "abort"."""
    retry: str | None = None
    """With `error`: nothing is wrong with the request, it met RETRY_FULL or RETRY_MEMORY."""
    scheduled: float = 0.0
    """time.monotonic() when the request was first admitted."""


class EngineStats(msgspec.Struct, omit_defaults=True):
    """Gauges and running totals since start; every field is one metric."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    page_size: int = 0
    rounds: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafts: int = 0
    """Rows that entered a round with at least one drafted token."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    rejections: int = 0
    """Rows and rounds in which the target disagreed with a draft."""
    accepted_per_position: list[int] = []
    """[i]: rounds and rows whose draft token i was accepted."""
    gamma_chosen: list[int] = []
    """[g]: rows that entered a round with g drafted tokens."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    """Busy time of the engine outside draft and verify."""
    decode_seconds: float = 0.0
    """Of rounds that only decoded, where the controller keeps count of what speculation gains: what they took;"""
    plain_seconds: float = 0.0
    """what the same tokens would have taken without drafts, by its reckoning;"""
    forecast_seconds: float = 0.0
    """and what it promised when it chose."""
    alpha: float = 0.0
    """Its newest estimate of the probability that a drafted token holds; 0: none."""
    policy: str = ""
    """Which KV drafts read; empty where nothing is ever drafted."""
    draft_pages_per_row: int = 0
    """Pages of KV that drafts keep for each running request, beside the target's pool."""
    kv_tokens_read: int = 0
    """KV tokens (one token = all layers and heads) that draft and verify passes of decoding rows have read."""
    kv_token_bytes: int = 0
    engine_restarts: int = 0
    """Engines that took the place of one that died. This and the next are counted by engine.processes.supervisor."""
    requests_retried: int = 0
    """Requests that were run once more, on such an engine."""


class Ready(msgspec.Struct, tag="ready"):
    """First message of the engine to every API process that connects."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    stats: EngineStats
    heartbeat: bytes = b""
    """What this process is called in its heartbeats."""


class Outputs(msgspec.Struct, tag="outputs"):
    """Sent after a round, and as a heartbeat (with no outputs) when nothing runs."""

    outputs: list[RequestOutput]
    stats: EngineStats


class Dead(msgspec.Struct, tag="dead"):
    """The engine's last word; every live request of the receiver is lost."""

    reason: str


FromEngine = Ready | Outputs | Dead
