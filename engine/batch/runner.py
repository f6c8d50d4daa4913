"""Runner of forwards: a model, the pool it writes to and the attention it reads with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs
from engine.kv.policies import View
from kernels.attention.base import AttentionBackend
from kernels.attention.query_capture import QueryCapture
from kernels.kv_cache import KVPool
from models.batch import ForwardBatch
from models.llama import Llama


@dataclass(frozen=True, slots=True)
class Runner:
    """Target and draft are two runners in one process. For self-speculation they share model and pool, and differ in
    the KV they read. Each has its own attention backend, since a backend holds the plan of its latest forward.

    graphs: replay forwards where they can.
    query_capture: in place of `attention`, for a forward some of whose queries are kept; no graph replays that.
    """

    model: Llama
    pool: KVPool
    attention: AttentionBackend
    view: View
    graphs: ForwardGraphs | None = None
    query_capture: QueryCapture | None = None

    def forward(self, inputs: ForwardBatch) -> Tensor:
        """Run the model and write the inputs' KV. Returns the requested logits, [n, this rank's vocabulary]."""
        if self.query_capture is not None and self.query_capture.capturing:
            return self.model.forward(inputs, self.pool, self.query_capture)
        if self.graphs is not None and (logits := self.graphs.forward(inputs)) is not None:
            return logits
        return self.model.forward(inputs, self.pool, self.attention)
