"""Settings of a deployment: frozen, typed, validated once at start. Free of torch.

A config is read from one YAML file (configs/ documents every key), then overridden by command-line flags. Unknown
keys are errors. No environment variable changes behaviour, and nothing changes a config after it was validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """A setting is unknown, out of range, or contradicts another; the message names it."""


def _policy_of(value: Any) -> Any:
    """Which kind of KV policy a setting is about; the default one need not be named."""
    return value.get("policy", "window") if isinstance(value, dict) else getattr(value, "policy", None)


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class CacheConfig(Settings):
    """The target's KV pool."""

    page_size: Positive = 16
    """KV slots per page."""
    num_pages: Positive | None = None
    """Pages in the pool; None: as many as `memory_gb` holds."""
    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    """Of each rank."""


class SchedulerConfig(Settings):
    max_rows: Positive = 64
    """Most requests running at once."""
    max_batch_tokens: Positive = 512
    """Most target positions computed per round: decode rows first, then prefill chunks."""
    max_waiting: Positive = 1024
    """Requests queued beyond this are refused."""


class WindowConfig(Settings):
    """Sink + window (StreamingLLM, arXiv 2309.17453): the first and the most recent tokens."""

    policy: Literal["window"] = "window"
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    sink: Positive = 16
    """First tokens always read; rounded up to whole pages."""
    positions: Literal["absolute", "relative"] = "absolute"
    """relative: the draft sees the tokens it reads at positions 0 … budget - 1, as if there were no others."""


class SnapKVConfig(Settings):
    """The tokens that the prompt's last queries attended to most, per KV head (SnapKV, arXiv 2404.14469), and the
    most recent ones; in a cache of the draft's own."""

    policy: Literal["snapkv"]
    budget: Positive = 512
    """KV tokens one draft step may read per row; a multiple of page_size."""
    recent: Positive = 64
    """How many of them are the most recent ones; a multiple of page_size. What a request has generated can be read no
    further back, unless `reselect` chooses from it."""
    queries: Positive = 32
    """The prompt's last queries, which choose."""
    kernel: Positive = 5
    """Odd: scores are averaged over so many neighbouring tokens."""
    reselect: Annotated[int, Field(ge=0)] | None = None
    """Choose again every so many new tokens; 0: never; None: every 32, where the target drafts for itself."""


class TopKConfig(Settings):
    """The tokens that carry most of each query's attention, per KV head. It reads all keys to find them: a measure of
    what selection could reach at best, not a way to save time."""

    policy: Literal["topk"]
    budget: Positive = 512
    """KV tokens attended to per row."""


class AllConfig(Settings):
    """Everything: ordinary speculative decoding, for a draft model that is small by itself."""

    policy: Literal["all"]

    @model_validator(mode="before")
    @classmethod
    def _unlimited(cls, data: Any) -> Any:
        if isinstance(data, dict) and "budget" in data:
            raise ValueError("policy all reads everything and has no budget")
        return data

    @property
    def budget(self) -> None:
        """There is none."""


KVConfig = Annotated[
    Annotated[WindowConfig, Tag("window")]
    | Annotated[SnapKVConfig, Tag("snapkv")]
    | Annotated[TopKConfig, Tag("topk")]
    | Annotated[AllConfig, Tag("all")],
    Discriminator(
        _policy_of,
        custom_error_type="policy",
        custom_error_message="expected settings of a policy: window, snapkv, topk or all",
    ),
]


class SpeculationConfig(Settings):
    gamma: Annotated[int, Field(ge=0, le=16)] | Literal["auto"] = "auto"
    """Tokens drafted per round; 0 is plain decoding. auto: what promises most, for each round and row."""
    gamma_max: Annotated[int, Field(ge=1, le=16)] = 6
    """auto never drafts more."""
    drafter: Literal["self", "model"] = "self"
    """Who drafts: the target itself, with sparse KV, or a smaller model with the same vocabulary."""
    model: str | None = None
    """The directory of the draft model, if there is one."""
    tensor_parallel_size: Positive | None = None
    """Ranks that the draft model is split over, the first ones; None: all."""
    verification: Literal["coupled", "rejection"] = "coupled"
    """How sampled tokens are verified. coupled: draft and target draw with the same noise, and text does not depend on
    what was drafted. rejection: speculative sampling (arXiv 2302.01318), from the same distribution."""
    kv: KVConfig = WindowConfig()
    """Which KV the draft reads."""

    @property
    def draft_model(self) -> str | None:
        """The draft model that is to be loaded, if any."""
        return self.model if self.most_drafts and self.drafter == "model" else None

    def draft_ranks(self, ranks: int) -> int:
        """How many of the target's ranks share the draft model; 0: there is none."""
        return 0 if self.draft_model is None else self.tensor_parallel_size or ranks

    @property
    def most_drafts(self) -> int:
        """Per row and round."""
        return self.gamma_max if self.gamma == "auto" else self.gamma


class EngineConfig(Settings):
    """Everything the engine process needs to know."""

    model: str = "default"
    """A model directory (config.json, *.safetensors, tokenizer.json), or `default`: what `magicdec fetch` installs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    tensor_parallel_size: Positive = 1
    """Ranks: processes that compute the model together, each with its share of weights and KV."""
    collectives: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """What ranks exchange tensors through; auto: NCCL on CUDA devices, else shared memory where it works, else gloo."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A rank that keeps the others waiting for this long counts as hung."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the ranks may take to start and load."""
    digest_every: Annotated[int, Field(ge=0)] = 0
    """Compare what the ranks hold of tokens, page tables and lengths every so many rounds; 0: never."""
    max_model_len: Positive | None = None
    """Most tokens of prompt and output together; None: what the model was trained for."""
    threads: Positive | None = None
    """CPU threads per rank; None: an equal share of all cores."""
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    check_invariants: bool = False
    """Check after every round, not only when idle, that pages owned + pages free = pages total."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.speculation.most_drafts:
            self._check_speculation(self.speculation)
        rows, tokens = self.scheduler.max_rows, self.scheduler.max_batch_tokens
        if tokens <= rows:
            raise ValueError(
                f"scheduler.max_batch_tokens ({tokens}) must be more than scheduler.max_rows ({rows}), "
                "or a full batch would leave nothing for prefill"
            )
        return self

    def _check_speculation(self, speculation: SpeculationConfig) -> None:
        """Raises ValueError."""
        page, kv = self.cache.page_size, speculation.kv
        if (speculation.drafter == "model") != (speculation.model is not None):
            raise ValueError("speculation.drafter: model needs speculation.model, and nothing else does")
        ranks = speculation.tensor_parallel_size
        if ranks not in (None, self.tensor_parallel_size) and speculation.verification == "rejection":
            raise ValueError("speculation.verification: rejection needs the draft model on all ranks")
        if ranks is not None and speculation.drafter != "model":
            raise ValueError("speculation.tensor_parallel_size is that of a draft model, and there is none")
        if ranks is not None and ranks > self.tensor_parallel_size:
            raise ValueError(f"speculation.tensor_parallel_size: {ranks} of {self.tensor_parallel_size} ranks")
        if kv.policy == "window":
            kept = -(-kv.sink // page) * page
            if kv.budget % page:
                raise ValueError(f"speculation.kv.budget ({kv.budget}) must be a multiple of cache.page_size ({page})")
            if kv.budget < kept + page:
                raise ValueError(
                    f"speculation.kv.budget ({kv.budget}) leaves no page for recent tokens beside a sink of {kv.sink}"
                )
        if kv.policy == "snapkv":
            for name, tokens in (("budget", kv.budget), ("recent", kv.recent)):
                if tokens % page:
                    raise ValueError(f"speculation.kv.{name} ({tokens}) must be a multiple of cache.page_size ({page})")
            if kv.budget <= kv.recent:
                raise ValueError(
                    f"speculation.kv.budget ({kv.budget}) leaves nothing to choose beside {kv.recent} recent tokens"
                )
            if kv.reselect and speculation.drafter == "model":
                raise ValueError("speculation.kv.reselect: a draft model keeps no KV to choose from again")
            if kv.kernel % 2 == 0:
                raise ValueError(f"speculation.kv.kernel ({kv.kernel}) must be odd")


class ServerConfig(Settings):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 lets the system choose; the chosen port is printed."""
    served_model_name: str | None = None
    """Model id clients use; None: the model directory's name."""
    max_body_mb: Annotated[float, Field(gt=0)] = 8.0
    """Request bodies beyond this are refused with 413."""
    engine_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """An engine whose round takes longer than this counts as hung."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    restart: bool = False
    """Start the engine again when it dies, instead of ending with it."""
    restart_settled_s: Annotated[float, Field(ge=0)] = 60.0
    """An engine that dies sooner counts as a failed start, of which five in a row are the end."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """On SIGTERM running requests may finish for this long; then they are aborted."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Settings):
    """One deployment: the content of one YAML file."""

    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.tensor_parallel_size > 1 and self.server.engine_timeout_s <= self.engine.step_timeout_s:
            raise ValueError(
                f"server.engine_timeout_s ({self.server.engine_timeout_s:g}) must be more than engine.step_timeout_s "
                f"({self.engine.step_timeout_s:g}), or the server would give up before the engine says which rank hangs"
            )
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Read `path` (None: built-in defaults) and apply `overrides`, {"engine.cache.page_size": 32, …}, in their order.

    Another KV policy than the file's takes over its budget, and no other setting of `speculation.kv`.
    Raises ConfigError: unreadable file, not a mapping, unknown key, value out of range.
    """
    data: Any = {}
    if path is not None:
        try:
            data = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data() or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of settings")
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: {parent} must be a mapping of settings")
        if parents[-1:] == ["kv"] and leaf == "policy" and value != _policy_of(node):
            kept = {key: node[key] for key in node if key == "budget" and value != "all"}
            node.clear()
            node.update(kept)
        node[leaf] = value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """One line per fault: `engine.cache.page_size: Input should be greater than 0`."""
    lines = []
    for fault in error.errors():
        # A setting of a KV policy stands below the policy's tag, which no file contains.
        parts = [str(part) for part in fault["loc"]]
        where = ".".join(part for i, part in enumerate(parts) if i == 0 or parts[i - 1] != "kv")
        message = "unknown setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)
