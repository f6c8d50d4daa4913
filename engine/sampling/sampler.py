"""The one sampling rule, for draft and target alike: argmax over the vocabulary of l(v)/T + G(seed, position, v).

Everything a request may ask for - penalties, bias, min_tokens, grammar, top-k, top-p, min-p - changes the logits l
before the rule. Since the noise G is a function of (seed, position, token) alone, a draft that sees similar logits
picks the same token, and the target's choice never depends on what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.round_batch import RoundBatch, SamplePositions
from engine.batch.row_state import RowState
from engine.params import SamplingParams
from engine.plan import RowStart
from engine.sampling.grammar import Grammars
from engine.sampling.logits_processors import LogitEdits, TokenCounts
from kernels.noise import gumbel_noise
from kernels.ops import Ops
from kernels.ragged import Ints
from kernels.reference_ops import REFERENCE
from kernels.transfer import send
from parallel.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities, under the target's unchanged logits, of the samples whose rows request them.

    index: host, [n], into the round's samples. chosen: [n]. top: [n, k], falling; top_ids: [n, k] int64; k is the
    largest number that any of these rows requests.
    """

    index: Ints
    chosen: Tensor
    top: Tensor
    top_ids: Tensor


@dataclass(frozen=True, slots=True)
class PromptLogprobTensors:
    """Log-probabilities of prompt tokens. tokens, chosen, rank: [n]. top: [n, k], falling; top_ids: [n, k] int64."""

    tokens: Tensor
    chosen: Tensor
    rank: Tensor
    top: Tensor
    top_ids: Tensor


NOT_FINITE, NOTHING_LEFT = -1, -2
"""In place of a sampled token: why there is none."""


class Sampler:
    """Sampling parameters of all row slots, and the sampling rule.

    The host holds the requests' options, and each logits processor touches only the samples of rows that need it: a
    greedy row costs an argmax, a sampled one its noise.
    """

    def __init__(
        self, state: RowState, vocab: VocabShard, ops: Ops = REFERENCE, grammars: Grammars | None = None
    ) -> None:
        """ops: kernels that compute the rule, and computed the logits. grammars: of the rows; read, never advanced."""
        max_rows, device = len(state.tokens), state.device
        self._failures = state.failures
        self._grammars = grammars
        self._state = state
        self._vocab = vocab
        self._ops = ops
        # Host: each row's options.
        self._params = [SamplingParams()] * max_rows
        self._random = np.zeros(max_rows, dtype=bool)
        self._num_candidates = np.zeros(max_rows, dtype=np.int64)  # logits that decide a truncation; 0: none
        self._has_penalties = np.zeros(max_rows, dtype=bool)
        self._has_edits = np.zeros(max_rows, dtype=bool)
        self._wants_logprobs = np.zeros(max_rows, dtype=bool)
        # Device: the values.
        self._seed = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(max_rows, dtype=torch.float64, device=device)
        self._top_k = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._top_p = torch.ones(max_rows, dtype=torch.float64, device=device)
        self._min_p = torch.zeros(max_rows, dtype=torch.float64, device=device)
        self._penalties = torch.zeros(max_rows, 3, dtype=torch.float64, device=device)
        if grammars is not None:  # places of this rank's tokens in the packed words of a mask
            token = torch.arange(vocab.start, vocab.start + vocab.size, device=device)
            self._word, self._bit = token // 32, (token % 32).int()
        self._edits: dict[int, LogitEdits] = {}
        self._counts: TokenCounts | None = None  # made when the first row with penalties arrives

    def for_draft(self, vocab: VocabShard) -> Sampler:
        """Make a sampler for a draft model, with state of its own. vocab: the draft model's shard of the vocabulary."""
        return Sampler(self._state, vocab, self._ops, self._grammars)

    # -- start and commit of rows --------------------------------------------------------------------------------------

    def start(self, start: RowStart) -> None:
        """Start a request in a row slot."""
        row, params = start.row, start.params
        # First what decides which collectives the row takes part in: it must not differ between ranks.
        self._params[row] = params
        self._random[row] = params.sampled
        self._num_candidates[row] = self._candidates_of(params)
        self._has_penalties[row] = params.penalised
        self._has_edits[row] = bool(
            params.logit_bias or params.min_tokens or params.allowed_token_ids or params.bad_words
        )
        self._wants_logprobs[row] = params.logprobs is not None
        self._seed[row] = params.seed
        self._temperature[row] = params.temperature if params.sampled else 0.0
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        penalties = [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
        self._penalties[row] = send(torch.tensor(penalties, dtype=torch.float64), self._state.device)
        with self._failures.guard(row, "its sampling parameters"):
            if self._has_edits[row]:
                self._edits[row] = LogitEdits.from_row_start(start, self._vocab, self._state.device)
            if params.penalised:
                if self._counts is None:
                    self._counts = TokenCounts(len(self._params), self._vocab, self._state.device)
                self._counts.start(row, start.tokens[: start.num_prompt], start.tokens[start.num_prompt :])

    def abandon_round(self) -> None:
        """Drop state that is kept for the rest of a round that is abandoned. Its rows start anew."""

    def count_tokens(self, batch: RoundBatch, tokens: Tensor, accepted: Tensor) -> None:
        """Count committed tokens, for penalties. tokens: [samples]. accepted: [rows], drafts accepted of each."""
        samples = batch.samples
        if self._counts is None or not self._has_penalties[samples.rows].any():
            return
        index = self._to_device(np.flatnonzero(self._has_penalties[samples.rows]))
        self._counts.add(samples.row_index[index], tokens[index], batch.committed_samples(accepted)[index])

    # -- the rule ------------------------------------------------------------------------------------------------------

    def choose(self, logits: Tensor, samples: SamplePositions) -> Tensor:
        """Sample a token at each position.

        logits: [n, this rank's vocabulary] float32 or float64, changed in place. Returns [n] int64; in place of a token
        NOT_FINITE if a rank has a logit that is not a finite number, or has failed the row, and NOTHING_LEFT if every
        token is excluded.
        """
        return mark_failures(*self._sample_at(logits, self._process(logits, samples), samples))

    def draft(self, logits: Tensor, samples: SamplePositions) -> Tensor:
        """Sample the token that a draft proposes, from its own logits, as `choose` does; but always some token: only
        the target's logits fail a row."""
        return self._sample_at(logits, self._process(logits, samples), samples)[1]

    def sample(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maximum of logits / temperature + noise over the whole vocabulary.

        logits: [n, this rank's vocabulary], left in any state. temperature: [n] float64, 0 for no noise. seeds,
        positions: [n] int64. Returns values, [n], NaN if a logit is, and tokens, [n] int64.
        """
        return self._vocab.best(*self._ops.sample(logits, temperature, seeds, positions, self._vocab.start))

    def why_excluded(self, row: int) -> str:
        """Describe what has excluded every token of a row: the fields of its request that exclude tokens."""
        params = self._params[row]
        if self._grammars is not None and (error := self._grammars.error(row)) is not None:
            return f"the grammar failed: {error}"
        fields = {
            "min_tokens": params.min_tokens > 0,
            "logit_bias": bool(params.logit_bias),
            "allowed_token_ids": bool(params.allowed_token_ids),
            "bad_words": bool(params.bad_words),
            "the grammar": params.grammar is not None,
        }
        given = [name for name, is_given in fields.items() if is_given]
        return f"no token is left to sample: excluded by {', '.join(given) or 'the model'}"

    def is_plain(self, rows: Ints) -> bool:
        """Whether these row slots sample from their logits as they are, by `sample` alone."""
        processed = (self._has_penalties[rows] | self._has_edits[rows] | (self._num_candidates[rows] > 0)).any()
        return not (processed or (self._grammars is not None and self._grammars.constrained[rows].any()))

    def temperatures_and_seeds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return temperatures, [n] float64, and seeds, [n] int64, of row slots [n] int64."""
        return self._temperature[rows], self._seed[rows]

    def _sample_at(self, logits: Tensor, temperature: Tensor, samples: SamplePositions) -> tuple[Tensor, Tensor]:
        return self.sample(logits, temperature, self._seed[samples.row_index], samples.position)

    def _noise(self, samples: SamplePositions, index: Tensor, stream: int = 0) -> Tensor:
        """Compute Gumbel noise of this rank's slice for the samples `index` [n]: [n, slice] float32.

        stream: selects one of several independent noises.
        """
        seeds = self._seed[samples.row_index[index]] ^ stream
        first, last = self._vocab.start, self._vocab.start + self._vocab.size
        return gumbel_noise(seeds, samples.position[index], first, last)

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def logprobs(self, logits: Tensor, samples: SamplePositions) -> Callable[[Tensor], LogprobTensors] | None:
        """Prepare the log-probabilities that rows request; None if no row does.

        Call it with unchanged logits, before `choose`; call the result with the chosen tokens [n].
        """
        host_index = np.flatnonzero(self._wants_logprobs[samples.rows])
        if not len(host_index):
            return None
        index = self._to_device(host_index)
        num_alternatives = min(
            self._vocab.total, max(self._params[row].logprobs or 0 for row in samples.rows[host_index])
        )
        unchanged = logits[index]

        def report(tokens: Tensor) -> LogprobTensors:
            return LogprobTensors(host_index, *self._vocab.logprobs(unchanged, tokens[index], num_alternatives))

        return report

    def prompt_logprobs(self, logits: Tensor, batch: RoundBatch) -> PromptLogprobTensors:
        """Compute log-probabilities of prompt tokens. logits: [n, this rank's vocabulary], one row per
        `batch.prompt_tokens`."""
        slots, tokens = batch.prompt_tokens()
        num_alternatives = min(
            self._vocab.total, max(self._params[row].prompt_logprobs or 0 for row in set(slots.tolist()))
        )
        chosen, top, top_ids = self._vocab.logprobs(logits, tokens, num_alternatives)
        return PromptLogprobTensors(tokens, chosen, self._vocab.rank(logits, tokens), top, top_ids)

    # -- logits processors ---------------------------------------------------------------------------------------------

    def _process(self, logits: Tensor, samples: SamplePositions, *, divide: bool = False) -> Tensor:
        """Apply everything that precedes the noise: penalties, edits, grammars, truncation.

        Afterwards the logits of a sampled row, divided by the temperature returned for it, are those of the
        distribution it samples from. Returns [n] float64, 0 for greedy rows. divide: leave no sampled row to be
        divided.
        """
        rows = samples.rows
        if len(index := self._failures.healthy(rows, self._has_penalties)):
            self._apply_penalties(logits, samples, self._to_device(index))
        for i in self._failures.healthy(rows, self._has_edits).tolist():
            row = int(rows[i])
            with self._failures.guard(row, "its sampling parameters"):
                self._edits[row].apply(logits[i], samples.position[i], self._state.tokens[row])
        if self._grammars is not None and len(index := self._failures.healthy(rows, self._grammars.constrained)):
            self._apply_grammars(logits, samples, index)
        if len(index := self._failures.among(rows)):
            logits[self._to_device(index)] = float("nan")  # other ranks see by it that the row has failed
        temperature = self._temperature[samples.row_index]
        truncated = np.flatnonzero(self._random[rows] & (divide | (self._num_candidates[rows] > 0)))
        if len(truncated):
            device_index = self._to_device(truncated)
            slots = samples.row_index[device_index]
            scaled = logits[device_index] / temperature[device_index, None].to(logits.dtype)
            self._apply_truncation(scaled, slots, self._num_candidates[rows[truncated]])
            logits[device_index] = scaled
            temperature[device_index] = 1.0
        return temperature

    def _apply_penalties(self, logits: Tensor, samples: SamplePositions, index: Tensor) -> None:
        """Apply penalties: repetition (CTRL, arXiv 1909.05858), over prompt and output; then frequency and presence, as
        the OpenAI API defines them, over output. The drafts before a sample count as output: if it is committed, so are
        they."""
        assert self._counts is not None
        slots = samples.row_index[index]
        counts = self._counts.output_with(slots, *self._drafts_before(samples, index))
        presence, frequency, repetition = self._penalties[slots, :, None].to(logits.dtype).unbind(1)
        changed = logits[index]
        repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
        changed = torch.where((counts > 0) | self._counts.in_prompt[slots], repeated, changed)
        logits[index] = changed - frequency * counts - presence * (counts > 0)

    def _drafts_before(self, samples: SamplePositions, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drafts of the rows of samples `index` [n], and a mask of those that precede each sample:
        [n, max drafts] int64 and bool."""
        slots, offset = samples.row_index[index], samples.offset[index]
        first_draft = samples.position[index] - offset
        steps = torch.arange(samples.drafted.max(initial=0), device=self._state.device)
        columns = (first_draft[:, None] + steps).clamp_(max=self._state.tokens.shape[1] - 1)
        return self._state.tokens[slots[:, None], columns].long(), steps < offset[:, None]

    def _apply_grammars(self, logits: Tensor, samples: SamplePositions, index: npt.NDArray[np.intp]) -> None:
        """Mask the tokens that grammars forbid, in the samples `index`. This copies the drafts to the host."""
        assert self._grammars is not None
        device_index = self._to_device(index)
        rows, counts = samples.rows[index], samples.drafted[index]
        drafted = self._drafts_before(samples, device_index)[0].tolist()
        words = []
        for row in dict.fromkeys(rows.tolist()):  # a row's samples are adjacent, each after one more draft
            mine = np.flatnonzero(rows == row)
            first, last = int(counts[mine[0]]), int(counts[mine[-1]])
            words.append(self._grammars.masks(row, drafted[mine[-1]][:last], first))
        packed = send(torch.from_numpy(np.concatenate(words)), logits.device)
        allowed = ((packed[:, self._word] >> self._bit) & 1).bool()
        logits[device_index] = logits[device_index].masked_fill(~allowed, float("-inf"))

    def _candidates_of(self, params: SamplingParams) -> int:
        """Return the number of a row's largest logits that decide its truncation; 0: it has none."""
        if not params.truncated:
            return 0
        if params.top_k:
            return min(params.top_k, self._vocab.total)
        return self._vocab.total if 0 < params.top_p < 1 else 1

    def _apply_truncation(self, scaled: Tensor, slots: Tensor, candidates: Ints) -> None:
        """Apply top-k, top-p and min-p. candidates: [n], per row of `scaled`. Rows whose cut needs a gather of all
        logits are processed separately."""
        for group in ((candidates > 0) & (candidates < self._vocab.total), candidates == self._vocab.total):
            if not group.any():
                continue
            index = self._to_device(np.flatnonzero(group))
            rows, cut = slots[index], scaled[index]
            limits = self._top_k[rows], self._top_p[rows], self._min_p[rows]
            threshold = self._vocab.cut(cut, *limits, candidates=int(candidates[group].max()))
            scaled[index] = cut.masked_fill(cut < threshold[:, None], float("-inf"))

    def _to_device(self, index: npt.NDArray[np.intp]) -> Tensor:
        return self._state.to_device(index)


def mark_failures(values: Tensor, tokens: Tensor) -> Tensor:
    """Replace the tokens whose values show that nothing could be sampled. values: [n]. tokens: [n] int64."""
    tokens = tokens.masked_fill(values == float("-inf"), NOTHING_LEFT)
    return tokens.masked_fill(values.isnan() | (values == float("inf")), NOT_FINITE)
