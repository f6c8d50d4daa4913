"""vLLM on the CPU, with its engine in this process, one step at a time.

Options: `speculative_config`: vLLM's setting of that name; by default it does not speculate. `prefix`: its prefix cache
(default false, since the same prompts are sent more than once), which is emptied where rows are dropped. `model`: a
directory with other weights of the same model, quantized in a way that vLLM reads. `kv`: vLLM's type of the KV cache
(default auto). `dtype`: of weights and KV (default bfloat16; float32 may be faster on processors without bfloat16
products). Where prompts are kept, the prefix cache keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


class Peer:
    def __init__(self, settings: dict[str, Any]) -> None:
        # vllm reads these on import. The KV size is in whole GiB; the binding lists one core per thread.
        cores = sorted(os.sched_getaffinity(0))[: settings["threads"]]
        dtype = settings["options"].get("dtype", "bfloat16")
        kv_bytes = settings["kv_bytes"] * (2 if dtype == "float32" else 1)  # settings say bytes in 16 bits
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-int(1.05 * kv_bytes) // (1 << 30)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        self._sampling = vllm.SamplingParams
        self._prefix = bool(settings["options"].get("prefix") or settings["keep_prompts"])
        kv = settings["options"].get("kv", "auto")
        model = settings["options"].get("model")
        self._engine = vllm.LLM(
            model=model or settings["model"],
            dtype=dtype,
            max_model_len=settings["row_tokens"],
            max_num_seqs=settings["rows"],
            enable_prefix_caching=self._prefix,
            kv_cache_dtype=kv,
            disable_log_stats=True,
            speculative_config=settings["options"].get("speculative_config"),
            seed=settings["seed"],
        ).llm_engine
        self._temperature = 0.0
        self._started = 0
        self._seen: dict[str, int] = {}
        self._prompts: Sequence[Sequence[int]] = []
        self.max_batch = None
        weights = f"{dtype} weights" if model is None else f"weights of {os.path.basename(os.path.abspath(model))}"
        self.about = f"vllm {vllm.__version__}, {weights}"
        if method := settings["options"].get("speculative_config", {}).get("method"):
            self.about += f", {method} speculation"
        if kv != "auto":
            self.about += f", {kv} KV"
        if self._prefix:
            self.about += ", prefix cache"

    def prepare(self, rows: int, row_tokens: int, temperature: float) -> None:
        """See driver.Peer.prepare. The pool is allocated with the engine."""
        self._temperature = temperature

    def start(self, prompts: Sequence[Sequence[int]], limit: int, *, together: bool) -> None:
        # Without a seed of its own for each request: those are sampled one by one.
        params = self._sampling(
            temperature=self._temperature, top_p=1.0, top_k=0, max_tokens=limit, ignore_eos=True, detokenize=False
        )
        self._started += 1
        self._prompts = prompts
        for row, prompt in enumerate(prompts):
            # The engine uses ids of its own internally, and returns these with its outputs.
            name = f"{self._started}-{row}"
            self._seen[name] = 0
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def again(self, limit: int, temperature: float) -> None:
        self._drop()
        self._temperature = temperature
        self.start(self._prompts, limit, together=True)

    def step(self) -> list[tuple[int, list[int]]]:
        if not self._engine.has_unfinished_requests():
            raise RuntimeError("all rows are at their end")
        yielded = []
        for output in self._engine.step():
            # All tokens of the request so far: a step adds the accepted drafts and one more.
            tokens = list(output.outputs[0].token_ids)
            name = output.request_id
            yielded.append((int(name.partition("-")[2]), tokens[self._seen[name] :]))
            self._seen[name] = len(tokens)
        return yielded

    def stop(self) -> None:
        self._drop()
        if self._prefix:
            self._engine.reset_prefix_cache()

    def _drop(self) -> None:
        self._engine.abort_request(list(self._seen))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._seen.clear()
