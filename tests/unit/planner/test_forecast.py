"""Forecasts: expected acceptance, memory, and device descriptions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shapes import SHAPES, rank_weight_bytes
from planner.cost_model import PlacedModel
from planner.expected_acceptance import DRAFT_MODEL, Policy, expected_alpha
from planner.forecast import Deployment, ForecastError
from planner.hardware import GPUS, find_device


def place(model: str, ranks: int = 8) -> PlacedModel:
    return PlacedModel(model=SHAPES[model], device=GPUS["a100-80gb"], ranks=ranks)


class TestAcceptance:
    def test_published_values(self) -> None:
        contexts = (4000, 8000, 16000, 32000, 64000, 100_000)
        assert [expected_alpha("window", 512, context, draft_model=False) for context in contexts] == pytest.approx(
            [0.84, 0.83, 0.82, 0.81, 0.79, 0.79]
        )
        assert 0.82 < expected_alpha("window", 512, 11_000, draft_model=False) < 0.83

    @given(st.sampled_from(["window", "snapkv"]), st.integers(1, 4096), st.integers(1, 200_000), st.booleans())
    def test_laws(self, policy: Policy, budget: int, context: int, small: bool) -> None:
        alpha = expected_alpha(policy, budget, context, draft_model=small)
        assert 0 <= alpha <= (DRAFT_MODEL if small else 1)
        assert expected_alpha(policy, budget + 1, context, draft_model=small) >= alpha
        assert expected_alpha("snapkv", budget, context, draft_model=small) >= alpha

    def test_reading_everything_is_agreeing(self) -> None:
        assert expected_alpha("window", 512, 512, draft_model=False) == 1
        assert expected_alpha("window", None, 9000, draft_model=False) == 1


class TestMemory:
    """The fullest rank holds weights, and for each row the KV of its context and of gamma + 1 slots."""

    def deployment(self, draft: str = "self", policy: Policy = "window") -> Deployment:
        target = place("llama-3.1-8b")
        drafter = target if draft == "self" else replace(target, model=SHAPES[draft])
        return Deployment(model="m", draft=draft, target=target, drafter=drafter, policy=policy, alpha=0.8)

    def test_a_view_costs_nothing(self) -> None:
        found = self.deployment().forecast(4, 8000, budgets=(512,), gamma=3)
        assert found.draft_bytes == 0
        assert found.kv_bytes == 4 * 8004 * 16_384
        assert found.memory_bytes == found.weight_bytes + found.kv_bytes
        assert found.largest_batch == (72e9 - found.weight_bytes) // (8004 * 16_384)

    def test_a_private_cache(self) -> None:
        found = self.deployment(policy="snapkv").forecast(4, 8000, budgets=(512,), gamma=3)
        queries = (32 + 3) * 32 * 4 * 128 * 2  # layers, query heads of a rank, head size
        assert found.draft_bytes == 4 * ((512 + 3) * 16_384 + queries)

    @pytest.mark.parametrize(("budget", "kept"), [(512, 512 + 128), (8, 8 + 3), (None, 8004), (9000, 9000 + 2250)])
    def test_a_draft_model(self, budget: int | None, kept: int) -> None:
        """A window, plus room for a block of the prompt or for its drafts; or the whole context."""
        found = self.deployment("llama-3.2-1b").forecast(4, 8000, budgets=(budget,), gamma=3)
        weights = rank_weight_bytes(SHAPES["llama-3.2-1b"], 8, 2)
        assert found.draft_bytes == weights + 4 * kept * 2 * 16 * 64 * 2

    def test_a_draft_model_that_chooses(self) -> None:
        found = self.deployment("llama-3.2-1b", "snapkv").forecast(4, 8000, budgets=(512,), gamma=3)
        weights, token = rank_weight_bytes(SHAPES["llama-3.2-1b"], 8, 2), 2 * 16 * 64 * 2
        queries = 32 * 16 * 4 * 64 * 2
        assert found.draft_bytes == weights + 4 * ((8004 + 515) * token + queries)

    def test_largest_batch_is_largest(self) -> None:
        deployment = self.deployment("llama-3.2-1b")
        most = deployment.forecast(1, 8000, budgets=(512,), gamma=3).largest_batch
        assert deployment.forecast(most, 8000, budgets=(512,), gamma=3).fits
        assert not deployment.forecast(most + 1, 8000, budgets=(512,), gamma=3).fits

    @pytest.mark.parametrize("draft", ["self", "llama-3.2-1b"])
    @pytest.mark.parametrize("policy", ["window", "snapkv"])
    @pytest.mark.parametrize("budget", [None, 512])
    def test_shared_tokens_are_kept_once(self, draft: str, policy: Policy, budget: int | None) -> None:
        deployment = self.deployment(draft, policy)
        apart = deployment.forecast(4, 8000, budgets=(budget,), gamma=3)
        found = deployment.forecast(4, 8000, budgets=(budget,), gamma=3, shared=6000)
        assert found.kv_bytes == (6000 + 4 * 2004) * 16_384 == apart.kv_bytes - 3 * 6000 * 16_384
        keeps_context = draft != "self" and (policy == "snapkv" or budget is None)
        saved = 3 * 6000 * 2 * 16 * 64 * 2 if keeps_context else 0
        assert found.draft_bytes == apart.draft_bytes - saved
        assert found.memory_bytes == found.weight_bytes + found.kv_bytes + found.draft_bytes

    @pytest.mark.parametrize("shared", [1, 4000, 8000])
    def test_largest_batch_is_largest_where_tokens_are_shared(self, shared: int) -> None:
        deployment = self.deployment("llama-3.2-1b")
        most = deployment.forecast(1, 8000, budgets=(512,), gamma=3, shared=shared).largest_batch
        found = deployment.forecast(most, 8000, budgets=(512,), gamma=3, shared=shared)
        assert found.fits
        assert found.memory_bytes <= found.usable_bytes
        assert not deployment.forecast(most + 1, 8000, budgets=(512,), gamma=3, shared=shared).fits

    def test_drafts_with_caches_share_no_reads(self) -> None:
        """A context within the budget is read whole: once for all rows from the target's pages, but not from caches."""
        rows, context = 64, 500
        times = {}
        for draft in ("self", "llama-3.2-1b"):
            for policy in ("window", "snapkv"):
                for budget in (512, None):
                    deployment = self.deployment(draft, policy)
                    apart, sharing = (
                        deployment.forecast(rows, context, budgets=(budget,), gamma=3, shared=shared).t_draft_ms
                        for shared in (0, context)
                    )
                    times[draft, policy, budget] = sharing < apart
        assert {key for key, shares in times.items() if shares} == {
            ("self", "window", 512), *((draft, policy, None) for draft, policy, _ in times)
        }  # fmt: skip

    def test_more_shared_than_there_is(self) -> None:
        with pytest.raises(ForecastError, match="a context of 8000 tokens cannot begin with 8001 shared ones"):
            self.deployment().forecast(4, 8000, budgets=(512,), gamma=3, shared=8001)

    def test_weights_that_do_not_fit(self) -> None:
        target = place("llama-3.1-70b", ranks=1)
        alone = Deployment(model="m", draft="self", target=target, drafter=target, policy="window", alpha=None)
        found = alone.forecast(1, 1000, budgets=(512,), gamma=None)
        assert (found.fits, found.largest_batch) == (False, 0)


def test_this_cpu() -> None:
    whole, half = find_device("cpu", 1), find_device("cpu", 2)
    assert half.memory == whole.memory / 2
    assert min(whole.flops, whole.bandwidth, whole.link) > 1e6
