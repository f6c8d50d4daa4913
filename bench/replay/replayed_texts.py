"""Command line of the programs that replay texts: which are written, and the times that rounds take."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bench.corpus import BenchError
from bench.tasks import TASKS, task_prompts
from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample
from engine.core import Engine
from engine.params import SamplingParams
from engine.worker.profiler import profile
from models.tokenizer import Tokenizer


def add_text_flags(parser: argparse.ArgumentParser, *, rows: int, new_tokens: int) -> None:
    """Add the flags. rows, new_tokens: defaults."""
    parser.add_argument("--model", default="default", help="model that writes")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS, help="see bench.tasks")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--rows", type=int, default=rows, help="texts of each task")
    parser.add_argument("--context", type=int, default=2000, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=new_tokens, help="output tokens")
    parser.add_argument("--text", type=Path, help="take texts from this file instead of Python's manual")
    parser.add_argument("--profile", type=Path, help="saved start-up profile; without it, one is measured")


def check_text_flags(given: argparse.Namespace) -> None:
    """Raise BenchError for sizes that leave nothing to replay."""
    if given.rows < 1 or given.new_tokens < 3:
        raise BenchError("--rows must be at least 1, --new-tokens at least 3")


def texts_to_write(
    given: argparse.Namespace, source: str, tokenizer: Tokenizer
) -> Iterator[tuple[str, float, Sequence[Sequence[int]], list[SamplingParams]]]:
    """Yield each task and temperature, with its prompts and their parameters. source: see task_prompts."""
    for task in given.task:
        prompts = task_prompts(task, tokenizer, source, count=given.rows, length=given.context)
        for temperature in given.temperature:
            params = [
                SamplingParams(temperature=temperature, max_tokens=given.new_tokens, ignore_eos=True, seed=seed)
                for seed in range(given.rows)
            ]
            yield task, temperature, prompts, params


def read_samples(given: argparse.Namespace, engine: Engine, config: EngineConfig) -> list[StepSample]:
    """Read the profile that is given, or measure the engine's."""
    if given.profile is None:
        return profile(engine.profiler, config)
    return msgspec.json.decode(given.profile.read_bytes(), type=list[StepSample])
