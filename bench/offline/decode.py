"""Measure offline decode speed, with several values of gamma and KV policies interleaved in one run.

All requests are prefilled first and not timed. Then the same rows are decoded in short turns, a few rounds with each
value of gamma, repeatedly, so that machine noise and the growing context affect all values alike. The comparison is
fair because speculation does not change the tokens.

Each drafter, KV policy and KV format has its own engine with the same prompts, and turns alternate between the engines.
A policy's rounds therefore include the cost of its own draft cache and of no other. On one rank the engines share the
target's weights. Plain rounds are measured once for each KV format, as the baseline of all policies.

Temperatures follow one another. Where there are several, engines keep prefixes, so that prompts are computed once.

With prompts that begin with the same tokens, engines with the prefix cache, whose rows share the pages of those tokens,
alternate with engines without it, whose rows have pages of their own. Each kind has its own plain rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from bench.offline.interleave import Contender, Gamma, RoundMeasurements, run_turns, scheduler_for_batch
from engine.config.deployment import EngineConfig
from engine.messages import EngineStats
from engine.scheduler.stats import acceptance_rate
from engine.worker.loading import load_target
from engine.worker.resolve import threads_per_rank
from kernels.kv.kv_bits import KV_BITS
from models.config import read_config
from models.default import resolve_model
from planner.cost_model import speedup


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Result of one (batch, context, gamma). Times are medians over rounds, in milliseconds; other values are means.

    shared: number of tokens that all prompts begin with. prefix: whether rows share the pages of these tokens.
    kv_format: of the target's pool. temperature: of sampling. drafter: see SpeculationConfig. from_text: share of the
    accepted tokens that were found in the text. tokens_per_second: for the whole batch, mean tokens per round over the
    typical round time (Rounds.typical_s). gamma: mean over the rounds. t_target_ms: a plain round of the same run, if
    measured. t_draft_ms: one draft step; None with `auto`, or if no model drafts. t_verify_ms: the target pass, which
    for gamma = 0 is the plain step. kv_bytes_per_token: KV bytes read per output token, drafts included; shared pages
    count once. bytes_per_second: weight and KV bytes that a round has to read, over its time. speedup: measured, over
    plain rounds of engines with the same `prefix` and KV format. predicted: the cost model's speed-up
    (planner.cost_model.speedup) from the acceptance and the three times measured here. weights, draft_weights: formats
    that the target and drafts multiply by.
    """

    batch: int
    context: int
    shared: int
    prefix: bool
    speculation: Gamma
    gamma: float
    policy: str
    budget: int
    tokens_per_second: float
    acceptance: float | None
    t_target_ms: float | None
    t_draft_ms: float | None
    t_verify_ms: float
    t_host_ms: float
    kv_bytes_per_token: float
    bytes_per_second: float
    speedup: float | None
    predicted: float | None
    rounds: int
    mean_context: float
    weights: str = "dense"
    draft_weights: str = "dense"
    kv_format: str = "dense"
    temperature: float = 0.0
    drafter: str = "self"
    from_text: float = 0.0


def measure(
    configs: Sequence[EngineConfig],
    prompts: Sequence[Sequence[int]],
    gammas: Sequence[Gamma],
    *,
    new_tokens: int,
    history: int = 0,
    temperatures: Sequence[float] = (0.0,),
    shared: int = 0,
) -> list[DecodeResult]:
    """Decode `new_tokens` per row at each of `temperatures` with each of `gammas` and each of `configs`.

    configs: differ only in their speculation and their cache. If `auto` is among the gammas, their own gamma must
    be `auto`, and their gamma_max bounds it. prompts: one per row, all of one length. history: tokens per row that
    `auto` learns from before it is timed. shared: number of tokens that all prompts begin with. Raises BenchError if
    prompt and output do not fit the model.
    """
    config, batch = configs[0], len(prompts)
    ranks = config.tensor_parallel_size
    loaded = next((each for each in configs if "self" in each.by_drafter), config)  # with the matrices of drafts
    target = load_target(loaded, progress=False) if len(configs) > 1 and ranks == 1 else None
    threads = threads_per_rank(config)  # before an engine changes the count
    auto = max(config.speculation.max_draft_tokens for config in configs)
    max_gamma = max(auto if gamma == "auto" else gamma for gamma in gammas)
    scheduler = scheduler_for_batch(config.scheduler, batch, max_gamma)
    history = history if "auto" in gammas else 0
    contenders: list[Contender] = []
    with contextlib.ExitStack() as stack:
        for described in configs:
            settings = described.model_copy(update={"scheduler": scheduler, "threads": threads})
            contender = Contender(settings, target, max_gamma, "auto" in gammas)
            stack.callback(contender.engine.close)
            contenders.append(contender)
        drafting = [gamma for gamma in gammas if gamma]
        baselines: dict[tuple[str, bool], Contender] = {}
        for contender in contenders:
            baselines.setdefault(_kind(contender), contender)
        turns = [
            (contender, gamma)
            for contender in contenders
            for gamma in (gammas if contender in baselines.values() else drafting)
        ]
        results: list[DecodeResult] = []
        for temperature in temperatures:
            for contender in contenders:
                contender.prefill(prompts, len(gammas), max_gamma, new_tokens, history, temperature)
            run_turns(turns, new_tokens * batch, history)
            for contender, gamma in turns:
                plain = baselines[_kind(contender)].rounds.get(0)
                results.append(_result(gamma, contender, plain, prompts, shared, temperature))
        return results


def _kind(contender: Contender) -> tuple[str, bool]:
    """Return what plain rounds depend on."""
    return contender.config.cache.format, contender.config.cache.prefix


def _result(
    speculation: Gamma,
    contender: Contender,
    plain: RoundMeasurements | None,
    prompts: Sequence[Sequence[int]],
    shared: int,
    temperature: float,
) -> DecodeResult:
    rounds, engine = contender.rounds[speculation], contender.engine
    policies = [each.speculation.kv for each in contender.config.by_drafter.values()]
    seconds, t_verify = rounds.typical_s, median(rounds.verify)
    gamma = mean(rounds.gammas)
    speed = mean(rounds.tokens) / seconds
    kv_bytes = _kv_bytes(rounds.total, engine.stats().kv_token_bytes, contender.config)
    weights, formats = engine.weight_bytes, engine.stats().weights
    steps = gamma * (1 - rounds.total.text_draft_tokens / max(1, rounds.total.draft_tokens))
    made = max(1, rounds.total.draft_tokens - rounds.total.text_draft_tokens)
    by_model = rounds.total.model_draft_tokens / made
    read_by_drafts = by_model * weights.draft + (1 - by_model) * (weights.own_drafts or weights.target)
    weight_bytes = weights.target + steps * read_by_drafts
    t_target = median(plain.seconds) if plain else None
    alpha = acceptance_rate(rounds.total) if gamma else None
    t_draft = median(rounds.draft) / steps if steps and speculation != "auto" else None
    predicted = None
    only_models = not rounds.total.text_draft_tokens
    if t_target is not None and alpha is not None and t_draft is not None and speculation != "auto" and only_models:
        predicted = speedup(speculation, alpha, t_target, t_draft, t_verify)
    return DecodeResult(
        batch=len(prompts),
        context=len(prompts[0]),
        shared=shared,
        prefix=contender.config.cache.prefix,
        speculation=speculation,
        gamma=gamma,
        policy=engine.stats().policy or "none" if gamma else "none",
        budget=max((kv.budget or 0 for kv in policies), default=0) if gamma else 0,
        tokens_per_second=speed,
        acceptance=alpha,
        t_target_ms=_ms(t_target),
        t_draft_ms=_ms(t_draft),
        t_verify_ms=1e3 * t_verify,
        t_host_ms=1e3 * median(rounds.host),
        kv_bytes_per_token=kv_bytes / rounds.total.generated_tokens,
        bytes_per_second=(weight_bytes + kv_bytes / len(rounds.seconds)) / seconds,
        speedup=speed / (mean(plain.tokens) / plain.typical_s) if plain else None,
        predicted=predicted,
        rounds=len(rounds.seconds),
        mean_context=mean(rounds.contexts),
        weights=formats["target"],
        draft_weights=formats.get("drafts", formats["target"]),
        kv_format=contender.config.cache.format,
        temperature=temperature,
        drafter=contender.config.speculation.source if speculation else "none",
        from_text=rounds.total.text_accepted_tokens / max(1, rounds.total.accepted_tokens),
    )


def _kv_bytes(total: EngineStats, token_bytes: int, config: EngineConfig) -> float:
    """Compute the KV bytes that were read. token_bytes: of a token in the target's pool."""
    head_dim, format = read_config(resolve_model(config.model)).head_dim, config.cache.format
    full, drafts = (KV_BITS[format].token_bytes(head_dim, 1, drafts=drafts) for drafts in (False, True))
    return token_bytes * (total.kv_tokens_read - total.draft_kv_tokens_read * (1 - drafts / full))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def table(results: Sequence[DecodeResult], ceiling: float) -> str:
    """Format results as a text table. ceiling: bytes per second of a sequential read."""
    head = (
        "batch",
        "context",
        "shared",
        "KV",
        "T",
        "drafter",
        "policy",
        "draft",
        "gamma",
        "tok/s",
        "x off",
        "x model",
        "accept",
        "of text",
        "T_T ms",
        "T_D ms",
        "T_V ms",
        "host ms",
        "KV MB/tok",
        "GB/s",
        "of read",
    )
    lines = ["".join(f"{name:>11}" for name in head)]
    for result in results:
        cells = (
            str(result.batch),
            str(result.context),
            str(result.shared) if result.prefix and result.shared else "-",
            result.kv_format,
            f"{result.temperature:g}",
            result.drafter,
            result.policy,
            str(result.speculation or "off"),
            f"{result.gamma:.2f}",
            f"{result.tokens_per_second:.1f}",
            _cell(result.speedup, 2),
            _cell(result.predicted, 2),
            _cell(result.acceptance, 3),
            f"{100 * result.from_text:.0f} %",
            _cell(result.t_target_ms, 1),
            _cell(result.t_draft_ms, 1),
            f"{result.t_verify_ms:.1f}",
            f"{result.t_host_ms:.2f}",
            f"{result.kv_bytes_per_token / 1e6:.1f}",
            f"{result.bytes_per_second / 1e9:.1f}",
            f"{100 * result.bytes_per_second / ceiling:.0f} %",
        )
        lines.append("".join(f"{cell:>11}" for cell in cells))
    lines += comparison(results)
    lines.append(f"weights: {results[0].weights}, drafts {results[0].draft_weights}")
    lines.append("x model: the cost model's speed-up, Ω·T_T / (γ·T_D + T_V), from the times and acceptance of this run")
    lines.append(f"sequential read on this device: {ceiling / 1e9:.1f} GB/s")
    return "\n".join(lines)


def comparison(results: Sequence[DecodeResult]) -> list[str]:
    """Describe what shared pages bring: a line for each (batch, context, policy, draft) measured with and without."""

    def place(result: DecodeResult) -> tuple[int, int, str, float, str, str, Gamma]:
        where = result.batch, result.context, result.kv_format, result.temperature
        return *where, result.drafter, result.policy, result.speculation

    own = {place(result): result for result in results if not result.prefix}
    lines = []
    for once in results:
        each = own.get(place(once)) if once.prefix else None
        if each is None:
            continue
        lines.append(
            f"{once.batch} rows of {once.context} tokens, the first {once.shared} in common, {once.policy}, draft "
            f"{once.speculation or 'off'}: "
            f"KV per token {once.kv_bytes_per_token / 1e6:.1f} MB counted once, {each.kv_bytes_per_token / 1e6:.1f} "
            f"for each row (x {once.kv_bytes_per_token / each.kv_bytes_per_token:.2f}); tokens/s "
            f"{once.tokens_per_second:.1f} with shared pages, {each.tokens_per_second:.1f} without "
            f"(x {once.tokens_per_second / each.tokens_per_second:.2f})"
        )
    return lines


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
