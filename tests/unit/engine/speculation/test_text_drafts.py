"""Drafts from the text, alone and before a model's: output is unchanged, and accepted tokens are counted by origin."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from engine.config.deployment import ConfigError
from engine.config.speculation import SpeculationConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.ngram.text_store import build_store, fingerprint
from engine.params import SamplingParams
from engine.scheduler.controller import Way
from models.decoder import DecoderModel
from tests.support.engines import TINY, Scripted, complete, complete_all, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.tiny import TOKENS
from tests.support.workloads import SAMPLING, kv_of, prompt_of

WAYS = [
    ("ngram", None, "window"),
    *(("together", None, policy) for policy in ("relative", "verified")),
    ("together", "model", "snapkv"),
    ("together", "both", "window"),
    *(only_in_all("together", None, policy) for policy in ("window", "quest", "snapkv", "topk", "all")),
    *(only_in_all("together", "model", policy) for policy in ("window", "relative", "quest", "all")),
    *(only_in_all("together", "both", policy) for policy in ("snapkv", "quest")),
]
"""Drafters, whether there is a draft model, or both it and the target draft, and policies of their drafts.
test_drafters has the others without drafts from the text."""


@cache
def model() -> DecoderModel:
    return tiny_model()


def repeating(length: int, seed: int) -> list[int]:
    """Build a prompt whose parts come again."""
    rng = random.Random(seed)
    parts = [prompt_of(rng.randrange(2, 12), seed + i) for i in range(3)]
    text: list[int] = []
    while len(text) < length:
        text += rng.choice(parts)
    return text[:length]


@pytest.fixture(scope="module")
def store(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of texts like the prompts."""
    file = tmp_path_factory.mktemp("store") / "store"
    build_store([repeating(90, seed) for seed in range(50)], fingerprint(tokenizer_dir / "tokenizer.json"), file)
    return file


@pytest.mark.parametrize(("drafter", "drafts", "policy"), WAYS)
@given(data=st.data())
@examples(3, 16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_is_unchanged(
    draft_dir: Path,
    tokenizer_dir: Path,
    store: Path,
    drafter: str,
    drafts: str | None,
    policy: str,
    data: st.DataObject,
) -> None:
    """Rows with none, some or all of their drafts from the text or a store, in ragged batches that rows join and leave,
    chunked prompts, a prefix cache and preemption."""
    page_size = data.draw(st.sampled_from([4, 8]))
    gammas = data.draw(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=4))
    pages = data.draw(st.sampled_from([None, 200 // page_size + 4]))
    speculation: dict[str, Any] = {"drafter": drafter, "kv": kv_of(policy, page_size, data.draw(st.integers(1, 5)), 0)}
    if drafts is not None:
        speculation["model"] = str(draft_dir)
    if data.draw(st.booleans()):
        speculation["store"] = str(store)
    if drafts == "both":
        speculation |= {"gamma_max": 6, "self_kv": speculation["kv"]}
    engine = tiny_engine(
        model(),
        directory=tokenizer_dir,
        gamma="auto" if drafts == "both" else 6,  # type: ignore[arg-type]
        page_size=page_size,
        max_model_len=200,
        cache={"num_pages": pages, "prefix": data.draw(st.booleans())},
        scheduler={"max_batch_tokens": data.draw(st.sampled_from([20, 64]))},
        speculation=speculation,
    )
    if drafter == "together" and max(map(max, gammas)):
        ways = [Way(), Way(0, "self"), Way(0, "self")] if drafts == "both" else [Way()]
        engine._scheduler.controller = Scripted(gammas * 400, ways)
    plain = tiny_engine(model(), gamma=0, page_size=16, max_model_len=200)
    rng = random.Random(data.draw(st.integers(0, 1000)))
    requests, joins = [], {}
    for i in range(rng.randrange(1, 6)):
        params = SamplingParams(
            max_tokens=rng.randrange(1, 60 if is_all() else 30),
            seed=i,
            max_draft_tokens=rng.choice([None, None, 0, 2]),
            ignore_eos=rng.random() < 0.7,
            **rng.choice(SAMPLING),
        )
        requests.append(AddRequest(str(i), repeating(rng.choice([1, 3, 30, 90]), rng.randrange(99)), params))
        joins[str(i)] = rng.randrange(12)
    outputs = run(engine, requests, joins=joins)
    assert {id: tokens(each) for id, each in outputs.items()} == complete_all(plain, requests)


def looping(drafter: str, **speculation: Any) -> tuple[Engine, list[int]]:
    """Greedily complete a prompt after which the tiny model repeats itself; returns the engine and the output."""
    engine = tiny_engine(model(), gamma=4, max_model_len=400, speculation={"drafter": drafter, **speculation})
    return engine, complete(
        engine, prompt_of(20, 1), SamplingParams(max_tokens=200 if is_all() else 130, ignore_eos=True)
    )


@cache
def looped() -> list[int]:
    """What `looping` makes of drafts of the model itself."""
    return looping("self")[1]


@pytest.mark.parametrize("drafter", ["ngram", "together"])
def test_repetitions_are_drafted_from_the_text(drafter: str) -> None:
    engine, text = looping(drafter)
    stats = engine.stats()
    assert text == looped()
    assert 0 < stats.text_accepted_tokens <= stats.text_draft_tokens
    assert stats.text_accepted_tokens <= stats.accepted_tokens
    assert sum(stats.gamma_chosen[1:]) == stats.drafts
    if drafter == "ngram":
        assert stats.text_draft_tokens == stats.draft_tokens
        assert stats.draft_kv_tokens_read == 0


@pytest.mark.parametrize("gamma", [4, "auto"])
def test_a_store_drafts_what_it_contains(tokenizer_dir: Path, tmp_path: Path, gamma: int | str) -> None:
    """The text that a model will generate, in a store: with a fixed gamma nearly every draft is accepted."""
    settings: dict[str, Any] = {"max_model_len": 300, "directory": tokenizer_dir}
    plain = tiny_engine(model(), gamma=0, **settings)
    params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=4)
    prompt = prompt_of(20, 1)
    text = complete(plain, prompt, params)
    build_store([prompt + text], fingerprint(tokenizer_dir / "tokenizer.json"), tmp_path / "store")
    speculation = {"drafter": "ngram", "store": str(tmp_path / "store")}
    engine = tiny_engine(model(), gamma=gamma, speculation=speculation, **settings)  # type: ignore[arg-type]
    assert complete(engine, prompt, params) == text
    if gamma != "auto":
        stats = engine.stats()
        assert stats.text_accepted_tokens > 60
        assert stats.rejections < 10


def test_a_store_of_another_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    build_store([[1, 2, 3]], "another", tmp_path / "store")
    speculation = {"drafter": "ngram", "store": str(tmp_path / "store")}
    with pytest.raises(ConfigError, match=r"engine.speculation.store: .*another tokenizer"):
        tiny_engine(model(), gamma=2, directory=tokenizer_dir, speculation=speculation)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    for speculation, message in (
        ({"drafter": "self", "store": "s"}, "store is not for drafter: self or model"),
        ({"drafter": "ngram", "model": "m"}, "model is not for drafter: self or ngram"),
        ({"drafter": "model"}, "model is required with drafter: model"),
        ({"drafter": "ngram", "tensor_parallel_size": 1}, "that of a draft model, and there is none"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            tiny_engine(model(), gamma=2, speculation=speculation)


@pytest.mark.parametrize(
    ("settings", "source", "most"),
    [
        ({}, "together", 16),
        ({"model": "m"}, "together", 16),
        ({"gamma": 3}, "self", 3),
        ({"gamma": 3, "model": "m"}, "model", 3),
        ({"gamma": 3, "store": "s"}, "together", 3),
        ({"drafter": "self"}, "self", 8),
    ],
)
def test_the_drafter_that_is_chosen(settings: dict[str, object], source: str, most: int) -> None:
    speculation = SpeculationConfig.model_validate(settings)
    speculation.check(page_size=16, ranks=1)
    assert (speculation.source, speculation.max_draft_tokens) == (source, most)
    assert speculation.draft_model == settings.get("model")


@pytest.mark.parametrize(
    ("settings", "gammas"),
    [
        ({}, [*range(9), 12, 16]),
        ({"gamma_max": 10}, [*range(11), 14, 16]),
        ({"drafter": "ngram", "ngram_gamma_max": 9}, [*range(9), 9]),
        ({"drafter": "self"}, list(range(9))),
        ({"gamma": 3, "drafter": "together"}, [0, 1, 2, 3]),
        ({"gamma": 0}, [0]),
    ],
)
def test_few_verify_passes_are_captured(settings: dict[str, object], gammas: list[int]) -> None:
    assert SpeculationConfig.model_validate(settings).captured_gammas == gammas


@pytest.mark.parametrize("drafter", ["ngram", "together"])
def test_with_a_grammar(tokenizer_dir: Path, drafter: str) -> None:
    """Constrained rows are proposed only what their grammar allows, and their text is the same."""
    grammar = "start: /[ab]{200,}/"
    requests = [
        AddRequest(str(i), prompt_of(10, i), SamplingParams(max_tokens=50, seed=i, temperature=t, grammar=grammar))
        for i, t in enumerate((0.0, 1.0))
    ]
    shaped = tiny_model(config=replace(TINY, vocab_size=TOKENS, eos_token_ids=(2,)))
    settings: dict[str, Any] = {"max_model_len": 200, "directory": tokenizer_dir}
    plain = complete_all(tiny_engine(shaped, gamma=0, **settings), requests)
    engine = tiny_engine(shaped, gamma=3, speculation={"drafter": drafter}, **settings)
    proposed: list[int] = []
    propose = engine._ngrams.propose  # type: ignore[union-attr]

    def watch(rows: Any, limit: int) -> Any:
        found = propose(rows, limit)
        for row, proposal in zip(rows, found, strict=True):
            allowed = engine._worker.count_allowed(row.row, proposal.tokens)
            assert allowed == len(proposal.tokens)
            proposed.append(allowed)
        return found

    engine._ngrams.propose = watch  # type: ignore[union-attr, method-assign]
    assert complete_all(engine, requests) == plain
    assert sum(proposed) > 20
