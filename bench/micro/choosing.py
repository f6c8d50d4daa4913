"""What choosing the KV that drafts read costs (policy `verified`): its rounds beside those of a window.

Rounds of two engines alternate, with the same weights, rows and γ. The verify passes of one count votes and rank pages;
those of the other do not. Its drafts list pages per layer, as many as the window has.

    python -m bench.micro.choosing --rows 16 --context 7500 --gamma 4
"""

from __future__ import annotations

import argparse
from statistics import median

from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from bench.machine import describe_processor
from bench.micro.blank_rounds import BlankRounds, cpu_config
from engine.config.kv import KVConfig, VerifiedConfig, WindowConfig
from engine.plan import RoundResult
from engine.worker.loading import load_target

_SINK = 16


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512, help="KV tokens that the window reads.")
    parser.add_argument("--rounds", type=int, default=20, help="Rounds of each engine.")
    add_format_flags(parser)
    arguments = parser.parse_args()
    config = cpu_config(arguments.model, arguments.rows, arguments.gamma, read_format_flags(arguments))
    model = load_target(config, progress=False)
    # One page of the window is the last one, and on average half of it counts; so is the page after a choice.
    page = config.cache.page_size
    chosen = arguments.budget - -(-_SINK // page) * page - page
    policies: dict[str, KVConfig] = {
        "window": WindowConfig(budget=arguments.budget, sink=_SINK),
        "verified": VerifiedConfig(policy="verified", budget=chosen, sink=_SINK),
    }
    engines = {}
    for name, kv in policies.items():
        speculation = config.speculation.model_copy(update={"kv": kv})
        own = config.model_copy(update={"speculation": speculation})
        engines[name] = BlankRounds(own, arguments.rows, arguments.context, arguments.gamma, arguments.rounds, model)
    found: dict[str, list[RoundResult]] = {name: [] for name in engines}
    for _ in range(arguments.rounds):
        for name, rounds in engines.items():
            found[name].append(rounds.step())
    for rounds in engines.values():
        rounds.close()
    print(f"{describe_processor()}: {arguments.rows} rows of {arguments.context} tokens, gamma {arguments.gamma}")
    print("policy     drafts ms  verify pass ms  round ms")
    for name, results in found.items():
        drafts, passes = (1e3 * median(times) for times in zip(*map(_times, results), strict=True))
        both = 1e3 * median(sum(_times(each)) for each in results)
        print(f"{name:10} {drafts:9.2f} {passes:15.2f} {both:9.2f}")
    more = [
        sum(_times(ours)) / sum(_times(other)) for ours, other in zip(found["verified"], found["window"], strict=True)
    ]
    print(f"choosing: {median(more) - 1:.1%} of a round (median over pairs)")


def _times(result: RoundResult) -> tuple[float, float]:
    return result.draft_seconds, result.verify_seconds


if __name__ == "__main__":
    main()
