"""Measure acceptance of real rounds under one verification rule, by running the engine.

Texts and rounds are those of serving: a round begins where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.corpus import BenchError
from bench.offline.acceptance_sweep import AcceptanceResult, Setup, seeded
from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from models.decoder import DecoderModel


def measure_rounds(
    config: EngineConfig,
    target: DecoderModel,
    prompts: Sequence[Sequence[int]],
    setup: Setup,
    verification: str,
    *,
    gamma: int,
    new_tokens: int,
    sampling: Sequence[SamplingParams],
) -> list[AcceptanceResult]:
    """Measure `new_tokens` after each of `prompts`. Returns one result per set of parameters in `sampling`.

    verification: "coupled" or "rejection". setup: what drafts. For the others see
    bench.offline.acceptance_sweep.measure.
    """
    context, batch = len(prompts[0]), len(prompts) * len(sampling)
    described = setup.config(config, gamma)
    described = described.model_copy(
        update={
            "speculation": described.speculation.model_copy(update={"verification": verification}),
            "scheduler": described.scheduler.model_copy(
                update={
                    "max_rows": batch,
                    "max_batch_tokens": max(described.scheduler.max_batch_tokens, batch * (gamma + 1) + 1),
                    "max_waiting": batch,
                }
            ),
            # Each prompt is sent once per set of parameters; every request computes its own.
            "cache": described.cache.model_copy(update={"num_pages": None, "prefix": False}),
        }
    )
    if context + new_tokens > target.max_positions:
        raise BenchError(
            f"{context} + {new_tokens} tokens of context and text, but the model has {target.max_positions}"
        )
    engine = Engine(described, model=target, progress=False)
    outputs: list[list[RequestOutput]] = [[] for _ in range(batch)]
    try:
        for i, (prompt, params) in enumerate(seeded(prompts, sampling)):
            whole = msgspec.structs.replace(params, max_tokens=new_tokens, ignore_eos=True)
            engine.add(AddRequest(str(i), list(prompt), whole))
        while engine.has_work():
            for output in engine.step():
                outputs[int(output.id)].append(output)
    finally:
        engine.close()
    results = []
    for i, params in enumerate(sampling):
        rounds = [out for row in outputs[i * len(prompts) : (i + 1) * len(prompts)] for out in row if out.drafted]
        results.append(
            AcceptanceResult.from_stats(
                setup,
                params,
                context=context,
                gamma=gamma,
                verification=verification,
                accepted=sum(out.accepted for out in rounds),
                # Drafts after the last token of a text were never verified.
                rejected=sum(out.accepted < min(out.drafted, len(out.tokens)) for out in rounds),
            )
        )
    return results
