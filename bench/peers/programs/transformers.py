"""transformers: `generate` with a batch and a KV cache, paused between its steps.

Options: `lookup`: number of tokens drafted by prompt lookup and verified at once (assisted generation, one row only).
`continuous`: continuous batching instead of `generate`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers


class Peer:
    def __init__(self, settings: dict[str, Any]) -> None:
        options = settings["options"]
        torch.set_num_threads(settings["threads"])
        # from_pretrained returns a model in evaluation mode.
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._lookup: int | None = options.get("lookup")
        self._continuous = bool(options.get("continuous"))
        self._sampling: dict[str, Any] = {}
        torch.manual_seed(settings["seed"])
        self._run: _Generation | _Continuous | None = None
        self._prompts: Sequence[Sequence[int]] = []
        self._row_tokens = 0
        self.max_batch = 1 if self._lookup else None
        self.about = f"transformers {transformers.__version__}, bfloat16 weights"

    def prepare(self, rows: int, row_tokens: int, temperature: float) -> None:
        """See driver.Peer.prepare. The cache of `generate` grows by itself; only continuous batching has a pool."""
        self._sampling, self._row_tokens = _sampling(temperature), row_tokens
        if self._continuous:
            self._run = _Continuous(self._model, rows, row_tokens, self._sampling)

    def start(self, prompts: Sequence[Sequence[int]], limit: int, *, together: bool) -> None:
        self._prompts = prompts
        if isinstance(self._run, _Continuous):
            self._run.add(prompts, limit)
        else:
            self.stop()
            self._run = _Generation(self._model, prompts, limit, self._lookup, self._sampling)

    def again(self, limit: int, temperature: float) -> None:
        """See driver.Peer.again. Prompts are computed again."""
        self.stop()
        self.prepare(len(self._prompts), self._row_tokens, temperature)
        self.start(self._prompts, limit, together=True)

    def step(self) -> list[tuple[int, list[int]]]:
        assert self._run is not None
        return self._run.step()

    def stop(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()


def _sampling(temperature: float) -> dict[str, Any]:
    """Build the settings of sampling without truncation, which is on by default."""
    return (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )


class _Generation:
    """One call of `generate`, in a thread that pauses in its stopping criterion, which runs after every step."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        limit: int,
        lookup: int | None,
        sampling: Mapping[str, Any],
    ) -> None:
        self._ids = torch.tensor([list(prompt) for prompt in prompts])
        self._seen = self._ids.shape[1]
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._new: list[list[int]] = []
        self._over = False
        self._error: BaseException | None = None
        arguments: dict[str, Any] = {"max_new_tokens": limit, "eos_token_id": None, **sampling}
        if lookup:
            arguments["prompt_lookup_num_tokens"] = lookup
        self._thread = threading.Thread(target=self._generate, args=(model, arguments), daemon=True)
        self._thread.start()

    def _generate(self, model: Any, arguments: dict[str, Any]) -> None:
        self._go.acquire()
        try:
            if not self._over:
                with torch.inference_mode():
                    mask = torch.ones_like(self._ids)
                    model.generate(self._ids, attention_mask=mask, stopping_criteria=[self._stepped], **arguments)
        except Exception as error:
            self._error = error
        self._over = True
        self._came.release()

    def _stepped(self, ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        """Record new tokens and wait for the next step. ids: [rows, tokens so far]. Returns [rows] bool: done."""
        self._new = ids[:, self._seen :].tolist()
        self._seen = ids.shape[1]
        self._came.release()
        self._go.acquire()
        return torch.full((len(ids),), self._over)

    def step(self) -> list[tuple[int, list[int]]]:
        if self._over:
            raise RuntimeError("all rows are at their end") from self._error
        self._go.release()
        self._came.acquire()
        if self._error is not None:
            raise self._error
        return list(enumerate(self._new))

    def close(self) -> None:
        self._over = True
        self._go.release()
        self._thread.join()


class _Continuous:
    """Continuous batching: runs the manager's loop one iteration at a time, in this thread instead of the manager's."""

    def __init__(self, model: Any, rows: int, row_tokens: int, sampling: Mapping[str, Any]) -> None:
        block = 256
        config = transformers.ContinuousBatchingConfig(
            block_size=block,
            num_blocks=rows * (-(-row_tokens // block) + 1),
            max_batch_tokens=512,
            use_async_batching=False,
        )
        generation = transformers.GenerationConfig.from_dict({"eos_token_id": -1, **sampling})
        with torch.inference_mode():
            self._manager = model.init_continuous_batching(generation, continuous_batching_config=config)
            self._processor = self._manager._create_batch_processor()
            self._manager.batch_processor = self._processor
            self._manager.current_batch = 0
        self._seen: dict[str, int] = {}

    def add(self, prompts: Sequence[Sequence[int]], limit: int) -> None:
        for row, prompt in enumerate(prompts):
            self._seen[str(row)] = 0
            self._manager.add_request(list(prompt), str(row), max_new_tokens=limit, streaming=True)

    def step(self) -> list[tuple[int, list[int]]]:
        with torch.inference_mode():
            self._manager._generation_loop_body(self._processor, bootstrapping=False)
        yielded = []
        results = self._manager.output_router.output_queue
        while not results.empty():
            output = results.get()
            if output.error is not None:
                raise RuntimeError(output.error)
            tokens = list(output.generated_tokens)
            yielded.append((int(output.request_id), tokens[self._seen[output.request_id] :]))
            self._seen[output.request_id] = len(tokens)
        return yielded

    def close(self) -> None:
        self._manager.destroy()
