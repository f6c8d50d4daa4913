"""The cost model: its formulas against values computed by hand, and its monotonicity."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.config.speculation import SpeculationConfig
from kernels.weights.weight_bits import WEIGHT_BITS
from models.known_shapes import SHAPES
from planner.cost_model import GAMMA_MAX, SpeculationCost, acceptance_for, best_gamma, expected_tokens, speedup
from planner.hardware import GPUS, Device
from planner.placed_model import PUBLISHED, Efficiency, PlacedModel
from tests.support.small_shape import SMALL, SMALL_ACTIVE

ROUND = Device(name="round", flops=1e6, bandwidth=1e5, memory=1e6, link=1e4, all_reduce_s=0.001)
EXACT = Efficiency(flops=0.5, weights=0.8, kv=0.5, verify_attention=1.5, layer_s=0.01)

alphas = st.floats(0, 1)
gammas = st.integers(1, 16)
seconds = st.floats(1e-6, 10)
self_speculating = st.sampled_from(sorted(SHAPES))


def place(model: str, gpu: str = "a100-80gb", ranks: int = 8) -> PlacedModel:
    return PlacedModel(model=SHAPES[model], device=GPUS[gpu], ranks=ranks)


class TestTimesOfAnyOrigin:
    def test_expected_tokens(self) -> None:
        assert expected_tokens(3, 0.8) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
        assert expected_tokens(4, 1.0) == 5
        assert expected_tokens(4, 0.0) == 1
        assert expected_tokens(0, 0.3) == 1

    @given(gammas, st.floats(0, 0.999))
    def test_closed_form(self, gamma: int, alpha: float) -> None:
        assert expected_tokens(gamma, alpha) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))

    @given(gammas, alphas)
    def test_acceptance_of_tokens_per_round(self, gamma: int, alpha: float) -> None:
        tokens = expected_tokens(gamma, alpha)
        assert expected_tokens(gamma, acceptance_for(gamma, tokens)) == pytest.approx(tokens)

    def test_acceptance_at_the_ends(self) -> None:
        assert acceptance_for(6, 1) == pytest.approx(0, abs=1e-12)
        assert acceptance_for(6, 7) == 1
        for tokens in (0.9, 7.1):
            with pytest.raises(ValueError, match="rounds of 6 drafts give 1 to 7"):
                acceptance_for(6, tokens)

    def test_speedup(self) -> None:
        # 1.5 tokens in 0.2 + 1.1 times a plain step
        assert speedup(1, 0.5, 0.010, 0.002, 0.011) == pytest.approx(1.5 / 1.3)

    @given(alphas, seconds, seconds, seconds)
    def test_no_drafts_is_plain_decoding(self, alpha: float, target: float, draft: float, verify: float) -> None:
        assert speedup(0, alpha, target, draft, verify) == 1.0

    @given(gammas, seconds, seconds, st.floats(1, 5))
    def test_drafts_that_never_hold_never_pay(self, gamma: int, target: float, draft: float, longer: float) -> None:
        assert speedup(gamma, 0.0, target, draft, target * longer) < 1

    @given(alphas, seconds, seconds, st.floats(0, 1), st.integers(0, 16))
    def test_best_gamma_is_best(self, alpha: float, target: float, draft: float, slope: float, most: int) -> None:
        def verify(gamma: int) -> float:
            return target * (1 + slope * gamma)

        gamma, speed = best_gamma(alpha, target, draft, verify, most)
        speeds = [speedup(other, alpha, target, draft, verify(other)) for other in range(most + 1)]
        assert speed == max(speeds) >= 1
        assert gamma == speeds.index(speed)

    def test_gamma_max_is_what_settings_allow(self) -> None:
        assert SpeculationConfig(gamma=GAMMA_MAX).gamma == GAMMA_MAX
        with pytest.raises(ValueError, match="less than or equal"):
            SpeculationConfig(gamma=GAMMA_MAX + 1)

    def test_best_gamma_from_measured_times(self) -> None:
        """T_V as a table, as a start-up profile measures it. Speed-ups 1, 1.38, 1.57, 1.37."""
        table = [0.0100, 0.0110, 0.0115, 0.0190]
        gamma, speed = best_gamma(0.8, 0.010, 0.002, table.__getitem__, gamma_max=3)
        assert gamma == 2
        assert speed == pytest.approx((1 + 0.8 + 0.64) * 10 / (2 * 2 + 11.5))


class TestForward:
    def test_one_rank_bound_by_reading(self) -> None:
        placement = PlacedModel(model=SMALL, device=ROUND, ranks=1, efficiency=EXACT)
        linear = SMALL_ACTIVE * 2 / (1e5 * 0.8)  # larger than 2·3520·2 / (1e6 · 0.5)
        attention = 48 * 1000 / (1e5 * 0.5)  # 2·3·2·2·2 bytes a token
        assert placement.forward_seconds(2, 1000) == pytest.approx(linear + attention + 0.03)

    def test_one_rank_bound_by_arithmetic(self) -> None:
        placement = PlacedModel(model=SMALL, device=ROUND, ranks=1, efficiency=EXACT)
        linear = 2 * SMALL_ACTIVE * 10 * 20 / (1e6 * 0.5)
        attention = 4 * 3 * 4 * 2 * 1000 * 20 / (1e6 * 0.5)  # larger than 0.96 s of reading
        assert placement.forward_seconds(10, 1000, 20) == pytest.approx(linear + 1.5 * attention + 0.03)

    def test_weights_of_fewer_bits(self) -> None:
        """They are read sooner, but multiplied at the rate of 16 bits, except fp8 where the device multiplies these."""
        device = replace(ROUND, fp8_flops=2e6)
        times = {}
        for name in WEIGHT_BITS:
            placed = PlacedModel(model=SMALL, device=device, ranks=1, efficiency=EXACT, weights=name)
            times[name] = placed.forward_seconds(1, 0) - 0.03, placed.forward_seconds(100, 0) - 0.03
            assert placed.read_bytes(1, 0) == pytest.approx(times[name][0] * 1e5 * 0.8)
        assert times["int4"][0] == pytest.approx((2520 * 5 / 8 + 1000) / (1e5 * 0.8))
        assert times["int8"][0] == times["fp8"][0] == times["dense"][0] / 2
        assert times["int4"][1] == times["int8"][1] == times["dense"][1] == 2 * times["fp8"][1]

    def test_more_ranks_than_kv_heads(self) -> None:
        placement = PlacedModel(model=SMALL, device=ROUND, ranks=4, efficiency=EXACT)
        linear = SMALL_ACTIVE * 2 / (4 * 1e5 * 0.8)
        attention = 48 * 1000 / (2 * 1e5 * 0.5)  # two KV heads: as with two ranks
        communication = 2 * 3 * (0.001 + 2 * 3 / 4 * 2 * 10 * 2 / 1e4)
        assert placement.forward_seconds(2, 1000) == pytest.approx(linear + attention + communication + 0.03)

    def test_a_draft_reads_its_budget_only(self) -> None:
        target = place("llama-3.1-8b")
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        assert speculation.draft_seconds(4, 300) == target.forward_seconds(4, 4 * 300)
        assert speculation.draft_seconds(4, 32000) == target.forward_seconds(4, 4 * 512)
        assert replace(speculation, budget=None).draft_seconds(4, 32000) == speculation.target_seconds(4, 32000)

    def test_shared_tokens_are_read_once_and_computed_with_by_every_row(self) -> None:
        """8 rows of 1000 tokens, of which 900 are the same."""
        placement = PlacedModel(model=SMALL, device=ROUND, ranks=1, efficiency=EXACT)
        linear = 2 * SMALL_ACTIVE * 8 / (1e6 * 0.5)
        reading = 48 * (900 + 8 * 100) / (1e5 * 0.5)  # larger than 1.54 s of products
        assert placement.forward_seconds(8, 8000, shared_tokens=6300) == pytest.approx(linear + reading + 0.03)
        computing = 4 * 3 * 4 * 2 * 8000 * 5 / (1e6 * 0.5)
        seconds = placement.forward_seconds(8, 8000, 5, 6300)
        assert seconds == pytest.approx(5 * linear + 1.5 * computing + 0.03)

    @given(
        self_speculating,
        st.integers(1, 256),
        st.integers(0, 60_000),
        st.integers(0, 60_000),
        st.integers(0, 16),
        st.floats(1e3, 1e30),
    )
    def test_reads_of_a_shared_context(
        self, model: str, rows: int, same: int, own: int, gamma: int, flops: float
    ) -> None:
        """Bytes fall from B·(m_c + m_d) to m_c + B·m_d; products do not."""
        target = replace(place(model, ranks=1), device=replace(GPUS["h100"], flops=flops))
        cost = SpeculationCost(target=target, draft=target, budget=512, shared=same)
        seconds = cost.verify_seconds(rows, same + own, gamma)
        window = rows * target.window_tokens(same + own)
        by_reading = target.forward_seconds(rows, same + rows * own, gamma + 1, window_tokens=window)
        assert target.forward_seconds(rows, rows * (same + own), gamma + 1) >= seconds >= by_reading
        reading = replace(target, device=replace(target.device, flops=1e30))
        cost = replace(cost, target=reading, draft=reading)
        assert cost.verify_seconds(rows, same + own, gamma) == pytest.approx(
            reading.forward_seconds(rows, same + rows * own, gamma + 1, window_tokens=window)
        )
        computing = replace(target, device=replace(target.device, flops=1e3))
        cost = replace(cost, target=computing, draft=computing)
        assert cost.verify_seconds(rows, same + own, gamma) == pytest.approx(
            computing.forward_seconds(rows, rows * (same + own), gamma + 1)
        )

    @given(self_speculating, st.integers(1, 256), st.integers(1, 100_000), gammas, alphas)
    def test_nothing_shared_changes_nothing(
        self, model: str, rows: int, context: int, gamma: int, alpha: float
    ) -> None:
        target = place(model, ranks=1)
        cost = SpeculationCost(target=target, draft=target, budget=512, shared=0)
        assert cost.target_seconds(rows, context) == target.forward_seconds(rows, rows * context)
        assert cost.verify_seconds(rows, context, gamma) == target.forward_seconds(rows, rows * context, gamma + 1)
        window = rows * target.window_tokens(context)
        drafting = target.forward_seconds(rows, rows * min(context, 512), window_tokens=window)
        assert cost.draft_seconds(rows, context) == drafting
        alone = replace(cost, shared=context)  # with one row, nobody is there to share with
        assert alone.speedup(1, context, gamma, alpha) == cost.speedup(1, context, gamma, alpha)

    def test_drafts_that_share(self) -> None:
        target = place("llama-3.1-8b")
        everything = SpeculationCost(target=target, draft=target, budget=None, shared=3000)
        assert everything.draft_seconds(8, 4000) == everything.target_seconds(8, 4000)
        windows = replace(everything, budget=512)
        assert windows.draft_seconds(8, 4000) == target.forward_seconds(8, 8 * 512)
        assert windows.draft_seconds(8, 500) == target.forward_seconds(8, 8 * 500, shared_tokens=7 * 500)
        caches = replace(windows, draft_shares=False)
        assert caches.draft_seconds(8, 500) == target.forward_seconds(8, 8 * 500)

    @given(self_speculating, st.sampled_from(sorted(GPUS)), st.integers(1, 256), st.integers(1, 100_000))
    def test_nothing_gets_cheaper_by_being_more(self, model: str, gpu: str, rows: int, context: int) -> None:
        placement = place(model, gpu, ranks=1)
        time = placement.forward_seconds(rows, rows * context)
        assert placement.forward_seconds(rows + 1, rows * context) >= time
        assert placement.forward_seconds(rows, rows * context + 1) >= time
        assert placement.forward_seconds(rows, rows * context, 2) >= time


class TestSpeedUp:
    @given(
        self_speculating,
        st.sampled_from(sorted(GPUS)),
        st.integers(1, 128),
        st.integers(513, 60_000),
        st.floats(1, 2),
        gammas,
        alphas,
    )
    def test_grows_with_context(
        self, model: str, gpu: str, rows: int, context: int, longer: float, gamma: int, alpha: float
    ) -> None:
        """Self-speculation at the same acceptance, while attention is bound by reading KV."""
        target = place(model, gpu, ranks=1)
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        shape, flops = target.model, target.device.flops * target.efficiency.flops
        products = 4 * shape.num_layers * shape.num_heads * shape.head_dim * (gamma + 1)
        assume(target.kv_token_seconds > products / flops)
        before = speculation.speedup(rows, context, gamma, alpha)
        after = speculation.speedup(rows, int(context * longer), gamma, alpha)
        assert after >= before * (1 - 1e-9)

    @given(
        st.sampled_from(["llama-2-7b-32k", "llama-3.1-8b"]),
        st.sampled_from(["a100-80gb", "h100", "h200"]),
        st.integers(8, 128),
        st.integers(24_000, 128_000),
        st.floats(0.7, 0.95),
    )
    def test_grows_with_batch_where_kv_is_what_is_read(
        self, model: str, gpu: str, rows: int, context: int, alpha: float
    ) -> None:
        target = place(model, gpu)
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        assert (
            speculation.best_gamma(2 * rows, context, alpha)[1]
            >= speculation.best_gamma(rows, context, alpha)[1] - 0.01
        )

    @given(
        self_speculating,
        st.sampled_from(sorted(GPUS)),
        st.integers(1, 256),
        st.integers(513, 100_000),
        st.floats(0, 1),
        st.floats(0, 1),
        gammas,
        alphas,
    )
    def test_falls_with_what_is_shared(
        self, model: str, gpu: str, rows: int, context: int, less: float, more: float, gamma: int, alpha: float
    ) -> None:
        target = place(model, gpu, ranks=1)
        less, more = sorted((less, more))
        cost = SpeculationCost(target=target, draft=target, budget=512, shared=int(less * context))
        sharing = replace(cost, shared=int(more * context))
        before, after = (each.speedup(rows, context, gamma, alpha) for each in (cost, sharing))
        assert after <= before * (1 + 1e-9)

    @given(
        st.sampled_from(["llama-2-7b-32k", "llama-3.1-8b"]), st.integers(64, 256), st.integers(8000, 128_000), gammas
    )
    def test_gains_little_where_everything_is_shared(self, model: str, rows: int, context: int, gamma: int) -> None:
        target = place(model)
        cost = SpeculationCost(target=target, draft=target, budget=512)
        assert replace(cost, shared=context).best_gamma(rows, context, 0.85)[1] < 1.1
        assert cost.best_gamma(rows, 4 * context, 0.85)[1] > 1.5

    @given(self_speculating, st.integers(1, 256), st.integers(1, 100_000), gammas)
    def test_never_pays_without_agreement(self, model: str, rows: int, context: int, gamma: int) -> None:
        target = place(model, ranks=1)
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        assert speculation.speedup(rows, context, gamma, 0.0) < 1
        assert speculation.best_gamma(rows, context, 0.0) == (0, 1.0)

    @given(self_speculating, st.integers(1, 256), st.integers(1, 100_000), gammas)
    def test_a_draft_that_reads_everything_never_pays(self, model: str, rows: int, context: int, gamma: int) -> None:
        target = place(model, ranks=1)
        assert SpeculationCost(target=target, draft=target, budget=None).speedup(rows, context, gamma, 1.0) < 1


class TestBreakEven:
    @pytest.mark.parametrize("gamma", [None, 2, 4])
    @pytest.mark.parametrize("rows", [16, 128])
    def test_is_where_it_begins_to_pay(self, gamma: int | None, rows: int) -> None:
        target = place("llama-3.1-8b")
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        context = speculation.break_even(rows, lambda _: 0.82, gamma)
        assert context is not None

        def speed(length: int) -> float:
            if gamma is None:
                return speculation.best_gamma(rows, length, 0.82)[1]
            return speculation.speedup(rows, length, gamma, 0.82)

        assert speed(context) > 1 >= speed(context - 1)

    def test_never(self) -> None:
        target = place("llama-3.1-8b")
        speculation = SpeculationCost(target=target, draft=target, budget=512)
        assert speculation.break_even(32, lambda _: 0.1) is None

    def test_limit_by_hand(self) -> None:
        """S* = [(2γ + 1 − Ω)·a/b + γ·K] / (Ω − 1), with a = 2P/F, b = k/M."""
        ideal = Efficiency(flops=1, weights=1, kv=1, verify_attention=1, layer_s=0)
        target = PlacedModel(model=SMALL, device=ROUND, ranks=1, efficiency=ideal)
        speculation = SpeculationCost(target=target, draft=target, budget=64)
        tokens, ratio = 1 + 0.8 + 0.64, (2 * SMALL_ACTIVE / 1e6) / (48 / 1e5)
        expected = ((2 * 2 + 1 - tokens) * ratio + 2 * 64) / (tokens - 1)
        assert speculation.break_even_limit(2, 0.8) == pytest.approx(expected)
        assert speculation.break_even_limit(2, 0.0) == math.inf

    @pytest.mark.parametrize("shared", [0, 2000])
    @pytest.mark.parametrize("draft", ["llama-3.1-8b", "llama-3.2-1b"])
    def test_limit_is_what_large_batches_come_to(self, draft: str, shared: int) -> None:
        target = replace(place("llama-3.1-8b", ranks=1), efficiency=replace(PUBLISHED, layer_s=0.0))
        speculation = SpeculationCost(
            target=target, draft=replace(target, model=SHAPES[draft]), budget=512, shared=shared
        )
        context = speculation.break_even(10**7, lambda _: 0.8, 3)
        assert context == pytest.approx(speculation.break_even_limit(3, 0.8), rel=0.01)
