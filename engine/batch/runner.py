"""Runner of forwards: a model, the pool it writes to and the attention it reads with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs, Observer
from engine.batch.view import View
from kernels.attention.base import AttentionBackend, NoAttention
from kernels.key_summaries import KeySummaries
from kernels.kv.kv_pool import KVPool
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel


def make_attention(model: DecoderModel, page_size: int) -> AttentionBackend:
    """Make attention to the layers of a model that keep the KV of all tokens."""
    return model.ops.attention(page_size, model.head_dim) if model.num_kv_layers else NoAttention()


@dataclass(frozen=True, slots=True)
class Runner:
    """Target and draft are two runners in one process. For self-speculation they share model and pool, and differ in
    the KV they read. Each has its own attention backend, since a backend holds the plan of its latest forward.

    graphs: replay forwards where they can.
    summaries: of the pool's keys, where attention keeps them.
    observers: learn from forwards. Graphs replay a forward for which one of them is due only if they captured it too.
    sliding: KV of the model's sliding layers; None: it has none. Nobody observes how they are read.
    """

    model: DecoderModel
    pool: KVPool
    attention: AttentionBackend
    view: View
    graphs: ForwardGraphs | None = None
    observers: tuple[Observer, ...] = ()
    summaries: KeySummaries | None = None
    sliding: SlidingKV[AttentionBackend] | None = None

    def forward(self, inputs: ForwardBatch) -> Tensor:
        """Run the model and write the inputs' KV. Returns the requested logits, [n, this rank's vocabulary]."""
        due = [observer for observer in self.observers if observer.due]
        if self.graphs is not None and all(observer is self.graphs.observer for observer in due):
            logits = self.graphs.forward(inputs)
            if logits is not None:
                return logits
        attention = self.attention
        for observer in due:
            attention = observer.around(attention)
        return self.model.forward(inputs, self.pool, attention, self.sliding)
