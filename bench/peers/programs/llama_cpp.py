"""llama.cpp through llama-cpp-python's low-level API: several sequences in one context, as in its server.

Options: `gguf`: the model file. `weights`: type to convert the weights to; None: unchanged. `flash`: flash attention
(default false). `kv`: type of the KV cache, f16, bf16 or, with flash attention, q8_0 (default f16). `prefix`: one cache
for all rows, in which rows share the KV of tokens that all prompts begin with, and a row keeps what its next prompt has
in common with the last one (default false). `lookup`: number of tokens that a row drafts by prompt lookup, with the
package's own drafter and its default n-grams (default 0). The other defaults were fastest on a CPU with AVX-512.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_BATCH, _MICRO_BATCH = 2048, 512
"""Largest number of tokens of one call, and computed at once. llama.cpp's own defaults."""

_KV_TYPES = {"f16": 1, "q8_0": 8, "bf16": 30}
"""ggml's types. The Python package does not define all of them."""

_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""llama.cpp's file types (llama_ftype), by the names used in file names."""


class Peer:
    def __init__(self, settings: dict[str, Any]) -> None:
        options = settings["options"]
        self._threads = settings["threads"]
        self._flash = options.get("flash", False)
        self._prefix = bool(options.get("prefix"))
        kv = options.get("kv", "f16")
        self._kv = _KV_TYPES[kv]
        llama_cpp.llama_backend_init()
        gguf = _with_weights(Path(options["gguf"]), options.get("weights"), self._threads)
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"{gguf}: cannot be loaded")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._context: Any = None
        self._tokens: list[array[int]] = []
        self._computed: list[int] = []
        self._prompts: list[int] = []
        self._limit = 0
        self._shared = 0  # tokens of row 0 that the other rows wait for
        self._seed: int = settings["seed"]
        self._sampler: Any = None
        self.max_batch = None
        self.about = f"llama-cpp-python {llama_cpp.__version__}, {gguf.stem.rpartition('.')[2]} weights"
        if kv != "f16":
            self.about += f", {kv} KV"
        if self._prefix:
            self.about += ", shared prefixes"
        self._lookup: Any = None
        if drafted := options.get("lookup"):
            self._lookup = llama_cpp.llama_speculative.LlamaPromptLookupDecoding(num_pred_tokens=drafted)
            self.about += f", prompt lookup of {drafted} tokens"

    def prepare(self, rows: int, row_tokens: int, temperature: float) -> None:
        self._sampler = _sampler(temperature, self._seed) if temperature else None
        params = llama_cpp.llama_context_default_params()
        # Every sequence has its own part of the cache, in multiples of 256 tokens; or all have one.
        params.n_ctx = rows * (-(-row_tokens // 256) * 256)
        params.n_seq_max, params.kv_unified = rows, self._prefix
        params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
        params.n_threads = params.n_threads_batch = self._threads
        flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = flash[0] if self._flash else flash[1]
        params.type_k = params.type_v = self._kv
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError("llama.cpp has no room for the context")

    def start(self, prompts: Sequence[Sequence[int]], limit: int, *, together: bool) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        computed = [0] * len(prompts)
        for row, prompt in enumerate(prompts):
            if self._prefix and row < len(self._tokens):
                known = self._tokens[row][: self._computed[row]]
                computed[row] = min(_common([known, prompt]), len(prompt) - 1)
            llama_cpp.llama_memory_seq_rm(memory, row, computed[row], -1)
        if self._prefix and len(prompts) > 1:
            self._shared = min(_common(prompts), min(map(len, prompts)) - 1)
        self._tokens = [array("i", prompt) for prompt in prompts]
        self._computed = computed
        self._prompts = [len(prompt) for prompt in prompts]
        self._limit = limit

    def again(self, limit: int, temperature: float) -> None:
        """See driver.Peer.again. The last token of each prompt is computed again, for its logits."""
        if self._sampler:
            llama_cpp.llama_sampler_free(self._sampler)
        self._sampler = _sampler(temperature, self._seed) if temperature else None
        memory = llama_cpp.llama_get_memory(self._context)
        for row, prompt in enumerate(self._prompts):
            del self._tokens[row][prompt:]
            self._computed[row] = prompt - 1
            llama_cpp.llama_memory_seq_rm(memory, row, prompt - 1, -1)
        self._limit = limit

    def step(self) -> list[tuple[int, list[int]]]:
        """See driver.Peer.step. A call has prompt tokens, or each row's token and its drafts: prefilled rows wait for
        the others."""
        made = [len(tokens) - prompt for tokens, prompt in zip(self._tokens, self._prompts, strict=True)]
        prefilling = [row for row, new in enumerate(made) if not new]
        if self._shared:
            prefilling = [0]
        running = prefilling or [row for row, new in enumerate(made) if new < self._limit]
        if not running:
            raise RuntimeError("all rows are at their end")
        drafts = {} if self._lookup is None or prefilling else self._draft(running, made)
        count, last = 0, {}
        for row in running:
            tokens, begin = self._tokens[row], self._computed[row]
            end = min(len(tokens), begin + _BATCH - count)
            for position in range(begin, end):
                self._put(count, row, position, tokens[position], wanted=position == len(tokens) - 1)
                last[row] = count
                count += 1
            self._computed[row] = end
            for i, token in enumerate(drafts.get(row, ())):
                self._put(count, row, end + i, token, wanted=True)
                count += 1
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        if self._shared and self._computed[0] >= self._shared:
            self._share()
        return [
            (row, self._verify(row, index, drafts.get(row, [])))
            for row, index in last.items()
            if self._computed[row] == len(self._tokens[row])
        ]

    def _draft(self, rows: Sequence[int], made: Sequence[int]) -> dict[int, list[int]]:
        """Draft tokens of each row. made: number of tokens that each row has got.

        llama.cpp reads the weights once for rows with equally many tokens, and again where some have more. So a row
        that finds fewer drafts than another gets its last token as further ones.
        """
        room = {row: min(max(0, _BATCH // len(rows) - 1), self._limit - made[row] - 1) for row in rows}
        found = {
            row: [int(token) for token in self._lookup(np.frombuffer(self._tokens[row], dtype=np.intc))][: room[row]]
            for row in rows
        }
        longest = max(map(len, found.values()))
        return {row: (found[row] + [self._tokens[row][-1]] * longest)[: min(longest, room[row])] for row in rows}

    def _verify(self, row: int, index: int, drafts: Sequence[int]) -> list[int]:
        """Sample the tokens of a row up to the first that is not the draft, and forget the KV of the other drafts.

        The text is a sample of the model at every temperature, as each token is drawn before it is compared. index: of
        the batch's token whose logits yield the first one; those of the drafts follow.
        """
        new: list[int] = []
        for i in range(len(drafts) + 1):
            new.append(self._sample(index + i))
            if new[-1] != (drafts[i] if i < len(drafts) else None):
                break
        self._tokens[row].extend(new)
        self._computed[row] += len(new) - 1
        if len(new) <= len(drafts):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), row, self._computed[row], -1)
        return new

    def _share(self) -> None:
        """Give all rows the KV of the tokens that they have in common with row 0."""
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(1, len(self._tokens)):
            llama_cpp.llama_memory_seq_rm(memory, row, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, 0, row, 0, self._shared)
            self._computed[row] = self._shared
        self._shared = 0

    def _sample(self, index: int) -> int:
        """Sample a token by the logits of the batch's token `index`."""
        if self._sampler is not None:
            return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, index))
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())

    def _put(self, index: int, row: int, position: int, token: int, *, wanted: bool) -> None:
        """Put one token into the batch. wanted: whether its logits are needed."""
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row
        batch.logits[index] = wanted

    def stop(self) -> None:
        context, self._context = self._context, None
        sampler, self._sampler = self._sampler, None
        self._tokens, self._computed, self._shared = [], [], 0
        if context:
            llama_cpp.llama_free(context)
        if sampler:
            llama_cpp.llama_sampler_free(sampler)


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all texts begin with."""
    return next((i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1), min(map(len, texts)))


def _sampler(temperature: float, seed: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


def _with_weights(gguf: Path, weights: str | None, threads: int) -> Path:
    """Return a file with the weights in another type, beside `gguf`. It is converted once."""
    if weights is None:
        return gguf
    made = gguf.with_name(f"{gguf.stem}.{weights}.gguf")
    if not made.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = _TYPES[weights], True, threads
        part = made.with_suffix(".part")
        status = llama_cpp.llama_model_quantize(str(gguf).encode(), str(part).encode(), params)
        if status:
            raise ValueError(f"{gguf}: llama.cpp cannot convert it to {weights} (status {status})")
        os.replace(part, made)
    return made
