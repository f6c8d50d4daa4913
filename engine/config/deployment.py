"""Settings of a deployment: frozen, typed, validated once at start. Free of torch.

A config is read from one YAML file (configs/ documents every key), then overridden by command-line flags. Unknown
keys are errors. No environment variable changes behaviour, and nothing changes a config after it was validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, SecretStr, ValidationError, model_validator

from engine.config.settings import Positive, Settings
from engine.config.speculation import SpeculationConfig, policy_of
from engine.logs import LogFormat


class ConfigError(ValueError):
    """A setting is unknown, out of range, or contradicts another; the message names it."""


class CacheConfig(Settings):
    """KV of target and drafts."""

    page_size: Positive = 16
    """KV slots per page."""
    num_pages: Positive | None = None
    """Pages in the target's pool; None: as many as `memory_gb` holds beside what drafts keep."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """KV of each rank: the target's pool, a draft model's, and caches of fixed size. None: 4 on CPUs; on GPUs what is
    left of `gpu_memory_utilization` once the models are there and have run."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The share of each GPU's memory that may be in use, by this and all other processes."""


class SchedulerConfig(Settings):
    max_rows: Positive = 64
    """Most requests running at once."""
    max_batch_tokens: Positive = 512
    """Most target positions computed per round: decode rows first, then prefill chunks."""
    max_waiting: Positive = 1024
    """Requests queued beyond this are refused."""


class EngineConfig(Settings):
    """Everything the engine process needs to know."""

    model: str = "default"
    """A model directory (config.json, *.safetensors, tokenizer.json), or `default`: what `magicdec fetch` installs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    kernels: Literal["auto", "reference", "cpu", "triton", "flashinfer"] = "auto"
    """What computes. cpu: compiled for this processor; triton, flashinfer: on GPUs, the latter with its attention;
    reference: plain torch; auto: the fastest that there is."""
    cuda_graphs: bool = True
    """On GPUs, capture forwards of decoding rows at the start and replay them: less work for the host, for some memory
    and some seconds."""
    weights: Literal["full", "int8"] = "full"
    """Of matrices. full: in `dtype`. int8: rounded to 8 bits, with a scale for each column; so are inputs."""
    tensor_parallel_size: Positive = 1
    """Ranks: processes that compute the model together, each with its share of weights and KV."""
    collectives: Literal["auto", "shared", "gloo", "nccl", "symmetric"] = "auto"
    """What ranks exchange tensors through; auto: NCCL on CUDA devices, else shared memory where it works, else gloo.
    symmetric: NCCL, but small sums through memory that the GPUs of one machine see of each other."""
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
        self.speculation.check(self.cache.page_size, self.tensor_parallel_size)
        rows, tokens = self.scheduler.max_rows, self.scheduler.max_batch_tokens
        if tokens <= rows:
            raise ValueError(
                f"scheduler.max_batch_tokens ({tokens}) must be more than scheduler.max_rows ({rows}), "
                "or a full batch would leave nothing for prefill"
            )
        return self


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
    log_format: LogFormat = "text"
    """json: an object per line. Neither holds text of prompts or answers."""
    tracing: bool = False
    """Send OpenTelemetry spans of requests; where to, the OTEL_EXPORTER_OTLP_* variables say."""
    api_keys: list[SecretStr] = Field(default=[])
    """Requests must carry one of them, but to /, /health, /ready and /metrics. None, here and in the file: all may
    ask."""
    api_keys_file: str | None = None
    """More of them, one per line; read at the start."""
    cors_origins: list[str] = Field(default=[])
    """Origins whose pages may send requests; "*": all."""
    tls_cert: str | None = None
    """Certificate chain (PEM) to serve HTTPS with."""
    tls_key: str | None = None
    head_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """Until a connection has sent all headers of a request."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Until the body is there, from the headers on."""
    max_queued_tokens: Positive | None = None
    """Prompt tokens of all requests that run or wait; what comes beyond is refused with 503. None: any number."""


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
        if (self.server.tls_cert is None) != (self.server.tls_key is None):
            raise ValueError("server.tls_cert and server.tls_key belong together")
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
    """One line per fault: `engine.cache.page_size: Input should be greater than 0`."""
    lines = []
    for fault in error.errors():
        # A setting of a KV policy stands below the policy's tag, which no file contains.
        parts = [str(part) for part in fault["loc"]]
        where = ".".join(part for i, part in enumerate(parts) if i == 0 or parts[i - 1] != "kv")
        message = "unknown setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)
