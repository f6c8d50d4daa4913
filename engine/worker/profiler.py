"""The start-up profile: times of plain steps, draft steps and verify passes of this engine on this machine.

It runs rounds over rows whose KV is zeros: times depend on shapes, not on values, except for the experts that tokens
choose, so tokens are drawn from the whole vocabulary. Saved in the user's cache folder under a key of everything that
times depend on, so that only the first start spends time on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample, StepTimes
from engine.params import SamplingParams
from engine.plan import DrafterName, PageDelta, RoundPlan, RoundResult, RowStart, RowWork
from engine.ranks.protocol import WeightBytes
from engine.worker.resolve import Resolved
from models.config import ModelConfig, RopeConfig, read_config
from models.default import resolve_model, user_cache

log = logging.getLogger(__name__)

_VERSION = 12
_SECONDS = 8.0
"""Approximate limit of a profile's time."""
_SHORT, _LONG_TOKENS = 64, 8192
"""Tokens per row, and of all rows together (for many rows more); times are assumed to be linear between them."""
_ROWS = (1, 4, 16, 64, 256)
_GAMMAS = (0, 1, 3)
_REPEATS = 2
_SLOW_S = 0.2
"""Time above which a pass is not repeated."""
_ROOM = 128
"""Tokens by which a row may grow while it is measured."""
_DRAWN = 4096
"""Number of tokens that are drawn for rows and their drafts."""
_SHARED_STRETCHES = 4
"""Smallest number of stretches (Ops.shared_stretch) that rows with shared pages share, where their length allows it."""


class Profiler:
    """Profiler of rounds of an engine without requests."""

    def __init__(
        self,
        run: Callable[[RoundPlan], RoundResult],
        config: EngineConfig,
        num_pages: int,
        max_model_len: int,
        shared_stretch: int = 0,
        sliding_pages: int = 0,
        *,
        vocab_size: int = 1,
    ):
        """run: a round on all ranks. config, num_pages, max_model_len: the engine's. shared_stretch: see Ops.
        sliding_pages: number of pages of the sliding pool. vocab_size: the model's."""
        self.run = run
        self.sliding_pages = sliding_pages
        self._tokens = random.Random(0).choices(range(vocab_size), k=_DRAWN)
        self._stretch = shared_stretch
        self._max_model_drafts = config.speculation.max_model_drafts
        self._page, self._holds_exact = config.cache.page_size, config.cache.seals
        self._max_rows = config.scheduler.max_rows
        self._max_model_len = max_model_len
        self._room = min(_ROOM, max(3, max_model_len // 2))
        self._num_pages = num_pages
        self._pages = min(num_pages, _LONG_TOKENS // self._page + 1)
        self._cleared = 0

    def measure(
        self,
        rows: int,
        context: int,
        gamma: int,
        repeats: int = _REPEATS,
        *,
        sharing: bool = False,
        drafter: DrafterName | None = None,
    ) -> StepSample:
        """Measure `rows` rows of `context` tokens each, all with gamma drafts; the fastest of `repeats`.

        A model makes the drafts, unless that is more than it ever makes. sharing: the rows list the same pages, as far
        as attention can read them once for all (`shareable`). Otherwise they share nothing. drafter: see RoundPlan.
        Raises ValueError for more rows or tokens than the engine supports.
        """
        if not 1 <= rows <= self._max_rows:
            raise ValueError(f"{rows} rows, but the engine has {self._max_rows}")
        if not 1 <= context <= self.max_context:
            raise ValueError(f"a context of {context}, but there is room for 1 to {self.max_context} tokens")
        if gamma > self.max_draft_tokens:
            raise ValueError(f"{gamma} drafts, but there is room for {self.max_draft_tokens}")
        from_text = gamma > self._max_model_drafts
        work = [
            RowWork(row, context, 1, gamma, True, proposed=self._drawn(row + 1, gamma) if from_text else [])
            for row in range(rows)
        ]
        shareable = self.shareable(context) if sharing else 0
        starts, pages = self._starts(rows, context, -(-shareable // self._page))
        first = self.run(RoundPlan(0, starts, pages, work, drafter=drafter, clear=self._fresh(rows, context)))
        if first.verify_seconds > _SLOW_S:
            repeats = 1
        # Short rows must not grow, nor rows out of the groups that they hold exact pages for.
        again = [] if self._room == _ROOM and not self._holds_exact else starts
        plan = RoundPlan(0, again, pages if again else [], work, drafter=drafter)
        results = [self.run(plan) for _ in range(repeats)]
        fastest = min(results, key=lambda result: result.draft_seconds + result.verify_seconds)
        shared = (rows - 1) * shareable
        return StepSample(
            rows, context, gamma, fastest.draft_seconds, fastest.verify_seconds, shared, from_text, drafter
        )

    def shareable(self, context: int) -> int:
        """Return the number of tokens of a context that attention can read once for all rows that begin with them: in
        full pages, and in whole stretches."""
        full = context // self._page * self._page
        return full // self._stretch * self._stretch if self._stretch else 0

    @property
    def shared_context(self) -> int:
        """Shortest context at which rows with shared pages are measured, if the engine's length allows it."""
        return min(self.max_context, _SHARED_STRETCHES * math.lcm(self._stretch, self._page))

    @property
    def max_context(self) -> int:
        """Largest number of tokens of a measured row."""
        return self._max_model_len - self._room

    @property
    def max_draft_tokens(self) -> int:
        """Largest number of drafts of a measured row; the pending token and one more need room too."""
        return self._room - 2

    def fill(self) -> None:
        """Run a round that first touches all memory of the pools."""
        context = min(_SHORT, self.max_context)
        work = [RowWork(0, context, 1, 0, True)]
        self.run(RoundPlan(0, *self._starts(1, context, 0), work, clear=list(range(self._num_pages))))

    def _width(self, context: int) -> int:
        return -(-(context + self._room) // self._page)

    def _fresh(self, rows: int, context: int) -> list[int]:
        """Return the pages that are about to be read for the first time, and perhaps some more, to be cleared: reads of
        memory that was never written are too fast."""
        needed = min(self._pages, rows * self._width(context))
        fresh = list(range(self._cleared, needed))
        self._cleared = max(self._cleared, needed)
        return fresh

    def _starts(self, rows: int, context: int, shared: int) -> tuple[list[RowStart], list[PageDelta]]:
        starts, pages = blank_rows(rows, context, self._width(context), self._pages, shared, self.sliding_pages)
        for start in starts:
            start.tokens[-1] = self._drawn(start.row, 1)[0]
        return starts, pages

    def _drawn(self, first: int, count: int) -> list[int]:
        """Return `count` tokens of the vocabulary, drawn with a fixed seed, from number `first` on. With tokens of one
        id, all rows would choose the same experts."""
        return [self._tokens[number % _DRAWN] for number in range(first, first + count)]


def blank_rows(
    rows: int, context: int, width: int, pages: int, shared: int = 0, sliding: int = 0
) -> tuple[list[RowStart], list[PageDelta]]:
    """Build rows of a prompt of `context` computed tokens and a pending token, all 0, over `width` pages each.

    They list the first `pages` of the pool in cyclic order, the first `shared` of them in every row. With none shared,
    no two of up to `pages` rows begin with the same page, so attention that looks for shared pages finds none. sliding:
    number of pages of the sliding pool, which rows list in cyclic order too; 0: there is none.
    """
    params = SamplingParams(temperature=0.0)
    starts = [RowStart(row, [0] * (context + 1), context, params, [], context) for row in range(rows)]
    own = width - shared
    period = pages // math.gcd(own, pages)  # rows after which lists would begin with the same pages again
    firsts = [shared + row * own + row // period for row in range(rows)]
    lists = [[*range(shared), *range(first, first + own)] for first in firsts]
    deltas = [PageDelta(row, 0, [page % pages for page in listed]) for row, listed in enumerate(lists)]
    if sliding:
        deltas += [PageDelta(delta.row, 0, [page % sliding for page in delta.pages], True) for delta in deltas]
    return starts, deltas


def profile(profiler: Profiler, config: EngineConfig) -> list[StepSample]:
    """Measure a few informative batches, within the time limit: a short and a long context for each number of rows, and
    rows that share pages where attention reads these once."""
    max_gamma = min(config.speculation.max_draft_tokens, profiler.max_draft_tokens)
    models = min(config.speculation.max_model_drafts, max_gamma)
    gammas = sorted({gamma for gamma in (*_GAMMAS, models) if gamma < max_gamma} | {max_gamma})
    some = max([gamma for gamma in gammas if gamma <= min(models, _GAMMAS[-1])])  # of the second of two models
    longest = profiler.max_context
    began = time.perf_counter()
    samples: list[StepSample] = []
    last = 0.0
    for rows in sorted({rows for rows in _ROWS if rows < config.scheduler.max_rows} | {config.scheduler.max_rows}):
        spent = time.perf_counter() - began
        if len({sample.rows for sample in samples}) > 1 and spent + 3 * last > _SECONDS:
            break
        # Of many rows the long context is still longer than the short one: the difference gives the cost of a token.
        contexts = sorted({min(each, longest) for each in (_SHORT, max(_LONG_TOKENS // rows, 2 * _SHORT))})
        samples += [profiler.measure(rows, context, gamma) for context in contexts for gamma in gammas]
        if len(config.by_drafter) > 1:
            samples += [profiler.measure(rows, context, some, drafter="self") for context in contexts]
        last = time.perf_counter() - began - spent
        context = max(contexts[-1], profiler.shared_context)
        if rows > 1 and len(contexts) > 1 and profiler.shareable(context) and spent + 2 * last <= _SECONDS:
            samples += [profiler.measure(rows, context, gamma, sharing=True) for gamma in gammas]
    log.info("profiled %d batches in %.1f s", len(samples), time.perf_counter() - began)
    return samples


# -- the cache ------------------------------------------------------------------------------------------------------


def profile_key(config: EngineConfig, sizes: Resolved, formats: Mapping[str, str], weight_bytes: WeightBytes) -> str:
    """Return a hash of everything that the measured times depend on, and of nothing else.

    formats: of loaded matrices (EngineStats.weights), which the settings `auto` and `same` leave open. weight_bytes: of
    rank 0.
    """
    speculation = config.speculation
    parts: list[object] = [
        _VERSION,
        torch.__version__,
        str(sizes.dtype),
        sizes.ops.name,
        sizes.shared_stretch,
        sorted(formats.items()),
        (weight_bytes.target, weight_bytes.draft, weight_bytes.own_drafts),
        min(sizes.max_model_len, _LONG_TOKENS + _ROOM),
    ]
    parts += [config.tensor_parallel_size, config.collectives, config.scheduler.max_rows]
    parts += [config.cache.format, config.cache.page_size]
    # Left out: settings that change no measured time. Rows are measured greedily, with the profile's own gammas.
    without: dict[str, bool | set[str]] = {
        "drafter": True,
        "gamma": True,
        "model": True,
        "store": True,
        "verification": True,
        "weights": True,
        "kv": {"sink", "latest"},
        "self_kv": {"sink", "latest"},
    }
    parts += [speculation.source, speculation.model_dump_json(exclude=without), _work(sizes.shape)]
    if speculation.draft_model is not None:  # its name does not identify it: another model can take its place
        parts.append(_work(read_config(resolve_model(speculation.draft_model))))
    if (target := config.target_kv) is not None:  # the file's name says nothing about which heads stream
        parts.append((target.model_dump_json(exclude={"heads"}), target.heads is not None))
    if sizes.device.type == "cuda":
        parts += [torch.cuda.get_device_name(), config.cuda_graphs]
    else:
        parts += [_cpu_name(), os.cpu_count(), sizes.threads]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _work(shape: ModelConfig) -> ModelConfig:
    """Return the config without fields that change the results of a forward but not its work."""
    return replace(
        shape,
        max_position_embeddings=0,
        rms_norm_eps=0.0,
        rope=RopeConfig(),
        sliding_rope=None,
        bos_token_id=None,
        eos_token_ids=(),
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def _path(key: str) -> Path:
    return user_cache() / "profiles" / f"{key}.json"


def load_profile(key: str) -> list[StepSample] | None:
    """Load the profile saved under this key; None without a usable one."""
    try:
        samples = msgspec.json.decode(_path(key).read_bytes(), type=list[StepSample])
        StepTimes(samples, lambda context, budget: context)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return samples


def save_profile(key: str, samples: Iterable[StepSample]) -> None:
    """Save a profile for the next start. A failure to save it is no error."""
    try:
        file = _path(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(msgspec.json.encode(list(samples)))
        os.replace(part.name, file)
    except OSError as error:
        log.warning("the profile cannot be saved: %s", error)
