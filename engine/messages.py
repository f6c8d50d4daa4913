"""Messages between API processes and the engine process: msgspec structs, sent as msgpack over a ZeroMQ socket.

Free of torch, so that an API process never loads it.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Literal

import msgspec

from engine.params import SamplingParams

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
RETRY_FULL = "queue_full"
RETRY_MEMORY = "out_of_memory"


class EngineState(StrEnum):
    """State of an engine. PAUSED: no round begins. ASLEEP: nor are there weights or KV."""

    RUNNING = "running"
    PAUSED = "paused"
    ASLEEP = "asleep"


class AddRequest(msgspec.Struct, tag="add", omit_defaults=True):
    """Queue a request. The caller chooses `id`, unique among its live requests."""

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: float = 0.0
    """time.monotonic() when the request reached the server (one clock for all processes of a machine)."""
    priority: int = 0
    """Requests with lower values are admitted first."""
    cache_salt: str = ""
    """Requests share KV in the prefix cache only with requests of the same salt."""


class AbortRequests(msgspec.Struct, tag="abort"):
    """Drop these requests; unknown and finished ids are ignored. No output follows for them."""

    ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache"):
    """Forget all KV that the prefix cache holds: no later request finds any of it."""


ControlAction = Literal["pause", "resume", "update_weights", "sleep", "wake_up"]


class ControlEngine(msgspec.Struct, tag="control", omit_defaults=True):
    """Do to the engine what the method of engine.core.Engine with the action's name does. It answers with
    ControlResult."""

    id: str
    """Chosen by the sender, unique among its messages that are not answered yet."""
    action: ControlAction
    abort: bool = False
    """With pause: end all requests."""
    path: str = ""
    """With update_weights: the model directory."""


ToEngine = AddRequest | AbortRequests | ResetPrefixCache | ControlEngine


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one output position, under the target's unchanged logits."""

    logprob: float
    """Log-probability of the output token."""
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one prompt token, given the tokens before it."""

    token: int
    logprob: float
    rank: int
    """Number of likelier tokens, plus one."""
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, omit_defaults=True):
    """Output of one round for one request. The last one carries `finish_reason`.

    The engine process sends one with `queued` and nothing else before those of rounds.
    """

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token, if the request asks for them."""
    prompt_logprobs: list[PromptLogprobs] | None = None
    """In the first output, if the request asks for them: one entry per prompt token except the first."""
    drafted: int = 0
    accepted: int = 0
    """In this round: number of tokens that the draft proposed, and number of `tokens`, the first ones, among them."""
    from_text: int = 0
    """Those of the drafted tokens, the first ones, that were found in text."""
    by_model: bool = False
    """Whether a draft model drafted the others, if there are any; else the target itself."""
    finish_reason: str | None = None
    stop_reason: int | None = None
    """The token id that ended the request, unless it was the model's own end-of-sequence token."""
    error: str | None = None
    """Reason why the engine could not serve the request; `finish_reason` is then "abort"."""
    is_server_fault: bool = False
    """With `error`: whether the request itself is valid, and something else has failed."""
    retry: str | None = None
    """With `error`: the request is valid and may be retried; RETRY_FULL or RETRY_MEMORY is the cause."""
    scheduled: float = 0.0
    """time.monotonic() when the request was first admitted."""
    cached_tokens: int = 0
    """Number of prompt tokens whose KV the prefix cache held when the request was first admitted."""
    queued: bool = False
    """Acknowledgement: the engine has accepted the request and queued it."""


class EngineStats(msgspec.Struct, omit_defaults=True):
    """Gauges and running totals since start; every field is one metric."""

    state: EngineState = EngineState.RUNNING
    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    """Pages of the target's pool. This and the next two fields leave out the pool of sliding layers beside others."""
    pages_free: int = 0
    pages_cached: int = 0
    """Pages that no request owns and that the prefix cache can still hand out. All others are owned or free."""
    page_size: int = 0
    rounds: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache, when their requests were first admitted."""
    prefix_hits: int = 0
    """Those of them whose KV was found."""
    prefix_evictions: int = 0
    """Cached pages that were given to other requests."""
    drafts: int = 0
    """Rows, counted in each round, with at least one drafted token."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    rejections: int = 0
    """Rows, counted in each round, that had a draft rejected."""
    accepted_per_position: list[int] = []
    """[i]: rows, counted in each round, whose draft token i was accepted."""
    gamma_chosen: list[int] = []
    """[g]: rows, counted in each round, that decoded with g drafts planned."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    """Busy time of the engine outside draft and verify."""
    decode_seconds: float = 0.0
    """Time of rounds that only decoded. This and the next three fields are 0 unless the controller keeps them."""
    plain_seconds: float = 0.0
    """Estimated time of the same tokens without drafts."""
    forecast_seconds: float = 0.0
    """Time that the controller predicted for these rounds when it chose them."""
    alpha: float = 0.0
    """The controller's newest estimate of the probability that a model's draft is accepted, of the model that drafted
    last; 0: none."""
    policy: str = ""
    """KV policy of drafts, of two models both; empty where no model drafts."""
    draft_pages_per_row: int = 0
    """Pages of KV that drafts keep for each running request, in addition to the target's pool."""
    target_kv: dict[str, str | int] = {}
    """Settings of a target that reads part of its KV (TargetQuestConfig.summary); empty: it reads all."""
    weights: dict[str, str] = {}
    """Formats of the matrices that the target and drafts multiply by; empty while the weights are released."""
    kv_format: str = "dense"
    """Format of the target's computed pages (CacheConfig.format)."""
    text_draft_tokens: int = 0
    """Those of the drafted tokens that were found in text."""
    text_accepted_tokens: int = 0
    """Those of them that were accepted."""
    model_draft_tokens: int = 0
    """Those of the drafted tokens that a draft model made. The target itself made the rest."""
    model_accepted_tokens: int = 0
    """Those of them that were accepted."""
    kv_tokens_read: int = 0
    """KV tokens (one token = all heads, and all layers that do not slide beside others) read by draft and verify passes
    of decoding rows. Tokens that are read once for several rows count once. Where all layers slide, tokens before the
    window count too."""
    draft_kv_tokens_read: int = 0
    """Those of them that drafts read."""
    kv_token_bytes: int = 0
    """Bytes of such a token."""
    sliding_pages_total: int = 0
    """Pages of the pool of sliding layers; 0: the model has none beside others."""
    sliding_pages_owned: int = 0
    """Those of them that requests own."""
    engine_restarts: int = 0
    """Engines that replaced a dead one. engine.processes.supervisor counts this field and the next."""
    requests_retried: int = 0
    """Requests that were run again on a replacement."""


class Ready(msgspec.Struct, tag="ready"):
    """First message of the engine to every API process that connects."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    stats: EngineStats
    heartbeat: bytes = b""
    """Name of this process in its heartbeats."""
    protocol: str = ""
    """See `protocol`."""


class Outputs(msgspec.Struct, tag="outputs"):
    """Outputs of a round; without content, an update of the stats."""

    outputs: list[RequestOutput]
    stats: EngineStats


class ControlResult(msgspec.Struct, tag="control_result"):
    """Answer to ControlEngine, once it is done. refusal: why it was not; nothing has changed then."""

    id: str
    stats: EngineStats
    refusal: str | None = None


class Dead(msgspec.Struct, tag="dead"):
    """Last message of the engine; every live request of the receiver is lost."""

    reason: str


FromEngine = Ready | Outputs | ControlResult | Dead


def protocol() -> str:
    """Return a fingerprint of all messages: processes of other versions, which would drop each other's new fields, have
    another one."""
    schemas = msgspec.json.schema_components([ToEngine, FromEngine])
    return hashlib.sha256(msgspec.json.encode(schemas, order="sorted")).hexdigest()[:16]
