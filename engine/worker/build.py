"""Putting a drafter together: model, pool, view, attention and sampler, as the settings say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs, row_counts
from engine.batch.rows import Rows
from engine.batch.runner import Runner
from engine.config.deployment import EngineConfig
from engine.config.speculation import KVConfig, SnapKVConfig, SpeculationConfig, TopKConfig, WindowConfig
from engine.kv.draft_spec import footprint
from engine.kv.policies import Dense, View, budget_policies, make_policy, ring_table
from engine.sampling.grammar import Grammars
from engine.sampling.rejection import Proposals, RejectionSampler
from engine.sampling.sampler import Sampler
from engine.speculation.draft_cache import DraftCache
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.drafters import Drafter, NoDrafter, SelfDrafter
from engine.speculation.model_drafter import ModelDrafter, SharedDrafts
from kernels.attention.base import AttentionBackend
from kernels.attention.relative import RelativeAttention
from kernels.attention.topk import TopKAttention
from kernels.kv_cache import KVPool
from kernels.ops import Ops
from models.default import resolve_model
from models.llama import Llama
from models.loader import load_model
from parallel.group import Group
from parallel.sampling import VocabShard


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A separate draft model, as this rank sees it: the ranks that share it, and its shard of it. Both are None on a
    rank that has no part in it."""

    group: Group | None = None
    model: Llama | None = None


def make_target(config: EngineConfig, model: Llama, rows: Rows, num_pages: int) -> Runner:
    """The target over a pool of its own."""
    pool = model.make_pool(num_pages, rows.page_size)
    queries = {gamma + 1 for gamma in _gammas(config.speculation)}  # a plain step, and passes over drafts
    graphs = _graphs(config, model, pool, queries, rows.page_table.shape[1])
    return Runner(model, pool, _exact(model, rows.page_size), dense(rows), graphs)


def _graphs(
    config: EngineConfig, model: Llama, pool: KVPool, queries: Iterable[int], width: int
) -> ForwardGraphs | None:
    """See ForwardGraphs; None where there are none."""
    if model.ops.graphs is None or not config.cuda_graphs:
        return None
    rows = row_counts(config.scheduler.max_rows)
    return ForwardGraphs(model, pool, model.ops.graphs, rows=rows, queries=queries, width=width)


def _captured(config: EngineConfig, runner: Runner, sampler: Sampler, width: int, first: int = 1) -> Runner:
    """The runner with graphs of what drafts do, where there are graphs: step by step, but for one that has some
    already, and all steps together.

    sampler: of whoever drafts. width: most pages that a row's list has. first: queries of a row in the first step, at
    most.
    """
    graphs, ops = runner.graphs or _graphs(config, runner.model, runner.pool, {1, first}, width), runner.model.ops
    if graphs is None or ops.graphs is None:
        return runner
    rows, gammas = row_counts(config.scheduler.max_rows), _gammas(config.speculation) - {0}
    drafts = DraftGraphs(
        runner.model, runner.pool, ops.graphs, sampler, rows=rows, gammas=gammas, first=first, width=width
    )
    return replace(runner, graphs=graphs, drafts=drafts)


def _gammas(settings: SpeculationConfig) -> set[int]:
    """How many drafts rounds have: of fixed gamma fewer only where a request ends."""
    return set(range(settings.most_drafts + 1)) if settings.gamma == "auto" else {0, settings.most_drafts}


def drafting_model(config: EngineConfig, target: Llama, draft: DraftModel) -> Llama | None:
    """Whose weights a draft step of this rank reads, if that is not the target: the draft model, or a rounded twin."""
    settings = config.speculation
    if settings.most_drafts == 0 or settings.drafter == "model":
        return draft.model
    return target.rounded() if _rounded(config, target) and config.weights != "int8" else None


def _rounded(config: EngineConfig, target: Llama) -> bool:
    """Whether drafts are made with matrices of 8 bits."""
    wanted = config.speculation.weights
    return wanted == "int8" or (wanted == "auto" and target.ops.kind == "cpu")


def make_drafter(
    config: EngineConfig, target: Runner, rows: Rows, sampler: Sampler, group: Group, draft: DraftModel
) -> tuple[Runner, Drafter]:
    """The drafter that `config.speculation` describes, and the target as it must run beside it.

    rows: of this rank. sampler: the target's. group: all ranks. draft: the draft model, if there is one.
    """
    settings = config.speculation
    if settings.most_drafts == 0:
        return target, NoDrafter()
    if settings.drafter == "model":
        drafter = _model_drafter(config, rows, target.pool.num_pages, sampler, draft)
        shared = draft.group is None or draft.group.size < group.size
        return target, SharedDrafts(drafter, group) if shared else drafter or NoDrafter()
    model = drafting_model(config, target.model, draft) or target.model
    if isinstance(settings.kv, SnapKVConfig):
        cache = DraftCache(settings, target.model, target.pool, rows, target.attention)
        runner = Runner(model, cache.pool, _exact(model, rows.page_size), cache.view)
        runner = _captured(config, runner, sampler, _width(settings.kv, rows))
        return replace(target, attention=cache.attention), SelfDrafter(runner, sampler, cache)
    view = View(make_policy(settings.kv, rows.page_size), rows.page_table)
    attention = make_attention(settings.kv, model, rows.page_size)
    runner = Runner(model, target.pool, attention, view)
    if _is_exact(settings.kv):
        if model is target.model:
            runner = replace(runner, graphs=target.graphs)
        runner = _captured(config, runner, sampler, _width(settings.kv, rows))
    return target, SelfDrafter(runner, sampler, views=_views(config, rows.page_table))


def make_sampler(
    config: EngineConfig, rows: Rows, vocab: VocabShard, ops: Ops, grammars: Grammars | None = None
) -> Sampler:
    """The target's."""
    if config.speculation.verification == "rejection" and config.speculation.most_drafts:
        proposals = Proposals(len(rows.tokens), config.speculation.most_drafts)
        return RejectionSampler(rows, vocab, proposals, ops, grammars)
    return Sampler(rows, vocab, ops, grammars)


def _model_drafter(
    config: EngineConfig, rows: Rows, num_pages: int, sampler: Sampler, draft: DraftModel
) -> Drafter | None:
    """None on a rank that has no part in the draft model."""
    model, group, settings = draft.model, draft.group, config.speculation
    if model is None or group is None:
        return None
    page, width = rows.page_size, _width(settings.kv, rows)
    block = config.scheduler.max_batch_tokens
    row_block = block
    cache, views = None, {}
    own = sampler.twin(VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group))
    if isinstance(settings.kv, WindowConfig):
        kept = footprint(settings, page)  # what a window reads is all that is kept
        row_block = kept.block or block
        columns = rows.page_table.shape[1]
        table = ring_table(len(rows.tokens), columns, kept.first, kept.ring).to(rows.device)
        pool = model.make_pool(len(rows.tokens) * kept.pages, page)
        attention = make_attention(settings.kv, model, page)
        full = runner = Runner(model, pool, attention, View(make_policy(settings.kv, page), table))
        if _is_exact(settings.kv):
            full = runner = _captured(config, runner, own, width, first=2)
        views = _views(config, table)
    else:
        full = runner = Runner(model, model.make_pool(num_pages, page), _exact(model, page), dense(rows))
        if isinstance(settings.kv, SnapKVConfig):
            cache = DraftCache(settings, model, full.pool, rows, full.attention)
            runner = Runner(model, cache.pool, _exact(model, page), cache.view)
            runner = _captured(config, runner, own, width, first=2)
            full = replace(full, attention=cache.attention)
        elif isinstance(settings.kv, TopKConfig):
            runner = replace(full, attention=make_attention(settings.kv, model, page))
        else:
            runner = _captured(config, full, own, width, first=2)
    return ModelDrafter(rows, full, runner, own, row_block=row_block, block=block, cache=cache, views=views)


def _views(config: EngineConfig, page_table: Tensor) -> dict[int, View]:
    """Of the pool laid out by page_table, by the budget that a round may ask for."""
    page = config.cache.page_size
    return {budget: View(make_policy(kv, page), page_table) for budget, kv in budget_policies(config).items()}


def dense(rows: Rows) -> View:
    """Everything, in a pool that is laid out as the scheduler says."""
    return View(Dense(), rows.page_table)


def _is_exact(config: KVConfig) -> bool:
    """Whether drafts attend to what is listed, as it is: what graphs can capture."""
    return not (isinstance(config, TopKConfig) or (isinstance(config, WindowConfig) and config.positions == "relative"))


def _width(config: KVConfig, rows: Rows) -> int:
    """Most pages that a draft's list has. Two tokens can stand behind a window's last page."""
    most = rows.page_table.shape[1]
    return min(most, config.budget // rows.page_size + 1) if config.budget else most


def make_attention(config: KVConfig, model: Llama, page_size: int) -> AttentionBackend:
    """For drafts that read by `config`."""
    if isinstance(config, TopKConfig):
        return TopKAttention(page_size, config.budget)
    if isinstance(config, WindowConfig) and config.positions == "relative":
        near, sink = _exact(model, page_size), _exact(model, page_size)
        sink_pages = -(-config.sink // page_size)
        return RelativeAttention(
            near, sink, page_size=page_size, sink_pages=sink_pages, rotary=model.rotary, merge=model.ops.merge
        )
    return _exact(model, page_size)


def _exact(model: Llama, page_size: int) -> AttentionBackend:
    return model.ops.attention(page_size, model.head_dim)


def load_draft(config: EngineConfig, target: Llama, max_model_len: int, group: Group | None) -> DraftModel:
    """This rank's part in the draft model of `config`. group: the ranks that share it, None on all others.

    Raises ModelError.
    """
    if config.speculation.draft_model is None or group is None:
        return DraftModel()
    model = load_model(
        resolve_model(config.speculation.draft_model),
        dtype=target.dtype,
        device=target.device,
        group=group,
        progress=False,
        max_positions=max_model_len,
        ops=target.ops,
        int8=_rounded(config, target),
    )
    return DraftModel(group, model)
