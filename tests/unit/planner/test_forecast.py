"""Forecasts: expected acceptance, memory, and device descriptions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.known_shapes import SHAPES
from models.shapes import active_parameters, rank_weight_bytes
from planner.cost_model import expected_tokens
from planner.expected_acceptance import DRAFT_MODEL, expected_alpha
from planner.forecast import Deployment, ForecastError
from planner.hardware import GPUS, find_device
from planner.placed_model import PlacedModel
from planner.policy_costs import POLICY_COSTS


def place(model: str, ranks: int = 8) -> PlacedModel:
    return PlacedModel(model=SHAPES[model], device=GPUS["a100-80gb"], ranks=ranks)


class TestAcceptance:
    def test_published_values(self) -> None:
        contexts = (4000, 8000, 16000, 32000, 64000, 100_000)
        assert [expected_alpha("window", 512, context, draft_model=False) for context in contexts] == pytest.approx(
            [0.84, 0.83, 0.82, 0.81, 0.79, 0.79]
        )
        assert 0.82 < expected_alpha("window", 512, 11_000, draft_model=False) < 0.83

    @given(st.sampled_from(sorted(POLICY_COSTS)), st.integers(1, 4096), st.integers(1, 200_000), st.booleans())
    def test_laws(self, policy: str, budget: int, context: int, small: bool) -> None:
        alpha = expected_alpha(policy, budget, context, draft_model=small)
        assert 0 <= alpha <= (DRAFT_MODEL if small else 1)
        assert expected_alpha(policy, budget + 1, context, draft_model=small) >= alpha
        assert alpha >= expected_alpha("window", budget, context, draft_model=small)

    def test_of_each_policy(self) -> None:
        """Rejections relative to those of sink + window, 0.16."""
        alphas = {each: expected_alpha(each, 512, 4000, draft_model=False) for each in POLICY_COSTS}
        expected = {"window": 0.84, "snapkv": 1 - 0.75 * 0.16, "verified": 1 - 0.32 * 0.16, "quest": 1 - 0.714 * 0.16}
        assert alphas == pytest.approx(expected, abs=1e-3)

    def test_reading_everything_is_agreeing(self) -> None:
        assert expected_alpha("window", 512, 512, draft_model=False) == 1
        assert expected_alpha("window", None, 9000, draft_model=False) == 1


class TestMemory:
    """The fullest rank holds weights, and for each row the KV of its context and of gamma + 1 slots."""

    def deployment(self, draft: str = "self", policy: str = "window") -> Deployment:
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

    @pytest.mark.parametrize(("budget", "kept"), [(512, 512 + 128), (32, 32 + 8), (None, 8004), (9008, 9008 + 2252)])
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

    def test_what_is_chosen_stays_where_it_is(self) -> None:
        found = self.deployment(policy="verified").forecast(4, 8000, budgets=(512,), gamma=3)
        assert found.draft_bytes == 0

    @pytest.mark.parametrize("shared", [0, 6000])
    def test_bounds_of_keys_are_kept_beside_the_pool(self, shared: int) -> None:
        """Two vectors as large as a key for each page: a 16th of the KV."""
        found = self.deployment(policy="quest").forecast(4, 8000, budgets=(512,), gamma=3, shared=shared)
        assert found.draft_bytes == found.kv_bytes / 16
        assert found.memory_bytes == found.weight_bytes + found.kv_bytes * 17 / 16
        everything = self.deployment(policy="quest").forecast(4, 8000, budgets=(None,), gamma=3, shared=shared)
        assert everything.draft_bytes == 0

    def test_bounds_of_a_draft_models_keys(self) -> None:
        found = self.deployment("llama-3.2-1b", "quest").forecast(4, 8000, budgets=(512,), gamma=3)
        weights = rank_weight_bytes(SHAPES["llama-3.2-1b"], 8, 2)
        assert found.draft_bytes == weights + 4 * 8004 * 2 * 16 * 64 * 2 * 17 / 16

    def test_largest_batch_is_largest(self) -> None:
        deployment = self.deployment("llama-3.2-1b")
        most = deployment.forecast(1, 8000, budgets=(512,), gamma=3).largest_batch
        assert deployment.forecast(most, 8000, budgets=(512,), gamma=3).fits
        assert not deployment.forecast(most + 1, 8000, budgets=(512,), gamma=3).fits

    @pytest.mark.parametrize("draft", ["self", "llama-3.2-1b"])
    @pytest.mark.parametrize("policy", ["window", "snapkv"])  # quest: test_bounds_of_keys_are_kept_beside_the_pool
    @pytest.mark.parametrize("budget", [None, 512])
    def test_shared_tokens_are_kept_once(self, draft: str, policy: str, budget: int | None) -> None:
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

    @pytest.mark.parametrize(
        ("draft", "policy", "budget", "message"),
        [
            ("self", "window", 40, r"speculation.kv.budget \(40\) must be a multiple of cache.page_size \(16\)"),
            ("self", "window", 16, "leaves no page for recent tokens"),
            ("self", "snapkv", 64, "leaves nothing to choose"),
            ("llama-3.2-1b", "verified", 512, "which a draft model does not read"),
            ("llama-3.2-1b", "verified", None, "which a draft model does not read"),
        ],
    )
    def test_what_a_server_refuses(self, draft: str, policy: str, budget: int | None, message: str) -> None:
        with pytest.raises(ForecastError, match=message):
            self.deployment(draft, policy).forecast(4, 8000, budgets=(512, budget), gamma=3)

    def test_weights_that_do_not_fit(self) -> None:
        target = place("llama-3.1-70b", ranks=1)
        alone = Deployment(model="m", draft="self", target=target, drafter=target, policy="window", alpha=None)
        found = alone.forecast(1, 1000, budgets=(512,), gamma=None)
        assert (found.fits, found.largest_batch) == (False, 0)


class TestDraftSteps:
    def test_bytes_read(self) -> None:
        """Of Llama-3.1-8B on one GPU: 131,072 bytes of KV per token. Chosen pages come with a page of first tokens and
        half a page and one token of new ones."""
        target = place("llama-3.1-8b", ranks=1)
        deployment = Deployment(model="m", draft="self", target=target, drafter=target, policy="window", alpha=0.8)
        weights = 2 * active_parameters(target.model)
        for policy, read in {"window": 512, "snapkv": 512, "verified": 537, "quest": 537}.items():
            found = replace(deployment, policy=policy).forecast(4, 8000, budgets=(512,), gamma=3)
            assert found.draft_row_read_bytes == read * 131_072
            assert found.draft_read_bytes == weights + 4 * found.draft_row_read_bytes
            short = replace(deployment, policy=policy).forecast(4, 300, budgets=(512,), gamma=3)
            assert short.draft_row_read_bytes == 300 * 131_072
        everything = deployment.forecast(4, 8000, budgets=(None,), gamma=3, shared=6000)
        assert everything.draft_read_bytes == weights + (6000 + 4 * 2000) * 131_072

    def test_time_of_choosing(self) -> None:
        """It is in the speed-up, and in none of the other times."""
        target = place("llama-3.1-8b", ranks=1)
        deployment = Deployment(model="m", draft="self", target=target, drafter=target, policy="window", alpha=0.8)
        found = {
            each: replace(deployment, policy=each).forecast(4, 8000, budgets=(512,), gamma=6) for each in POLICY_COSTS
        }
        rate = GPUS["a100-80gb"].bandwidth * 0.8
        votes = 32 * (2 * 2 * 32 + 3 * 8) * 4 * 4 * 8000 / 16 / rate
        bounds = 2 * 131_072 * 4 * 8000 / 16 / rate
        assert {each: row.t_choose_ms for each, row in found.items()} == pytest.approx(
            {"window": 0, "snapkv": 0, "verified": 1e3 * votes, "quest": 1e3 * bounds}
        )
        for row in found.values():
            taken = 6 * row.t_draft_ms + row.t_verify_ms + row.t_choose_ms
            assert row.speedup == pytest.approx(expected_tokens(6, 0.8) * row.t_target_ms / taken)
        everything = replace(deployment, policy="quest").forecast(4, 8000, budgets=(None,), gamma=6)
        assert everything.t_choose_ms == 0


def test_this_cpu() -> None:
    whole, half = find_device("cpu", 1), find_device("cpu", 2)
    assert half.memory == whole.memory / 2
    assert min(whole.flops, whole.bandwidth, whole.link) > 1e6
