"""The sampling rule against plain definitions, and its distribution against the exact one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.round_batch import SamplePositions
from engine.batch.row_state import RowState
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RowStart
from engine.sampling.sampler import Sampler
from kernels.noise import gumbel_noise
from models.config import ModelConfig
from parallel.group import Group
from parallel.vocab_shard import VocabShard
from tests.support.engines import run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, is_all, only_in_all

VOCAB = 12


def one_row(
    params: SamplingParams, prompt: list[int], output: list[int], drafts: list[int]
) -> tuple[Sampler, SamplePositions]:
    """Build a sampler whose row 2 holds prompt, output and drafts, and one sample position after each prefix of the
    drafts."""
    rows = RowState(max_rows=4, max_model_len=64, page_size=8, device=torch.device("cpu"))
    sampler = Sampler(rows, VocabShard(0, VOCAB, VOCAB, Group.single()))
    committed = prompt + output
    sampler.start(RowStart(2, committed, len(prompt), params, [0, 3]))
    rows.tokens[2, : len(committed) + len(drafts)] = torch.tensor(committed + drafts)
    n = len(drafts) + 1
    offset = torch.arange(n)
    slots = np.full(n, 2)
    return sampler, SamplePositions(slots, np.arange(n), torch.from_numpy(slots), len(committed) + offset, offset)


def plain_definition(
    logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int], stop_ids: list[int]
) -> Tensor:
    """Compute log-probabilities of the next token straight from the definitions, in Python."""
    values = logits.tolist()
    for token in range(VOCAB):
        if token in prompt or token in output:
            values[token] *= params.repetition_penalty if values[token] < 0 else 1 / params.repetition_penalty
        values[token] -= params.frequency_penalty * output.count(token)
        values[token] -= params.presence_penalty * (token in output)
        values[token] += params.logit_bias.get(token, 0.0)
        if token in stop_ids and len(output) < params.min_tokens:
            values[token] = -math.inf
    values = [value / params.temperature for value in values]
    ranked = sorted(values, reverse=True)
    kept = [v for v in values if not params.top_k or v >= ranked[min(params.top_k, VOCAB) - 1]]
    mass = math.fsum(math.exp(v) for v in kept)
    total, least = 0.0, math.inf
    for v in sorted(kept, reverse=True):
        if total < params.top_p or params.top_p == 1 or total == 0:
            least = v
        total += math.exp(v) / mass
    least = max(least, ranked[0] + (math.log(params.min_p) if params.min_p else -math.inf))
    cut = torch.tensor([v if v >= least else -math.inf for v in values], dtype=torch.float64)
    return cut.log_softmax(0)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.05, 0.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 0.9]),
        "presence_penalty": st.sampled_from([0.0, 1.0, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.5, 0.7]),
        "logit_bias": st.sampled_from([{}, {4: 2.5, 7: -100.0}]),
        "min_tokens": st.sampled_from([0, 2, 4]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@given(
    fields=PARAMS,
    prompt=TOKENS,
    output=TOKENS,
    drafts=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    seed=st.integers(0, 999),
)
@examples(100, 400)
def test_every_parameter_means_its_definition(
    fields: dict[str, Any], prompt: list[int], output: list[int], drafts: list[int], seed: int
) -> None:
    """The choice after j drafts equals the choice with those drafts as output."""
    params = SamplingParams(max_tokens=99, **fields)
    prompt = [1, *prompt]
    sampler, decisions = one_row(params, prompt, output, drafts)
    logits = torch.randn(len(drafts) + 1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    chosen = sampler.choose(logits.clone(), decisions)
    for j in range(len(drafts) + 1):
        exact = plain_definition(logits[j], params, prompt, output + drafts[:j], [0, 3])
        noise = gumbel_noise(torch.tensor([params.seed]), decisions.position[j : j + 1], 0, VOCAB)[0]
        assert int(chosen[j]) == int((exact + noise).argmax())


@given(
    rows=st.lists(st.lists(st.integers(-6, 6), min_size=8, max_size=8), min_size=1, max_size=4),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.3, 1e-6, 0.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(deadline=None)
def test_threshold_with_ties(rows: list[list[int]], top_k: int, top_p: float, min_p: float) -> None:
    """Tokens that tie with the last kept one are kept, and so is the most likely token."""
    logits = torch.tensor(rows, dtype=torch.float64) / 2
    n = len(rows)
    vocab = VocabShard(0, 8, 8, Group.single())
    asked = torch.full((n,), top_k), torch.full((n,), top_p).double(), torch.full((n,), min_p).double()
    least = vocab.cut(logits, *asked, candidates=top_k or (8 if 0 < top_p < 1 else 1))
    for row, threshold in zip(logits, least.tolist(), strict=True):
        kept = row[row >= threshold]
        assert float(row.max()) >= threshold
        assert threshold in row.tolist() or min_p > 0 or threshold == -math.inf
        if top_k:
            kth = float(row.sort(descending=True).values[min(top_k, 8) - 1])
            assert float(kept.min()) >= kth
        if min_p == 0 and not top_k:
            rest = row.softmax(0)[row > threshold].sum()
            whole = float(row.softmax(0)[row >= threshold].sum())
            assert top_p == 1 or float(rest) < max(top_p, 1e-9) <= whole + 1e-9


def test_logprobs_are_of_the_unchanged_logits() -> None:
    params = SamplingParams(temperature=2.0, top_k=2, logit_bias={5: 50.0}, logprobs=3)
    sampler, decisions = one_row(params, [1, 2], [], [4])
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    report = sampler.logprobs(logits, decisions)
    assert report is not None
    exact = logits.log_softmax(-1)
    chosen = sampler.choose(logits, decisions)
    assert chosen.tolist() == [5, 5]
    result = report(chosen)
    torch.testing.assert_close(result.chosen, exact[:, 5])
    torch.testing.assert_close(result.top, exact.topk(3).values)
    assert torch.equal(result.top_ids, exact.topk(3).indices)


def chi_square(observed: Tensor, probabilities: Tensor) -> float:
    """Return the statistic divided by its 0.9999 quantile (Wilson-Hilferty). A correct sampler exceeds 1 with
    probability 1 in 10,000."""
    expected = probabilities * observed.sum()
    likely = expected > 5
    observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0
    statistic = float(((observed - expected)[keep] ** 2 / expected[keep]).sum())
    k = int(keep.sum()) - 1
    quantile = k * (1 - 2 / (9 * k) + 3.719 * math.sqrt(2 / (9 * k))) ** 3
    return statistic / quantile


SMALL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=256,
)


@pytest.mark.parametrize("gamma", [only_in_all(0), 3])
@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.9, "top_k": 8}])
def test_sampled_tokens_follow_the_exact_distribution(gamma: int, sampling: dict[str, Any]) -> None:
    """Requests that differ only in their seed: tokens at each position, grouped by the tokens before it, against
    the model's own probabilities."""
    model, count = tiny_model(config=SMALL), 2000 if is_all() else 1200
    engine = tiny_engine(
        model,
        gamma=gamma,
        budget=8,
        page_size=4,
        scheduler={"max_rows": 200, "max_batch_tokens": 2000, "max_waiting": 4000},
    )
    prompt = [1 + i % (VOCAB - 1) for i in range(21)]
    requests = [AddRequest(str(i), prompt, SamplingParams(max_tokens=5, seed=i, **sampling)) for i in range(count)]
    texts = [tuple(tokens(outputs)) for outputs in run(engine, requests).values()]
    checked = 0
    for position in range(5):
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for text in texts:
            by_prefix.setdefault(text[:position], []).append(text[position])
        for prefix, following in by_prefix.items():
            if len(following) < 150:
                continue
            observed = torch.bincount(torch.tensor(following), minlength=VOCAB).double()
            assert chi_square(observed, exact_distribution([*prompt, *prefix], sampling)) < 1
            checked += 1
    assert checked >= 3


def exact_distribution(context: list[int], sampling: dict[str, Any]) -> Tensor:
    """Compute next-token probabilities from the log-probabilities of one greedy request."""
    engine = tiny_engine(tiny_model(config=SMALL), gamma=0)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB)
    report = run(engine, [AddRequest("x", context, params)])["x"][0].logprobs
    assert report is not None
    logits = torch.empty(VOCAB, dtype=torch.float64)
    logits[report[0].top_ids] = torch.tensor(report[0].top_logprobs, dtype=torch.float64)
    return plain_definition(logits, SamplingParams(**sampling), [], [], []).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [1e-4, 1e30])
def test_the_widest_values_do_not_overflow(temperature: float, penalty: float, dtype: torch.dtype) -> None:
    """A token that may not be sampled is not, and some other one is."""
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, top_p=0.999, allowed_token_ids=(3, 4))
    sampler, decisions = one_row(params, [1, 3], [], [])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2), dtype=dtype) * 30
    assert sampler.choose(logits, decisions).item() in (3, 4)


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-30, 9e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_next_to_zero_are_greedy(temperature: float, dtype: torch.dtype) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=0.01)
    sampler, decisions = one_row(params, [1, 2], [], [])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2), dtype=dtype)
    plain, _ = one_row(SamplingParams(temperature=0.0, repetition_penalty=0.01), [1, 2], [], [])
    assert torch.equal(sampler.choose(logits.clone(), decisions), plain.choose(logits.clone(), decisions))
