"""llama.cpp as a contender, over a binding that records what each token sees: rows and turns that share prefixes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.peers.process import PEERS
from bench.peers.programs.driver import Driver, load_peer

VOCAB = 50


class FakeLlama(ModuleType):
    """Binding whose next token depends on all tokens of a sequence. sequences: KV by sequence, as {position: token}.
    computed: number of tokens that were decoded. parts: by call, the different numbers of tokens per sequence."""

    LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0
    __version__ = "0"

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.sequences: dict[int, dict[int, int]] = {}
        self.computed = 0
        self.parts: list[set[int]] = []
        self.unified = False
        self._logits: dict[int, np.ndarray[Any, Any]] = {}
        self.llama_speculative = SimpleNamespace(LlamaPromptLookupDecoding=self._drafter)
        self.sampled = 0  # added to the likeliest token to yield the sampled one

    def _drafter(self, num_pred_tokens: int) -> Any:
        """Return a drafter of right tokens, the last of which is wrong where 3 divides the length of the text. Rows
        whose length 5 divides get no drafts."""

        def draft(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            right = answer(ids.tolist(), num_pred_tokens, self.sampled)
            right[-1] = (right[-1] + (len(ids) % 3 == 0)) % VOCAB
            return np.array(right if len(ids) % 5 else [], dtype=np.intc)

        return draft

    def __getattr__(self, name: str) -> Any:
        if name.startswith("llama_"):
            return lambda *arguments: SimpleNamespace()
        raise AttributeError(name)

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embeddings: int, sequences: int) -> Any:
        ids = [[0] for _ in range(size)]
        return SimpleNamespace(
            token=[0] * size, pos=[0] * size, n_seq_id=[0] * size, seq_id=ids, logits=[False] * size, n_tokens=0
        )

    def llama_init_from_model(self, model: Any, params: Any) -> str:
        self.sequences, self.unified = {}, params.kv_unified
        return "context"

    def llama_get_memory(self, context: str) -> str:
        assert context == "context"
        return "memory"

    def llama_memory_seq_rm(self, memory: str, row: int, first: int, end: int) -> bool:
        assert end == -1
        self.sequences[row] = {at: token for at, token in self.sequences.get(row, {}).items() if at < first}
        return True

    def llama_memory_seq_cp(self, memory: str, source: int, target: int, first: int, end: int) -> None:
        assert self.unified  # otherwise only whole sequences can be copied
        copied = {at: token for at, token in self.sequences[source].items() if first <= at < end}
        self.sequences[target] = {**self.sequences[target], **copied}

    def llama_decode(self, context: str, batch: Any) -> int:
        self._logits = {}
        for i in range(batch.n_tokens):
            kv = self.sequences.setdefault(batch.seq_id[i][0], {})
            assert batch.pos[i] not in kv
            kv[batch.pos[i]] = batch.token[i]
            assert sorted(kv) == list(range(batch.pos[i] + 1))
            if batch.logits[i]:
                logits = np.zeros(VOCAB, dtype=np.float32)
                logits[expected_next([kv[at] for at in sorted(kv)])] = 1
                self._logits[i] = logits
        self.computed += batch.n_tokens
        self.parts.append(set(Counter(batch.seq_id[i][0] for i in range(batch.n_tokens)).values()))
        return 0

    def llama_get_logits_ith(self, context: str, index: int) -> Any:
        return np.ctypeslib.as_ctypes(self._logits[index])

    def llama_sampler_sample(self, sampler: Any, context: str, index: int) -> int:
        return (int(self._logits[index].argmax()) + self.sampled) % VOCAB


def expected_next(tokens: list[int]) -> int:
    return sum((token + 1) * (at + 1) for at, token in enumerate(tokens)) % VOCAB


def answer(prompt: list[int], count: int, sampled: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((expected_next(tokens) + sampled) % VOCAB)
    return tokens[len(prompt) :]


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


def driver(tmp_path: Path, prefix: bool, lookup: int = 0) -> Driver:
    options = {"gguf": str(tmp_path / "model.gguf"), "prefix": prefix, "lookup": lookup}
    settings = {"options": options, "threads": 1, "seed": 0, "rows": 4, "row_tokens": 500}
    return Driver(load_peer(str(PEERS / "llama_cpp.py"), settings), 500)


def complete(run: Driver, prompts: list[list[int]], count: int) -> Any:
    return run.answer({"op": "complete", "prompts": prompts, "new_tokens": count, "temperature": 0})["tokens"]


def turn_of(run: Driver, prompt: list[int], count: int) -> Any:
    return run.answer({"op": "turn", "prompt": prompt, "new_tokens": count, "room": 90, "temperature": 0})["tokens"][0]


@pytest.mark.parametrize("prefix", [False, True])
def test_rows_behind_one_document(llama: FakeLlama, tmp_path: Path, prefix: bool) -> None:
    prompts = [[*range(40), row, 7, row] for row in range(1, 4)]
    found = complete(driver(tmp_path, prefix), prompts, 5)
    assert found == [answer(prompt, 5) for prompt in prompts]
    once = 40 + 3 * 3 if prefix else 3 * 43
    assert llama.computed == once + 3 * 4


@pytest.mark.parametrize("prefix", [False, True])
def test_turns_of_a_chat(llama: FakeLlama, tmp_path: Path, prefix: bool) -> None:
    run, history, computed = driver(tmp_path, prefix), [3, 1, 4, 1, 5], []
    for turn in range(3):
        history += [turn, 9, 2]
        before = llama.computed
        new = turn_of(run, history, 4)
        assert new == answer(history, 4)
        history = history + new
        computed.append(llama.computed - before)
    # With each prompt its new tokens, the pending one of the answer before among them, and three of its own answer.
    assert computed == ([8 + 3, 4 + 3, 4 + 3] if prefix else [8 + 3, 15 + 3, 22 + 3])
    run.answer({"op": "stop"})
    edited = [*history[:10], 8, 8]
    assert turn_of(run, edited, 2) == answer(edited, 2)
    again = [*history[:6], 8]
    assert turn_of(run, again, 2) == answer(again, 2)
    assert turn_of(run, again, 2) == answer(again, 2)


def test_prompts_that_are_the_same(llama: FakeLlama, tmp_path: Path) -> None:
    """Every row computes its last token itself."""
    prompt = [5, 6, 7, 8]
    found = complete(driver(tmp_path, True), [prompt] * 3, 3)
    assert found == [answer(prompt, 3)] * 3
    assert llama.computed == 4 + 2 + 3 * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_do_not_change_the_text(llama: FakeLlama, tmp_path: Path, temperature: float) -> None:
    """Three rows whose drafts are right, wrong at their end, or missing, at different steps."""
    llama.sampled = 3 if temperature else 0
    run = driver(tmp_path, False, 3)
    prompts = [list(range(7 + row, 20 + 2 * row)) for row in range(3)]
    found = run.answer({"op": "start", "prompts": prompts, "limit": 60, "temperature": temperature})
    texts = found["tokens"]
    steps = []
    while min(map(len, texts)) < 50:
        more = run.answer({"op": "decode", "new_tokens": 1})["tokens"]
        steps += [len(new) for new in more]
        texts = [text + new for text, new in zip(texts, more, strict=True)]
    assert texts == [answer(prompt, len(text), llama.sampled) for prompt, text in zip(prompts, texts, strict=True)]
    assert {1, 3, 4} <= set(steps)
    # One part per call, so that the weights are read once: also where a row has no drafts and others have three.
    assert all(len(part) == 1 for part in llama.parts[1:])
    assert {4} in llama.parts


def test_drafts_end_where_the_answer_does(llama: FakeLlama, tmp_path: Path) -> None:
    """A last draft would take a slot that the context does not have."""
    prompt = list(range(6))
    found = complete(driver(tmp_path, False, 3), [prompt], 4)
    assert found == [answer(prompt, 4)]
    assert max(llama.sequences[0]) < len(prompt) + 4 - 1


def test_drafts_in_turns_of_a_chat(llama: FakeLlama, tmp_path: Path) -> None:
    run, history = driver(tmp_path, True, 3), [3, 1, 4, 1, 5]
    for turn in range(4):
        history += [turn, 9]
        new = turn_of(run, history, 6)
        assert new == answer(history, 6)
        history += new


@pytest.mark.parametrize(("weights", "kind"), [("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 7), ("BF16", 32)])
def test_weights_are_converted_once(
    llama: FakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, kind: int
) -> None:
    made: list[tuple[bytes, int, bool]] = []

    def convert(source: bytes, target: bytes, params: Any) -> int:
        Path(target.decode()).touch()
        made.append((source, params.ftype, params.allow_requantize))
        return 0

    monkeypatch.setattr(llama, "llama_model_quantize", convert, raising=False)
    file = tmp_path / "model.gguf"
    settings = {"options": {"gguf": str(file), "weights": weights}, "threads": 1, "seed": 0}
    for _ in range(2):
        assert load_peer(str(PEERS / "llama_cpp.py"), settings).about.endswith(f"{weights} weights")
    assert made == [(str(file).encode(), kind, True)]
    assert (tmp_path / f"model.{weights}.gguf").exists()


def test_rows_begin_again(tmp_path: Path, llama: FakeLlama) -> None:
    """Prompts are computed once. Sampled rows do not continue greedy ones."""
    run = driver(tmp_path, prefix=False)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    first = run.answer({"op": "start", "prompts": prompts, "limit": 20, "temperature": 0})["tokens"]
    first = [
        row + more for row, more in zip(first, run.answer({"op": "decode", "new_tokens": 3})["tokens"], strict=True)
    ]
    assert first == [answer(prompt, 4) for prompt in prompts]
    llama.computed, llama.sampled = 0, 1
    again = run.answer({"op": "again", "limit": 20, "temperature": 1.0})["tokens"]
    assert llama.computed == 2
    again = [
        row + more for row, more in zip(again, run.answer({"op": "decode", "new_tokens": 3})["tokens"], strict=True)
    ]
    assert again == [answer(prompt, 4, 1) for prompt in prompts]
