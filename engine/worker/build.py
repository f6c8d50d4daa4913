"""Build a rank's target, drafter and sampler from the settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.batch.forward_graphs import ForwardGraphs, Observer, graph_row_counts
from engine.batch.graph_inputs import SlidingRoom
from engine.batch.row_state import RowState
from engine.batch.runner import Runner, make_attention
from engine.batch.tail_pages import make_tails, num_exact_pages
from engine.batch.view import DenseView
from engine.config.deployment import EngineConfig
from engine.kv.policy import DraftSite, KVPolicy
from engine.kv.registry import make_policy
from engine.kv.sealed_reading import SealedAttention, SealedView
from engine.kv.target_quest import make_target_reading
from engine.sampling.grammar import Grammars
from engine.sampling.sampler import Sampler
from engine.speculation.draft_graphs import DraftGraphs
from engine.speculation.drafters import Drafter, EitherDrafter, NoDrafter, SelfDrafter
from engine.speculation.model_drafter import ModelDrafter, SharedDrafts
from engine.speculation.rejection import Proposals, RejectionSampler
from engine.worker.weight_choice import draft_model_weights
from kernels.attention.base import AttentionBackend
from kernels.key_summaries import KeySummaries
from kernels.ops import Graphs, Ops
from models.batch import SlidingKV
from models.decoder import DecoderModel
from models.default import resolve_model
from models.loader import load_model
from parallel.group import Group
from parallel.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A separate draft model: the ranks that share it, and this rank's shard. Both are None on a rank without one."""

    group: Group | None = None
    model: DecoderModel | None = None


def load_draft(config: EngineConfig, target: DecoderModel, max_model_len: int, group: Group | None) -> DraftModel:
    """Load this rank's shard of the draft model, if it has one.

    group: the ranks that share the draft model; None on all others. Raises ModelError.
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
        weights=draft_model_weights(config, target.ops),
    )
    return DraftModel(group, model.keeping_all_kv())


def make_sampler(config: EngineConfig, state: RowState, vocab: VocabShard, ops: Ops, grammars: Grammars) -> Sampler:
    """Make the target's sampler."""
    if config.speculation.verification == "rejection" and config.speculation.max_model_drafts:
        proposals = Proposals(len(state.tokens), config.speculation.max_draft_tokens)
        return RejectionSampler(state, vocab, proposals, ops, grammars)
    return Sampler(state, vocab, ops, grammars)


def make_graphs(config: EngineConfig, model: DecoderModel) -> Graphs | None:
    """Make what captures an engine's forwards; None where nothing is captured."""
    if model.ops.make_graphs is None or not config.cuda_graphs:
        return None
    return model.ops.make_graphs()


def make_target(config: EngineConfig, model: DecoderModel, state: RowState, num_pages: int, num_sliding: int) -> Runner:
    """Make the target's runner, over pools of its own. `make_drafter` captures its forwards. num_pages, num_sliding:
    see pool_pages."""
    pool = model.make_pool(num_pages, state.page_size, config.cache.format, num_exact_pages(config))
    sliding = None
    if model.num_sliding_layers:
        sliding_pool = model.make_sliding_pool(num_sliding, state.page_size)
        sliding = SlidingKV(sliding_pool, _sliding_attention(model, state.page_size))
    if config.target_kv is not None:
        max_queries = config.speculation.max_draft_tokens + 1
        view, attention = make_target_reading(config.target_kv, model, state, pool, max_queries)
        return Runner(model, pool, attention, view, summaries=attention.summaries)
    plain = make_attention(model, state.page_size)
    if not pool.seals:
        all_kv = DenseView(state.page_table, window=model.window, sliding=state.windows)
        return Runner(model, pool, plain, all_kv, sliding=sliding)
    own = config.by_drafter.get("self")
    summarises = own is not None and own.speculation.kv_state(state.page_size).summaries > 0
    summaries = KeySummaries(pool, model.ops) if summarises else None
    sealed = SealedAttention(plain, state, summaries)
    return Runner(model, pool, sealed, SealedView(state, model.window), summaries=summaries, sliding=sliding)


def make_row_state(config: EngineConfig, model: DecoderModel, num_pages: int, max_model_len: int) -> RowState:
    """Make the state of a rank's rows. num_pages: of the target's pool."""
    tails = make_tails(config)
    return RowState(
        max_rows=config.scheduler.max_rows,
        max_model_len=max_model_len,
        page_size=config.cache.page_size,
        device=model.device,
        ops=model.ops,
        tails=tails,
        first_exact=0 if tails is None else num_pages,
        sliding_window=model.sliding_window,
    )


def make_drafter(
    config: EngineConfig,
    target: Runner,
    state: RowState,
    sampler: Sampler,
    group: Group,
    draft: DraftModel,
    graphs: Graphs | None = None,
) -> tuple[Runner, Drafter]:
    """Make the drafter that `config.speculation` describes. Returns the target's runner to use with it, and the
    drafter.

    sampler: the target's. group: all ranks. draft: the draft model, if there is one. graphs: see make_graphs; None:
    nothing is captured.
    """
    by_drafter = config.by_drafter
    policy = None
    if (own := by_drafter.get("self")) is not None:
        site = DraftSite(own.speculation, target.model, state, lambda: target.pool, target.summaries)
        policy = make_policy(site)
    target = _with_target_graphs(config, target, state, graphs, policy.observer if policy else None)
    drafter: Drafter = NoDrafter()
    if "model" in by_drafter:
        mine = _model_drafter(config, state, target.pool.num_pages, sampler, draft, graphs)
        is_shared = draft.group is None or draft.group.size < group.size
        drafter = SharedDrafts(mine, group) if is_shared else mine or NoDrafter()
    if own is not None and policy is not None:
        itself = _self_drafter(own, target, state, sampler, policy, graphs)
        drafter = EitherDrafter(drafter, itself) if "model" in by_drafter else itself
    return target, drafter


def _self_drafter(
    config: EngineConfig, target: Runner, state: RowState, sampler: Sampler, policy: KVPolicy, graphs: Graphs | None
) -> SelfDrafter:
    """Make the drafter over the target itself. target: its runner, with captured forwards."""
    model = own_drafts(config, target.model) or target.model
    view = policy.view(0)
    sliding = target.sliding and replace(target.sliding, attention=_sliding_attention(model, state.page_size))
    runner, steps = Runner(model, policy.pool, policy.attention, view, sliding=sliding), None
    if policy.captures:
        if policy.pool is target.pool and model is target.model and not view.per_layer:
            runner = replace(runner, graphs=target.graphs)
        runner, steps = _with_graphs(config, runner, graphs, sampler, state)
    return SelfDrafter(runner, sampler, policy, steps)


def own_drafts(config: EngineConfig, target: DecoderModel) -> DecoderModel | None:
    """Return the target with the matrices of drafts; None if it does not draft, or with its own."""
    if "self" not in config.by_drafter or target.weights.drafts is None:
        return None
    return target.drafting() if config.speculation.weights in ("auto", target.weights.drafts) else None


def _model_drafter(
    config: EngineConfig,
    state: RowState,
    num_pages: int,
    sampler: Sampler,
    draft: DraftModel,
    graphs: Graphs | None,
) -> Drafter | None:
    """Make the drafter over the draft model; None on a rank without a shard of it."""
    model, group = draft.model, draft.group
    if model is None or group is None:
        return None
    page = state.page_size
    policy = make_policy(DraftSite(config.speculation, model, state, lambda: model.make_pool(num_pages, page)))
    own = sampler.for_draft(VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group))
    runner, steps = Runner(model, policy.pool, policy.attention, policy.view(0)), None
    if policy.captures:
        runner, steps = _with_graphs(config, runner, graphs, own, state, first=2)
    observers = () if policy.observer is None else (policy.observer,)
    forwards = runner.graphs if policy.full is policy.pool else None
    full = Runner(model, policy.full, policy.full_attention, policy.full_view, forwards, observers)
    block = config.scheduler.max_batch_tokens
    return ModelDrafter(state, full, runner, own, policy, block=block, graphs=steps)


def _with_target_graphs(
    config: EngineConfig, target: Runner, state: RowState, graphs: Graphs | None, observer: Observer | None = None
) -> Runner:
    """Return the target's runner with captured forwards, and with one more observer."""
    if observer is not None:
        target = replace(target, observers=(*target.observers, observer))
    # Not captured: choices of a target_kv on the host, and rows that are cut where a page is sealed.
    if graphs is None or config.target_kv is not None or config.cache.seals:
        return target
    forwards = ForwardGraphs(
        target.model,
        target.pool,
        graphs,
        rows=graph_row_counts(config.scheduler.max_rows),
        queries={gamma + 1 for gamma in _gammas(config)},  # a plain step, and verify passes
        width=state.page_table.shape[1],
        shares=config.cache.prefix and target.model.num_kv_layers > 0 and not target.view.window,
        window=target.view.window,
        sliding=_sliding_room(target, state),
        observer=observer,
    )
    return replace(target, graphs=forwards)


def _with_graphs(
    config: EngineConfig, runner: Runner, graphs: Graphs | None, sampler: Sampler, state: RowState, first: int = 1
) -> tuple[Runner, DraftGraphs | None]:
    """Capture single steps, unless the runner has graphs already, and drafts of all steps. Returns the runner with
    graphs and the drafts; the unchanged runner and None where nothing is captured.

    sampler: the drafter's. first: largest number of queries of a row in the first step.
    """
    if graphs is None:
        return runner, None
    settings, model = config.speculation, runner.model
    width = settings.kv.max_pages(state.page_size, settings.max_draft_tokens, state.page_table.shape[1])
    layers = model.num_kv_layers if runner.view.per_layer else 0
    rows, gammas = graph_row_counts(config.scheduler.max_rows), _steps(config)
    sliding = _sliding_room(runner, state)
    if sliding is not None and runner.view.sliding is not state.windows:
        sliding = sliding._replace(width=width)
    if runner.graphs is None:
        forwards = ForwardGraphs(
            model,
            runner.pool,
            graphs,
            rows=rows,
            queries={1, first},
            width=width,
            layers=layers,
            window=runner.view.window,
            sliding=sliding,
        )
        runner = replace(runner, graphs=forwards)
    steps = DraftGraphs(
        runner, graphs, sampler, rows=rows, gammas=gammas, first=first, width=width, layers=layers, sliding=sliding
    )
    return runner, steps


def _sliding_room(runner: Runner, state: RowState) -> SlidingRoom | None:
    if runner.sliding is None:
        return None
    return SlidingRoom(runner.sliding.pool, runner.model.sliding_window, state.sliding_table.shape[1])


def _gammas(config: EngineConfig) -> set[int]:
    """Return the numbers of drafts that verify passes are captured for. With a fixed gamma of a model's drafts, only
    rounds in which a request ends have fewer, or, where pages are sealed, a page."""
    settings = config.speculation
    if settings.gamma == "auto" or config.cache.seals or settings.searches_text:
        return set(settings.captured_gammas)
    return {0, settings.max_draft_tokens}


def _steps(config: EngineConfig) -> set[int]:
    """Return the numbers of drafts that a model makes in a round: fewer where others come from the text."""
    settings = config.speculation
    if settings.searches_text:
        return set(range(1, settings.max_model_drafts + 1))
    return _gammas(config) - {0}


def _sliding_attention(model: DecoderModel, page_size: int) -> AttentionBackend:
    return model.ops.attention(page_size, model.head_dim)
