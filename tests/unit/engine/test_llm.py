"""The offline API and the commands that use it, on a tiny model with a real tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import magicdec
from engine.config.deployment import ConfigError
from engine.llm import LLM, Prompt
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from engine.scheduler.validation import RequestError
from server.cli.app import app
from tests.support.profiles import whole_test_only_in_all
from tests.support.tiny import write_model

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(str(directory), dtype="float64", cache={"memory_gb": 0.2}) as made:
        yield made


def test_the_package_exports_the_offline_api() -> None:
    assert (magicdec.LLM, magicdec.SamplingParams) == (LLM, SamplingParams)


def test_texts_token_ids_and_lists_of_either(llm: LLM) -> None:
    ids = llm.tokenizer.encode("A whale")
    (alone,) = llm.generate("A whale", SAMPLED)
    assert llm.generate(ids, SAMPLED)[0].token_ids == alone.token_ids
    two: list[Prompt] = ["A whale", ids]
    both = llm.generate(two, [SAMPLED, SAMPLED])
    assert [completion.text for completion in both] == [alone.text, alone.text]
    assert alone.prompt_token_ids == ids
    assert len(alone.token_ids) == 24
    assert alone.finish_reason == "length"
    assert alone.text == llm.tokenizer.decode(ids + alone.token_ids)[len("A whale") :]


def test_streams_side_by_side_and_beside_generate(llm: LLM) -> None:
    expected = [completion.text for completion in llm.generate(["one", "two", "three"], SAMPLED)]
    first, second = llm.stream("one", SAMPLED), llm.stream("two", SAMPLED)
    texts = [next(first).text, next(second).text]
    assert llm.generate("three", SAMPLED)[0].text == expected[2]
    texts[1] += "".join(piece.text for piece in second)
    texts[0] += "".join(piece.text for piece in first)
    assert texts == expected[:2]


def test_salts_reach_the_engine_and_completions_have_the_cached_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says the number in its first output."""
    salts: dict[str, str] = {}
    add, step = llm.engine.add, llm.engine.step

    def recorded(request: AddRequest) -> None:
        salts[request.id] = request.cache_salt
        add(request)

    def told() -> list[RequestOutput]:
        found = {"a": 16, "b": 32}
        outputs = step()
        for output in outputs:
            output.cached_tokens = found.get(salts.pop(output.id, ""), 0)
        return outputs

    monkeypatch.setattr(llm.engine, "add", recorded)
    monkeypatch.setattr(llm.engine, "step", told)
    assert [each.num_cached_tokens for each in llm.generate(["one", "two"], SAMPLED, cache_salt="a")] == [16, 16]
    assert [piece.completion.num_cached_tokens for piece in llm.stream("one", SAMPLED, cache_salt="b")][-1] == 32
    assert llm.generate("one", SAMPLED)[0].num_cached_tokens == 0


def test_a_prompt_that_begins_like_an_earlier_one(directory: Path) -> None:
    prompt = list(range(10, 60))
    with LLM(str(directory), dtype="float64", cache={"memory_gb": 0.2}) as llm:
        first, second = (llm.generate(prompt, SAMPLED)[0] for _ in range(2))
        (salted,) = llm.generate(prompt, SAMPLED, cache_salt="tenant")
        longer = list(llm.stream(prompt + first.token_ids, SAMPLED))[-1].completion
        llm.reset_prefix_cache()
        (after_reset,) = llm.generate(prompt, SAMPLED)
    assert [each.num_cached_tokens for each in (first, second, salted, longer, after_reset)] == [0, 48, 0, 64, 0]
    assert first.token_ids == second.token_ids == salted.token_ids == after_reset.token_ids


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("one", SAMPLED)
    next(stream)
    assert llm.stats.running == 1
    stream.close()  # type: ignore[attr-defined]
    stats = llm.stats
    assert stats.running == stats.waiting == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_stop_string_ends_the_text_inside_a_round(llm: LLM) -> None:
    (free,) = llm.generate("one", SAMPLED)
    stop = free.text[9:12]
    (cut,) = llm.generate("one", SamplingParams(max_tokens=24, seed=3, ignore_eos=True, stop=(stop,)))
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert llm.stats.running == 0


def test_more_prompts_than_the_queue_takes(directory: Path) -> None:
    settings: dict[str, Any] = {"scheduler": {"max_rows": 2, "max_waiting": 1}, "cache": {"memory_gb": 0.2}}
    with LLM(str(directory), dtype="float64", **settings) as llm:
        completions = llm.generate(["a"] * 9, SamplingParams(max_tokens=2, temperature=0.0))
        assert len({completion.text for completion in completions}) == 1
        assert all(len(completion.token_ids) == 2 for completion in completions)
        llm.close()


@pytest.mark.parametrize(
    ("prompts", "fields"),
    [
        ("", {}),
        ([3, "a"], {}),
        (["a", 3], {}),
        ([10**9], {}),
        ("a", {"max_tokens": 0}),
        ("a", {"max_tokens": 10**6}),
        ("a", {"stop": "a string"}),
        ("a", {"seed": 2**64}),
        ("a", {"top_k": 2**63}),
        ("a", {"logprobs": 400}),
        ("a", {"repetition_penalty": 0.0}),
        ("a", {"logit_bias": {10**6: 1.0}}),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm: LLM, prompts: Any, fields: Any) -> None:
    rounds = llm.stats.rounds
    with pytest.raises(ValueError):  # noqa: PT011  (RequestError or msgspec's ValidationError)
        llm.generate(["fine", prompts] if isinstance(prompts, str) else prompts, SamplingParams(**fields))
    assert llm.stats.rounds == rounds
    assert llm.stats.waiting == 0


def test_wrong_arguments(llm: LLM, directory: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [SAMPLED])
    with pytest.raises(RequestError, match="expected a string as cache_salt, not int"):
        llm.generate("a", SAMPLED, cache_salt=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        SamplingParams(temperature=float("nan"))
    with pytest.raises(ConfigError, match="page_size"):
        LLM(str(directory), cache={"page_size": 0})
    with pytest.raises(ConfigError, match="unknown setting"):
        LLM(str(directory), no_such=1)


def command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    # Typer prints errors boxed and wrapped.
    return result.exit_code, result.stdout, re.sub(r"[│\s]+", " ", result.stderr)


def test_generate_prints_the_same_text_with_and_without_speculation(directory: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It was the best of times, " * 20, encoding="utf-8")
    common = ["generate", "--prompt-file", str(prompt), "--model", str(directory), "--dtype", "float64"]
    common += ["--max-tokens", "40", "--temperature", "0.8", "--seed", "7", "--ignore-eos", "--stats"]
    plain = command(*common, "--speculation", "off")
    drafted = command(*common, "--speculation", "3", "--budget", "64", "--draft-weights", "fp8")
    assert plain[0] == drafted[0] == 0
    assert plain[1] == drafted[1]
    assert len(plain[1]) > 40
    assert "acceptance" in drafted[2]
    assert "acceptance" not in plain[2]
    assert "weights target dense KV dense, " in plain[2]
    assert "weights target dense, drafts fp8 KV dense, " in drafted[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a prompt"),
        (["a", "--speculation", "some"], "off"),
        (["a", "--top-p", "2"], "top_p"),
        (["\udcff"], "UTF-8"),
    ],
)
def test_generate_refuses(arguments: list[str], says: str, directory: Path) -> None:
    code, _, error = command("generate", "--model", str(directory), *arguments)
    assert code == 2
    assert says in error


def test_bench_decode_writes_what_it_measured(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = ["bench", "decode", "--model", str(directory), "--dtype", "float32", "--budget", "64"]
    arguments += ["--batch", "1,3", "--context", "200", "--new-tokens", "12", "--speculation", "off,2"]
    code, out, error = command(*arguments, "--json", str(target))
    assert code == 0, error
    results = json.loads(target.read_text())
    assert [(r["batch"], r["speculation"]) for r in results] == [(1, "off"), (1, 2), (3, "off"), (3, 2)]
    for result in results:
        assert result["context"] == 200
        assert result["tokens_per_second"] > 0
        plain = result["speculation"] == "off"
        assert result["policy"] == ("none" if plain else "window")
        assert (result["acceptance"] is None) == plain == (result["t_draft_ms"] is None)
        assert result["t_target_ms"] > 0 < result["t_verify_ms"]
        assert result["mean_context"] > 200
    plain, drafted = results[2:]
    # A plain step reads every row's context once per token; a round reads it once for all the tokens it yields.
    per_token = plain["kv_bytes_per_token"] / plain["mean_context"]
    assert per_token == pytest.approx(results[0]["kv_bytes_per_token"] / results[0]["mean_context"], rel=0.01)
    assert drafted["kv_bytes_per_token"] < plain["kv_bytes_per_token"] * 1.5
    assert "sequential read" in out


@whole_test_only_in_all
def test_bench_decode_of_several_policies(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = ["bench", "decode", "--model", str(directory), "--dtype", "float32", "--budget", "96"]
    arguments += ["--batch", "2", "--context", "200", "--new-tokens", "8", "--speculation", "off,1,3"]
    code, out, error = command(*arguments, "--policy", "window,topk,snapkv", "--json", str(target))
    assert code == 0, error
    results = json.loads(target.read_text())
    found = [(r["policy"], r["speculation"]) for r in results]
    assert found == [("none", "off"), *((policy, gamma) for policy in ("window", "topk", "snapkv") for gamma in (1, 3))]
    for result in results[1:]:
        gamma, alpha = result["speculation"], result["acceptance"]
        tokens = sum(alpha**i for i in range(gamma + 1))
        round_ms = gamma * result["t_draft_ms"] + result["t_verify_ms"]
        assert result["t_target_ms"] == results[0]["t_target_ms"]
        assert result["predicted"] == pytest.approx(tokens * result["t_target_ms"] / round_ms)
    assert results[0]["predicted"] is None
    assert "x model" in out


@whole_test_only_in_all
def test_bench_decode_of_a_draft_model(directory: Path, tmp_path: Path) -> None:
    """The draft is the target itself, over KV of its own: it is never wrong once its KV of the prompts exists, and
    computing that is not measured."""
    target = tmp_path / "results.json"
    arguments = ["bench", "decode", "--model", str(directory), "--dtype", "float64", "--draft", str(directory)]
    arguments += ["--policy", "all", "--batch", "3", "--context", "400", "--new-tokens", "8"]
    code, _, error = command(*arguments, "--speculation", "off,2", "--json", str(target))
    assert code == 0, error
    plain, drafted = json.loads(target.read_text())
    assert (plain["gamma"], drafted["gamma"], drafted["acceptance"]) == (0.0, 2.0, 1.0)


def test_bench_decode_refuses_what_does_not_fit(directory: Path, tmp_path: Path) -> None:
    common = ["bench", "decode", "--model", str(directory)]
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    for arguments, says in (
        (["--batch", "0"], "positive"),
        (["--json", str(tmp_path / "no" / "x.json")], "is not a directory"),
        (["--temperature", "-1"], "temperature"),
        (["--new-tokens", "0"], "at least 1"),
        (["--policy", "window,wide"], "'wide' is not one of window, verified, "),
    ):
        code, _, error = command(*common, *arguments)
        assert code == 2
        assert says in error
    for arguments, says in ((["--text", str(short)], "fewer than"), (["--context", "90000"], "tokens")):
        result = CliRunner().invoke(app, [*common, *arguments])
        assert says in str(result.exception)
