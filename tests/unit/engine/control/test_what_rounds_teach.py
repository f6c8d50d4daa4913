"""Rounds teach the controller the times of what they were, and nothing else."""

from __future__ import annotations

from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.goodput import Batch, verify_bucket
from engine.control.step_times import StepSample, StepTimes
from engine.messages import AddRequest
from engine.ngram.ngram_drafts import NO_PROPOSAL, Proposal
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.request import Request
from engine.scheduler.scheduler import Scheduler


def controller_of_text() -> AutoGamma:
    """Make a controller for drafts from the text alone. A verify pass takes 10 ms, and 5 % longer for each draft."""
    samples = [
        StepSample(rows, context, gamma, 0.0, 0.01 * (1 + 0.05 * gamma), 0, gamma > 0)
        for rows in (1, 32)
        for context in (64, 256)
        for gamma in (0, 1, 8)
    ]
    return AutoGamma([DraftingModel(StepTimes(samples, lambda context, budget: context), [0])], 0, 8)


def row_at(number: int, *, decodes: bool = True) -> Request:
    """Return a running request that lacks one token: its last output, or the last one of its prompt."""
    params = SamplingParams(max_tokens=500)
    request = Request(AddRequest(id=str(number), prompt=[1] * 100, params=params, arrival=0.0), [], number)
    if decodes:
        request.tokens.append(5)
    request.num_computed, request.row = request.num_tokens - 1, number
    return request


def test_few_drafts_in_a_large_batch_teach_what_verify_passes_take() -> None:
    """A quarter of a draft per row is no plain step: what is learnt from it is read for the smallest gamma."""
    controller, rows = controller_of_text(), [row_at(number) for number in range(32)]
    gammas = [each.proposed for each in controller.choose(rows, 0, [Proposal([9] * 8, 16), *[NO_PROPOSAL] * 31])]
    assert 0 < sum(gammas) < 16
    work = [RowWork(row, 100, 1, gamma, True, proposed=[9] * gamma) for row, gamma in enumerate(gammas)]
    results = [RowResult(gamma, gamma, [9] * gamma + [3], None) for gamma in gammas]
    batch = Batch.from_requests(rows, 0, 0, [])
    plain, smallest = (verify_bucket(batch, controller._times, gamma) for gamma in (0, 1))
    calibration = controller._calibration
    before = calibration.factor("verify", smallest), calibration.factor("verify", plain)
    controller.observe(RoundPlan(1, [], [], work), rows, RoundResult(1, results, 0.0, 0.1))
    assert calibration.factor("verify", smallest) > before[0]
    assert ("verify", plain) not in calibration._own


def test_rounds_that_finish_prompts_teach_no_times() -> None:
    """Also where the rest of each prompt is one token."""
    controller = controller_of_text()
    rows = [row_at(0), *(row_at(number, decodes=False) for number in range(1, 9))]
    controller.choose(rows[:1])
    work = [RowWork(row, 100, 1, 0, True) for row in range(9)]
    controller.observe(RoundPlan(1, [], [], work), rows, RoundResult(1, [RowResult(0, 0, [3], None)] * 9, 0.0, 0.02))
    assert controller.report.decode_seconds == 0


def test_a_round_that_failed_leaves_no_choice_to_the_next() -> None:
    """The next one computes the row's tokens anew: its time is not that of the plain step that was chosen."""
    controller = controller_of_text()
    scheduler = Scheduler(
        kv=KVManager(100, 4),
        page_size=4,
        max_rows=1,
        max_batch_tokens=200,
        max_waiting=1,
        max_model_len=400,
        eos_token_ids=[0],
        controller=controller,
    )
    scheduler.add(AddRequest("a", [1] * 100, SamplingParams(max_tokens=50)))

    def commit() -> None:
        plan, requests = scheduler.schedule()
        scheduler.commit(plan, requests, RoundResult(1, [RowResult(0, 0, [3], None)], 0.0, 0.02))

    commit()
    scheduler.restart_rows(scheduler.schedule()[1])
    commit()
    assert (scheduler.running[0].num_output, controller.report.decode_seconds) == (2, 0)
    commit()
    assert (scheduler.running[0].num_output, controller.report.decode_seconds) == (3, 0.02)
