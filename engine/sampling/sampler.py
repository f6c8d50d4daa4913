"""The one sampling rule, for draft and target alike: argmax over the vocabulary of l(v)/T + G(seed, position, v).

Everything a request may ask for - penalties, bias, min_tokens, top-k, top-p, min-p - changes the logits l before the
rule. Since the noise G is a function of (seed, position, token) alone, a draft that sees similar logits picks the same
token, and the target's choice never depends on what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.rows import Decisions, Ints, Round, Rows
from engine.params import SamplingParams
from engine.plan import RowStart
from engine.sampling.grammar import Grammars
from engine.sampling.logits_processors import Counts, Edits
from kernels.noise import gumbel_noise
from kernels.ops import Ops
from kernels.reference import REFERENCE
from parallel.sampling import VocabShard


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the decisions whose rows ask for them: log-probabilities under the target's unchanged logits.

    decisions: which decisions, host [n]. chosen: [n]. top: [n, k] in falling order, top_ids: [n, k] int64; k is the
    most that any of these rows asks for.
    """

    decisions: Ints
    chosen: Tensor
    top: Tensor
    top_ids: Tensor


@dataclass(frozen=True, slots=True)
class PromptReport:
    """Of prompt tokens, [n] each: the token, its log-probability, its rank; and top, [n, k] in falling order, with
    their ids."""

    tokens: Tensor
    chosen: Tensor
    rank: Tensor
    top: Tensor
    top_ids: Tensor


class Sampler:
    """Sampling parameters of all row slots, and the rule.

    Which rows ask for what is known to the host, and each adjustment touches only the decisions of rows that ask: a
    greedy row costs an argmax, a sampled one its noise.
    """

    def __init__(self, rows: Rows, vocab: VocabShard, ops: Ops = REFERENCE, grammars: Grammars | None = None) -> None:
        """ops: what computes the rule, as it computed the logits. grammars: of the rows; read, never moved."""
        max_rows, device = len(rows.tokens), rows.device
        self._grammars = grammars
        self._rows = rows
        self._vocab = vocab
        self._ops = ops
        # Host: who asks.
        self._params = [SamplingParams()] * max_rows
        self._sampled = np.zeros(max_rows, dtype=bool)
        self._candidates = np.zeros(max_rows, dtype=np.int64)  # how many logits decide a truncation; 0: none is asked
        self._penalised = np.zeros(max_rows, dtype=bool)
        self._edited = np.zeros(max_rows, dtype=bool)
        self._reported = np.zeros(max_rows, dtype=bool)
        # Device: with what.
        self._seed = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(max_rows, dtype=torch.float64, device=device)
        self._top_k = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._top_p = torch.ones(max_rows, dtype=torch.float64, device=device)
        self._min_p = torch.zeros(max_rows, dtype=torch.float64, device=device)
        self._penalties = torch.zeros(max_rows, 3, dtype=torch.float64, device=device)
        if grammars is not None:  # where in the packed words of a mask this rank's tokens stand
            token = torch.arange(vocab.start, vocab.start + vocab.size, device=device)
            self._word, self._bit = token // 32, (token % 32).int()
        self._edits: dict[int, Edits] = {}
        self._counts: Counts | None = None  # made when the first penalised row arrives

    def twin(self, vocab: VocabShard) -> Sampler:
        """A sampler for a draft model, with state of its own. vocab: its shard of the vocabulary."""
        return Sampler(self._rows, vocab, self._ops, self._grammars)

    # -- rows come, and commit -----------------------------------------------------------------------------------------

    def start(self, start: RowStart) -> None:
        """A request takes a row slot."""
        row, params = start.row, start.params
        self._params[row] = params
        self._sampled[row] = params.sampled
        self._candidates[row] = self._deciding(params)
        self._penalised[row] = params.penalised
        self._edited[row] = bool(params.logit_bias or params.min_tokens or params.allowed_token_ids or params.bad_words)
        self._reported[row] = params.logprobs is not None
        self._seed[row] = params.seed
        self._temperature[row] = params.temperature if params.sampled else 0.0
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        penalties = [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
        self._penalties[row] = torch.tensor(penalties, dtype=torch.float64)
        if self._edited[row]:
            self._edits[row] = Edits.of(start, self._vocab, self._rows.device)
        if params.penalised:
            if self._counts is None:
                self._counts = Counts(len(self._params), self._vocab, self._rows.device)
            self._counts.start(row, start.tokens[: start.num_prompt], start.tokens[start.num_prompt :])

    def give_up(self) -> None:
        """Forget what is held for the rest of a round: there is none. Rows of it start anew."""

    def observe(self, rows: Round, tokens: Tensor, accepted: Tensor) -> None:
        """Count what was committed: tokens [n], in the order of `rows.decisions`; accepted [rows], drafts of each."""
        decisions = rows.decisions
        if self._counts is None or not self._penalised[decisions.rows].any():
            return
        asking = self._to_device(np.flatnonzero(self._penalised[decisions.rows]))
        self._counts.add(decisions.row_index[asking], tokens[asking], rows.holding(accepted)[asking])

    # -- the rule ------------------------------------------------------------------------------------------------------

    def choose(self, logits: Tensor, decisions: Decisions) -> Tensor:
        """The token each decision falls on.

        logits: [n, this rank's vocabulary] float32 or float64, changed in place. Returns [n] int64.
        """
        return self._decide(logits, self._adjust(logits, decisions), decisions)

    def draft(self, logits: Tensor, decisions: Decisions) -> Tensor:
        """The token that a draft proposes, from its own logits; otherwise as `choose`."""
        return self.choose(logits, decisions)

    def _adjust(self, logits: Tensor, decisions: Decisions, *, divide: bool = False) -> Tensor:
        """Everything before the noise: sampled rows end with the logits of the distribution they sample from, once
        divided by the temperatures that are returned, [n] float64, 0 for greedy rows.

        divide: leave no sampled row to be divided.
        """
        rows = decisions.rows
        if self._penalised[rows].any():
            self._penalise(logits, decisions, self._to_device(np.flatnonzero(self._penalised[rows])))
        for i in np.flatnonzero(self._edited[rows]).tolist():
            row = int(rows[i])
            self._edits[row].apply(logits[i], decisions.position[i], self._rows.tokens[row])
        if self._grammars is not None and (bound := np.flatnonzero(self._grammars.bound[rows])).size:
            self._bind(logits, decisions, bound)
        temperature = self._temperature[decisions.row_index]
        now = np.flatnonzero(self._sampled[rows] & (divide | (self._candidates[rows] > 0)))
        if len(now):
            index = self._to_device(now)
            slots = decisions.row_index[index]
            scaled = logits[index] / temperature[index, None].to(logits.dtype)
            self._truncate(scaled, slots, self._candidates[rows[now]])
            logits[index] = scaled
            temperature[index] = 1.0
        return temperature

    def _decide(self, logits: Tensor, temperature: Tensor, decisions: Decisions) -> Tensor:
        """The rule itself, on what `_adjust` has made."""
        return self.rule(logits, temperature, self._seed[decisions.row_index], decisions.position)

    def rule(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """argmax of logits / temperature + noise over the whole vocabulary. logits: [n, this rank's vocabulary], left
        in any state. temperature: [n] float64. seeds, positions: [n] int64. Returns [n] int64."""
        return self._vocab.best(*self._ops.sample(logits, temperature, seeds, positions, self._vocab.start))

    def by_rule(self, rows: Ints) -> bool:
        """Whether a draft for these row slots is what `rule` makes of its logits as they are."""
        changed = (self._penalised[rows] | self._edited[rows] | (self._candidates[rows] > 0)).any()
        return not (changed or (self._grammars is not None and self._grammars.bound[rows].any()))

    def asked(self, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """Temperatures, [n] float64, and seeds, [n] int64."""
        return self._temperature[decisions.row_index], self._seed[decisions.row_index]

    def _noise(self, decisions: Decisions, index: Tensor, stream: int = 0) -> Tensor:
        """Gumbel noise of this rank's slice for the decisions `index` [n]: [n, slice] float32. stream: which of several
        independent ones."""
        seeds = self._seed[decisions.row_index[index]] ^ stream
        first, last = self._vocab.start, self._vocab.start + self._vocab.size
        return gumbel_noise(seeds, decisions.position[index], first, last)

    def logprobs(self, logits: Tensor, decisions: Decisions) -> Callable[[Tensor], Logprobs] | None:
        """What rows asked to be told. Call before `choose`, with unchanged logits; call the result, if there is one,
        with the tokens [n] that were chosen."""
        asking = np.flatnonzero(self._reported[decisions.rows])
        if not len(asking):
            return None
        index = self._to_device(asking)
        most = min(self._vocab.total, max(self._params[row].logprobs or 0 for row in decisions.rows[asking]))
        unchanged = logits[index]

        def of(tokens: Tensor) -> Logprobs:
            return Logprobs(asking, *self._vocab.logprobs(unchanged, tokens[index], most))

        return of

    def prompts(self, logits: Tensor, rows: Round) -> PromptReport:
        """What rows asked to be told of their prompts. logits: [n, this rank's vocabulary], of `rows.told_tokens`."""
        slots, tokens = rows.told_tokens()
        most = min(self._vocab.total, max(self._params[row].prompt_logprobs or 0 for row in set(slots.tolist())))
        chosen, top, top_ids = self._vocab.logprobs(logits, tokens, most)
        return PromptReport(tokens, chosen, self._vocab.rank(logits, tokens), top, top_ids)

    # -- adjustments ---------------------------------------------------------------------------------------------------

    def _penalise(self, logits: Tensor, decisions: Decisions, asking: Tensor) -> None:
        """Repetition, over prompt and output (CTRL, arXiv 1909.05858), then frequency and presence, over output, as the
        OpenAI API defines them. The drafts before a decision count as output: if it stands, so do they."""
        assert self._counts is not None
        slots = decisions.row_index[asking]
        counts = self._counts.output_with(slots, *self._drafted(decisions, asking))
        presence, frequency, repetition = self._penalties[slots, :, None].to(logits.dtype).unbind(1)
        changed = logits[asking]
        repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
        changed = torch.where((counts > 0) | self._counts.in_prompt[slots], repeated, changed)
        logits[asking] = changed - frequency * counts - presence * (counts > 0)

    def _drafted(self, decisions: Decisions, asking: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts before the decisions `asking` [n], and which of them stand before each: [n, most drafts] int64 and
        bool."""
        slots, offset = decisions.row_index[asking], decisions.offset[asking]
        first_draft = decisions.position[asking] - offset
        steps = torch.arange(decisions.drafted.max(initial=0), device=self._rows.device)
        columns = (first_draft[:, None] + steps).clamp_(max=self._rows.tokens.shape[1] - 1)
        return self._rows.tokens[slots[:, None], columns].long(), steps < offset[:, None]

    def _bind(self, logits: Tensor, decisions: Decisions, bound: npt.NDArray[np.intp]) -> None:
        """Leave only what grammars allow. bound: which decisions. The host has to see the drafts for it."""
        assert self._grammars is not None
        index = self._to_device(bound)
        rows, counts = decisions.rows[bound], decisions.drafted[bound]
        drafted = self._drafted(decisions, index)[0].tolist()
        words = []
        for row in dict.fromkeys(rows.tolist()):  # a row's decisions stand together, behind one draft more each
            mine = np.flatnonzero(rows == row)
            first, last = int(counts[mine[0]]), int(counts[mine[-1]])
            words.append(self._grammars.masks(row, drafted[mine[-1]][:last], first))
        packed = torch.from_numpy(np.concatenate(words)).to(logits.device)
        allowed = ((packed[:, self._word] >> self._bit) & 1).bool()
        kept = logits[index].masked_fill(~allowed, float("-inf"))
        # Where nothing else is left, what min_tokens or a bias has ruled out is not.
        nothing = self._vocab.largest(kept) == float("-inf")
        logits[index] = torch.where(nothing[:, None] & allowed, 0.0, kept)

    def _deciding(self, params: SamplingParams) -> int:
        if not params.truncated:
            return 0
        if params.top_k:
            return min(params.top_k, self._vocab.total)
        return self._vocab.total if params.top_p < 1 else 1

    def _truncate(self, scaled: Tensor, slots: Tensor, candidates: Ints) -> None:
        """candidates: [n], per row of `scaled`. Rows whose cut takes a gather of all logits go by themselves."""
        for asking in ((candidates > 0) & (candidates < self._vocab.total), candidates == self._vocab.total):
            if not asking.any():
                continue
            index = self._to_device(np.flatnonzero(asking))
            rows, cut = slots[index], scaled[index]
            asked = self._top_k[rows], self._top_p[rows], self._min_p[rows]
            least = self._vocab.cut(cut, *asked, candidates=int(candidates[asking].max()))
            scaled[index] = cut.masked_fill(cut < least[:, None], float("-inf"))

    def _to_device(self, index: npt.NDArray[np.intp]) -> Tensor:
        return self._rows.to_device(index)
