"""Settings of a deployment: frozen, typed, validated once at start. Free of torch.

A config is read from one YAML file (configs/ documents every key), then overridden by command-line flags. Unknown
keys are errors. No environment variable changes behaviour, and nothing changes a config after it was validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, model_validator

from engine.config.kv import policy_of
from engine.config.settings import Positive, Settings
from engine.config.speculation import SpeculationConfig
from engine.config.target_reading import TargetQuestConfig
from engine.logs import LogFormat
from engine.plan import DrafterName
from kernels.kv.kv_bits import KV_BITS, KVBits


class ConfigError(ValueError):
    """A setting is unknown, out of range, or contradicts another; the message names it."""


def _listed(value: Any) -> Any:
    """Take one value for a list of it, and null for an empty one."""
    return [] if value is None else [value] if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1)]


def _page_size(value: Any, info: ValidationInfo) -> Any:
    """Return the page size of a cache that sets none. info: has the fields before it."""
    return KV_BITS[info.data.get("format", "dense")].page_size(16) if value is None else value


class CacheConfig(Settings):
    """Settings of the KV of target and drafts."""

    format: Literal["dense", "fp8", "int8", "int4x2"] = "dense"
    """Numbers that the target's KV is stored in. dense: the model's. fp8: 8 bits of floating point (e4m3), for each
    token by itself; not on CPU kernels. int8: 8 bits, with a scale and a minimum per channel of a page's keys, and per
    token of its values. int4x2: the same, in two halves, of which drafts read the upper one. With these two, a row's
    latest page has the model's numbers. Fewer bits change the text a little."""
    page_size: Annotated[Positive, BeforeValidator(_page_size), Field(validate_default=True)] = None  # type: ignore[assignment]
    """KV slots per page. None: 64 where pages are stored in fewer bits, else 16."""
    num_pages: Positive | None = None
    """Pages in the target's pool; None: as many as `memory_gb` holds in addition to the KV that drafts keep."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """GB (10^9 bytes) of KV per rank: the target's pool, a draft model's pool, and caches of fixed size. None: 4 on
    CPUs; on GPUs the part of `gpu_memory_utilization` that remains after the models are loaded and have run."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory that may be in use, by this and all other processes."""
    prefix: bool = True
    """Keep the KV of finished requests while memory lasts, for prompts that begin with the same tokens."""

    @property
    def bits(self) -> KVBits:
        """Sizes of the format."""
        return KV_BITS[self.format]

    @property
    def seals(self) -> bool:
        """See KVBits.seals."""
        return self.bits.seals

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.page_size != self.bits.page_size(self.page_size):
            group = self.bits.group
            raise ValueError(f"page_size ({self.page_size}): pages of format {self.format} have {group} tokens")
        return self


class SchedulerConfig(Settings):
    max_rows: Positive = 64
    """Maximum number of running requests."""
    max_batch_tokens: Positive = 512
    """Maximum number of target positions computed per round: decode rows first, then prefill chunks."""
    max_waiting: Positive = 1024
    """Maximum number of waiting requests; further ones are refused."""


class EngineConfig(Settings):
    """Settings of the engine process."""

    model: str = "default"
    """Model directory (config.json, *.safetensors, tokenizer.json), or a model that `magicdec fetch` installs:
    `default`; `default-int4`, the same with matrices of 4 bits; `gemma-3-270m`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto: bfloat16 where the device multiplies it natively, else float32."""
    kernels: Literal["auto", "reference", "cpu", "triton", "flashinfer"] = "auto"
    """Kernels to compute with. cpu: compiled for this processor; triton, flashinfer: for GPUs, the latter with
    FlashInfer's attention; reference: plain torch; auto: the fastest that are available."""
    cuda_graphs: bool = True
    """On GPUs, capture forwards of decoding rows at start-up and replay them. Saves host time; costs some memory, and
    some seconds at start-up."""
    weights: Literal["auto", "dense", "int8", "int4", "fp8"] = "auto"
    """Format of the matrices. auto: as the checkpoint stores them. dense: in `dtype`. int8, fp8: rounded to 8 bits,
    with one scale per output feature. int4: rounded to 4 bits, with a scale and a minimum per group of 32 input
    features; the LM head has int8. Fewer bits than the checkpoint's change the text a little."""
    tensor_parallel_size: Positive = 1
    """Number of ranks: processes that compute the model together, each with its share of weights and KV."""
    collectives: Literal["auto", "shared", "gloo", "nccl", "symmetric"] = "auto"
    """Transport of tensors between ranks; auto: symmetric on CUDA devices of one machine where it works, else NCCL; on
    CPUs shared memory where it works, else gloo. symmetric: NCCL, but sums of up to some megabytes go through memory
    that the GPUs share; an error where that does not work."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a rank may keep the others waiting before it counts as hung."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the ranks may take to start and load."""
    digest_every: Annotated[int, Field(ge=0)] = 0
    """Rounds between comparisons of the tokens, page tables and lengths that the ranks hold; 0: never."""
    max_model_len: Positive | None = None
    """Maximum number of tokens of prompt and output together; None: the context length the model was trained for, or as
    much of it as the KV pool holds."""
    threads: Positive | None = None
    """CPU threads per rank; None: an equal share of the cores that affinity and CPU quotas allow."""
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    target_kv: TargetQuestConfig | None = None
    """KV that the target reads of positions after a prompt; None: all. Anything else is lossy: it changes the text."""
    speculation: SpeculationConfig = SpeculationConfig()
    check_invariants: bool = False
    """Check after every round, not only when idle, that owned pages + free pages = total pages."""

    @property
    def by_drafter(self) -> dict[DrafterName, Self]:
        """This config for each model that drafts (SpeculationConfig.by_drafter)."""
        found = self.speculation.by_drafter(self.cache.page_size)
        return {name: self.model_copy(update={"speculation": each}) for name, each in found.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.speculation.check(self.cache.page_size, self.tensor_parallel_size)
        if self.target_kv is not None:
            if self.cache.seals:
                raise ValueError(f"target_kv: a target reads all of its KV with cache.format {self.cache.format}")
            self.target_kv.check_target(self.cache.page_size)
            for name, each in self.by_drafter.items():
                if (kv := each.speculation.kv).counts_votes:
                    raise ValueError(
                        f"{self.speculation.kv_setting(name)}: {kv.policy} chooses by what the target reads, which is "
                        "all KV only without target_kv"
                    )
        rows, tokens = self.scheduler.max_rows, self.scheduler.max_batch_tokens
        if tokens <= rows:
            raise ValueError(
                f"scheduler.max_batch_tokens ({tokens}) must be more than scheduler.max_rows ({rows}), "
                "or a full batch would leave nothing for prefill"
            )
        return self


class ServerConfig(Settings):
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: a free one that the system chooses, which is printed."""
    served_model_name: Annotated[list[Name], BeforeValidator(_listed)] = Field(default=[])
    """Model ids that clients may use, of which the first stands in metrics; none: the model directory's name."""
    special_tokens_in_content: bool = False
    """Encode the names of special tokens in chat messages as those tokens. Whoever writes part of a message, such as a
    document in it, can then end it and begin another."""
    generation_config: Literal["model", "none"] = "model"
    """Defaults of sampling parameters. model: those of the model's generation_config.json, where it names them; none:
    those of the OpenAI API."""
    tool_format: Literal["auto", "hermes", "llama_json", "mistral", "harmony", "qwen_xml", "generic_json"] = "auto"
    """How the model writes calls of functions. auto: harmony if `thinking` is, and not if that is another format; else
    as its chat template says, else generic_json."""
    thinking: Literal["auto", "think", "harmony", "none"] = "auto"
    """Text that is not content but thinking. think: that between <think> and </think>, at the beginning of an answer;
    harmony: that in other channels than `final`; auto: harmony if `tool_format` is, and not if that is another format;
    else as the chat template says, else none; none: none."""
    clamp_max_tokens: bool = False
    """Whether a request for more tokens than there is room for gets as many as there is room for, and the answer says
    so (clamped_max_tokens); else it is refused."""
    max_body_mb: Annotated[float, Field(gt=0)] = 8.0
    """Maximum size of a request body in MiB; larger ones are refused with 413."""
    engine_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that a round may take before the engine counts as hung."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the engine may take to load."""
    restart: bool = False
    """Restart the engine when it dies, instead of exiting with it."""
    restart_settled_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that an engine must live; one that dies sooner counts as a failed start. After five failed starts in a
    row, no other is tried."""
    weight_updates: bool = False
    """Serve the routes that pause the engine, change its weights and free its memory. Needs an API key, or the server
    does not start."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests may take to finish after SIGTERM; then they are aborted."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"
    """json: one object per line. Neither format logs the text of prompts or answers."""
    tracing: bool = False
    """Send OpenTelemetry spans of requests, to the endpoint that the OTEL_EXPORTER_OTLP_* variables set."""
    api_keys: list[SecretStr] = Field(default=[])
    """Requests must carry one of these keys, except to /, /health, /ready and /metrics. Without any key, here and in
    the file, all requests are accepted."""
    api_keys_file: str | None = None
    """File of further keys, one per line; read at start-up."""
    cors_origins: list[str] = Field(default=[])
    """Origins whose pages may send requests; "*": all."""
    tls_cert: str | None = None
    """Certificate chain (PEM) for HTTPS."""
    tls_key: str | None = None
    """Private key of the certificate."""
    head_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds within which a connection must send all headers of a request."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after the headers within which the body must arrive."""
    keep_alive_s: Annotated[float, Field(gt=0)] = 90.0
    """Seconds after which an idle connection is closed. A proxy must close its own sooner, or it may send a request on
    a connection that is just being closed."""
    ping_s: Annotated[float, Field(ge=0)] = 15.0
    """Seconds after which a stream without news sends a comment, so that proxies do not take it for idle; 0: never."""
    max_queued_tokens: Positive | None = None
    """Maximum number of prompt tokens of all running and waiting requests; further requests are refused with 503.
    None: unlimited."""
    stored_responses: Annotated[int, Field(ge=0)] = 1000
    """Maximum number of responses of /v1/responses that are kept in memory, for requests that continue them; the oldest
    is dropped first. 0: none."""
    stored_responses_mb: Annotated[float, Field(gt=0)] = 64.0
    """Maximum size of all of them in MiB, conversations included."""
    stored_responses_s: Annotated[float, Field(gt=0)] = 86400.0
    """Seconds for which one is kept."""

    @model_validator(mode="after")
    def _keeps_weights(self) -> Self:
        if self.restart and self.weight_updates:
            raise ValueError(
                "restart and weight_updates exclude each other: a restarted engine would serve the first weights again"
            )
        return self

    @model_validator(mode="after")
    def _reads_channels_or_not(self) -> Self:
        formats = {self.thinking, self.tool_format} - {"auto"}
        if "harmony" in formats and len(formats) > 1:
            raise ValueError(
                f"thinking ({self.thinking}) and tool_format ({self.tool_format}) exclude each other: "
                "harmony has thinking and calls in the same channels, so it is for both or for neither"
            )
        return self


class Config(Settings):
    """Settings of one deployment: the content of one YAML file."""

    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.tensor_parallel_size > 1 and self.server.engine_timeout_s <= self.engine.step_timeout_s:
            raise ValueError(
                f"server.engine_timeout_s ({self.server.engine_timeout_s:g}) must be more than engine.step_timeout_s "
                f"({self.engine.step_timeout_s:g}), or the server would give up before the engine says which rank hangs"
            )
        if (self.server.tls_cert is None) != (self.server.tls_key is None):
            raise ValueError("server.tls_cert and server.tls_key belong together")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, where SafeLoader would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Read `path` (None: built-in defaults) and apply `overrides`, {"engine.cache.page_size": 32, …}, in order.

    An override that changes the file's KV policy keeps its budget (except for policy `all`, which has none) and drops
    all other settings of `speculation.kv`.
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
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: {parent} must be a mapping of settings")
        if parents[-1:] == ["kv"] and leaf == "policy" and value != policy_of(node):
            kept = {key: node[key] for key in node if key == "budget" and value != "all"}
            node.clear()
            node.update(kept)
        node[leaf] = value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """Describe a validation error, one line per fault: `engine.cache.page_size: Input should be greater than 0`."""
    lines = []
    for fault in error.errors():
        # The location of a KV policy's setting contains the policy's tag, which no file contains.
        parts = [str(part) for part in fault["loc"]]
        where = ".".join(part for i, part in enumerate(parts) if i == 0 or parts[i - 1] != "kv")
        message = "unknown setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)
