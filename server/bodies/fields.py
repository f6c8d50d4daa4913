"""Request fields of both completion routes, and their conversion to SamplingParams."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeGuard, TypeVar

import msgspec
from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from engine.messages import Ready
from engine.params import MAX_LOGPROBS, SamplingParams
from models.files.generation_defaults import GenerationDefaults
from server.bodies.strict import WHOLE, Body, NotServed, only
from server.errors import ApiError, draining, from_validation
from server.limits import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_GRAMMAR_CHOICES,
    MAX_INT,
    MAX_LOGIT_BIAS,
    MAX_SALT_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    check_tokens,
)
from server.routes.stream import run_until
from server.service import Service
from server.text.structured import Grammar, ResponseFormat, StructuredOutputs, check_grammar, grammar_of

Model = TypeVar("Model", bound=Body)

_GUIDED = ("json", "regex", "choice", "grammar")
_NO_DEFAULTS = GenerationDefaults()


async def read(request: Request, model: type[Model], empty: bytes = b"") -> Model:
    """Parse the body. empty: what an empty one stands for. Raises ApiError, also if the server begins to drain before
    the whole body has arrived."""
    service: Service = request.app.state.service
    body = await run_until(service.draining.wait(), request.body(), draining())
    try:
        return model.model_validate_json(body or empty)
    except ValidationError as error:
        raise from_validation(error) from None


def _stop(value: Any) -> list[str] | None:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "expected a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"expected at most {MAX_STOPS} strings")
    if not all(stops):
        raise PydanticCustomError("stop", "a stop string cannot be empty")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop", f"expected at most {MAX_STOP_CHARS} characters in a stop string")
    return stops


def are_token_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and set(map(type, value)) <= {int}


# Lists and objects of any length have one validator each: pydantic's own would report a fault per entry.


def _stop_token_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not are_token_ids(value):
        raise PydanticCustomError("token_ids", "expected a list of token ids")
    if len(value) > MAX_STOP_TOKENS:
        raise PydanticCustomError("token_ids", f"expected at most {MAX_STOP_TOKENS} token ids")
    return value


def _allowed_token_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not are_token_ids(value) or not value:
        raise PydanticCustomError("token_ids", "expected a list of token ids")
    different = list(dict.fromkeys(value))
    if len(different) > MAX_ALLOWED_TOKENS:
        raise PydanticCustomError("token_ids", f"expected at most {MAX_ALLOWED_TOKENS} different token ids")
    return different


def _bad_words(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise PydanticCustomError("bad_words", "expected a list of strings that are not empty")
    if len(value) > MAX_BAD_WORDS or any(len(word) > MAX_STOP_CHARS for word in value):
        raise PydanticCustomError(
            "bad_words", f"expected at most {MAX_BAD_WORDS} words of at most {MAX_STOP_CHARS} characters"
        )
    return value


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "expected an object from token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("logit_bias", f"expected at most {MAX_LOGIT_BIAS} tokens")
    if not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise PydanticCustomError("logit_bias", 'expected token ids like "42" as keys')
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise PydanticCustomError("logit_bias", "expected numbers from -100 to 100")
    return {int(key): bias for key, bias in value.items()}


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _truncation(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("truncation", "expected a number of tokens, or -1 for as many as fit")
    return value


def _request_id(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", value):
        raise PydanticCustomError("request_id", "expected 1 to 128 letters, digits and . _ : -")
    return value


# Each: the parsed type, then the type that clients may send.
Stops = Annotated[list[str] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
StopTokens = Annotated[list[int] | None, PlainValidator(_stop_token_ids, json_schema_input_type=list[int] | None)]
LogitBias = Annotated[
    dict[int, float] | None, PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
]
AllowedTokens = Annotated[list[int] | None, PlainValidator(_allowed_token_ids, json_schema_input_type=list[int] | None)]
BadWords = Annotated[list[str] | None, PlainValidator(_bad_words, json_schema_input_type=list[str] | None)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SpeculationFields(Body):
    enabled: bool | None = None
    max_draft_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    report: bool | None = None


def _checked(grammar: Grammar | None) -> Grammar | None:
    if grammar is not None:
        check_grammar(grammar)
    return grammar


class CompletionFields(Body):
    """Fields of both routes. SamplingParams defines the ranges of sampling parameters."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    best_of: Annotated[int, WHOLE] | None = None
    min_tokens: Annotated[int, WHOLE] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    min_p: float | None = None
    seed: Annotated[int, WHOLE] | None = None
    stop: Stops = None
    stop_token_ids: StopTokens = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), AfterValidator(_truncation), WHOLE] | None = None
    request_id: Annotated[str | None, AfterValidator(_request_id)] = None
    speculation: SpeculationFields | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    """Former names of the fields of structured_outputs."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_GRAMMAR_CHOICES)] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    """Whether the answer contains the ids of its tokens, and of the prompt's."""
    allowed_token_ids: AllowedTokens = None
    bad_words: BadWords = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT), WHOLE] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    # Fields of which any value is right to have no effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None

    # Known fields, served only with values that change nothing.
    use_beam_search: Annotated[Any, AfterValidator(only(False))] = None
    length_penalty: Annotated[Any, AfterValidator(only(1.0, 1))] = None
    spaces_between_special_tokens: Annotated[Any, AfterValidator(only(True))] = None
    return_tokens_as_token_ids: Annotated[Any, AfterValidator(only(False))] = None
    guided_decoding_backend: NotServed = None
    guided_whitespace_pattern: NotServed = None
    kv_transfer_params: Annotated[Any, AfterValidator(only({}))] = None
    logits_processors: Annotated[Any, AfterValidator(only([]))] = None
    structural_tag: NotServed = None
    vllm_xargs: Annotated[Any, AfterValidator(only({}))] = None

    def check(self) -> None:
        """Check combinations of fields. Raises ApiError."""
        if self.best_of is not None and self.best_of != self.choices:
            raise ApiError("best_of: served only when equal to n", code="not_served", param="best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError("prompt_logprobs: not with stream", param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options: only with stream", param="stream_options")

    @property
    def structure(self) -> StructuredOutputs | None:
        """Constraint on the output, by whatever name. Raises ApiError."""
        guided = {name: value for name in _GUIDED if (value := getattr(self, f"guided_{name}")) is not None}
        if not guided:
            return self.structured_outputs
        first = f"guided_{next(iter(guided))}"
        if self.structured_outputs is not None or len(guided) > 1:
            raise ApiError(f"{first}: give either this or other structured outputs", param=first)
        return StructuredOutputs.model_validate(guided)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_report(self) -> bool:
        return bool(self.speculation and self.speculation.report)

    @property
    def usage_at_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    async def constraints(
        self,
        service: Service,
        whole: Callable[[Grammar | None], Grammar | None] = _checked,
        *,
        is_bound: bool = False,
    ) -> dict[str, Any]:
        """Return the sampling parameters that need a tokenizer or are slow: `grammar`, `bad_words`. Raises ApiError.

        whole: makes the grammar of whole outputs from that of their content, and validates it; takes some 100 ms. It is
        called where the request has a grammar, or `is_bound`: the output has one for other reasons.
        """
        found: dict[str, Any] = {}
        if is_bound or self.response_format is not None or self.structure is not None:
            asked = await asyncio.to_thread(self._grammar, service.tokenizer.names_in_grammars, whole)
            if asked is not None:
                found["grammar"] = asked.text
        if self.bad_words:
            # Each word at the start of a text, and after a space.
            texts = [text for word in self.bad_words for text in (word, f" {word.lstrip()}")]
            spelt = await service.encode(texts, False)
            found["bad_words"] = [list(tokens) for tokens in dict.fromkeys(map(tuple, spelt)) if tokens]
        return found

    def _grammar(self, names: Collection[str], whole: Callable[[Grammar | None], Grammar | None]) -> Grammar | None:
        structure = self.structure
        try:
            return whole(grammar_of(self.response_format, structure, names, self.bad_words or ()))
        except ApiError as error:
            given = [name for name in _GUIDED if getattr(self, f"guided_{name}") is not None]
            raise error.renamed({"structured_outputs": f"guided_{given[0]}"} if given else {}) from None

    def sampling(
        self,
        ready: Ready,
        *,
        max_tokens: int,
        logprobs: int | None,
        defaults: GenerationDefaults = _NO_DEFAULTS,
        constraints: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """Convert to SamplingParams. defaults: of fields that are left open. constraints: result of `constraints`.

        Raises ApiError: a value out of range, or a token that the model does not have.
        """
        wanted = {
            **(constraints or {}),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "allowed_token_ids": self.allowed_token_ids,
            "prompt_logprobs": self.prompt_logprobs,
            "top_k": None if self.top_k is None else min(max(self.top_k, 0), MAX_INT),
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
            "max_draft_tokens": self._max_draft_tokens(),
        }
        same_name = (
            "min_tokens temperature top_p min_p presence_penalty frequency_penalty repetition_penalty"
            " logit_bias stop stop_token_ids ignore_eos include_stop_str_in_output skip_special_tokens"
        )
        wanted |= {name: getattr(self, name) for name in same_name.split()}
        given = {name: value for name, value in wanted.items() if value is not None}
        try:
            params = msgspec.convert({**defaults.given(), **given}, SamplingParams)
        except msgspec.ValidationError as error:
            raise _out_of_range(error) from None
        if params.min_tokens > max_tokens:
            raise ApiError(f"min_tokens: more than max_tokens ({max_tokens})", param="min_tokens")
        for param in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            check_tokens(param, getattr(params, param), ready.vocab_size)
        return params

    def _max_draft_tokens(self) -> int | None:
        if self.speculation is None:
            return None
        return 0 if self.speculation.enabled is False else self.speculation.max_draft_tokens


def choice_seed(seed: int, index: int) -> int:
    """Return the seed (int64) of choice `index` of several from one prompt; the first has the request's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _out_of_range(error: msgspec.ValidationError) -> ApiError:
    """Convert a msgspec error, such as: Expected `float` <= 100.0 - at `$.temperature`."""
    text, _, path = str(error).partition(" - at ")
    match = re.search(r"\$\.(\w+)", path)
    param = match[1] if match else None
    message = text[:1].lower() + text[1:].replace("`", "")
    return ApiError(f"{param}: {message}" if param else message, param=param)
