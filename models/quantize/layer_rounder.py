"""Calibration: text runs through a model layer by layer, and each matrix is rounded by the inputs that reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import KVPool
from kernels.ops import Gate
from kernels.reference_ops import ReferenceLinear, ReferenceOps, reference_linear
from kernels.weights.int4_weights import Int4Format
from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, is_finite
from models.config import ModelConfig, ModelError
from models.decoder import DecoderLayer
from models.parts.rotary import make_query_scales, make_rotary
from models.parts.self_attention import AttentionInputs
from models.quantize.gptq_rounding import gptq
from parallel.group import Group
from parallel.matrix_layer import Placement
from parallel.split import split_heads


class CalibratedLinear:
    """A dense matrix that is rounded when it is first called, by the inputs of that call. `rounds`: whether it is."""

    references_weights = False

    def __init__(self, matrix: Matrix, int4: Int4Format, finish: Callable[[Matrix], ReferenceLinear]) -> None:
        """finish: prepares the product with a matrix."""
        self._matrix = matrix
        self._int4, self._finish = int4, finish
        self._rounded: QuantizedMatrix | None = None
        self.rounds = True

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    @property
    def quantized(self) -> QuantizedMatrix:
        """The rounded matrix. One that was never called, of an expert that no token chose, is rounded to nearest."""
        if self._rounded is None:
            self._rounded = self._int4.quantize(self._matrix.dense(torch.float32))
        return self._rounded

    def __call__(self, x: Tensor) -> Tensor:
        if self.rounds and self._rounded is None:
            hessian = token_hessian(x)
            if not is_finite(hessian):
                raise NotFiniteError
            self._matrix = self._rounded = gptq(self._matrix.dense(x.dtype), hessian, self._int4)
        return self._finish(self._matrix)(x)


def token_hessian(x: Tensor) -> Tensor:
    """Return the Hessian of a matrix's squared error for inputs x, [tokens, features], in which all tokens weigh the
    same: [features, features].

    Without that the few tokens that take most attention, as the first one of a text does, decide: their inputs can be
    hundreds of times as large as others, whose share in the error the rounding then neglects.
    """
    even = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    hessian: Tensor = even.t() @ even
    return hessian


class NotFiniteError(ArithmeticError):
    """Inputs of a matrix are too large, infinite or NaN."""


class CalibratingOps(ReferenceOps):
    """Plain torch whose matrices are rounded by the inputs of their first product. made: all of them, in order."""

    def __init__(self, int4: Int4Format) -> None:
        self._int4 = int4
        self.made: list[CalibratedLinear] = []

    def linear(  # type: ignore[override]
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> CalibratedLinear:
        made = CalibratedLinear(matrix, self._int4, lambda rounded: reference_linear(rounded, bias, gated, wide))
        self.made.append(made)
        return made


class LayerRounder:
    """Rounds the layers of a model in order. What a layer's later matrices and later layers see comes from the rounded
    ones before them.

    The activations of all tokens are held in float32, those of one layer at a time: about 12 * (hidden_size +
    intermediate_size) bytes per token.
    """

    def __init__(
        self,
        config: ModelConfig,
        int4: Int4Format,
        texts: Sequence[Sequence[int]],
        embedding: Tensor,
        device: torch.device,
    ) -> None:
        """texts: token ids, all texts of one length. embedding: [vocab_size, hidden_size]. Raises ModelError: a token
        that the model does not embed."""
        self._config, self._ops = config, CalibratingOps(int4)
        self._place = Placement(Group.single(), torch.float32, device, self._ops)
        rows, length = len(texts), len(texts[0])
        token_ids = torch.tensor(texts).flatten()
        if (largest := int(token_ids.max())) >= len(embedding):
            raise ModelError(f"the text has token {largest}, but the model embeds {len(embedding)} tokens")
        self._x = embedding[token_ids].to(device, torch.float32) * config.embedding_scale
        self._delta: Tensor | None = None
        pages = torch.arange(rows, device=device)[:, None]
        positions = torch.arange(length, device=device).repeat(rows)
        slots = torch.arange(rows * length, device=device)

        def attend(window: int) -> ReferenceAttention:
            attention = ReferenceAttention(page_size=length)  # each text is one page
            attention.plan(AttentionBatch([length] * rows, [length] * rows, pages, window=window))
            return attention

        full, sliding = attend(0), attend(config.sliding_window or 0)
        tables = {
            kind: make_rotary(
                kind, config.head_dim, length, dtype=torch.float32, device=device, served=config.max_model_len
            )
            for kind in {config.rope_of(layer) for layer in range(config.num_layers)}
        }
        self._inputs = [
            AttentionInputs(
                tables[config.rope_of(layer)],
                positions,
                slots,
                sliding if layer in config.sliding_layers else full,
                make_query_scales(config.rope_of(layer), positions),
            )
            for layer in range(config.num_layers)
        ]
        self._kv = KVPool(
            num_layers=1,
            num_pages=rows,
            page_size=length,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=device,
        ).layer(0)

    @torch.inference_mode()
    def round_layer(self, number: int, read: Callable[[str], Tensor]) -> dict[str, QuantizedMatrix]:
        """Run the texts through layer `number` and return its rounded matrices by the name of their weight, on the
        CPU: all that may be rounded. Call it for each layer in order.

        read: returns the tensor of a name. Raises ModelError: the layer's activations are not finite.
        """
        whole = split_heads(self._config.num_heads, self._config.num_kv_heads, 1)[0]
        layer = DecoderLayer(self._config, number, whole, self._place, slides=False, index=0)
        for slot in layer.weight_slots():
            slot.tensor.copy_(read(slot.source).float() + slot.offset)
        self._ops.made.clear()
        places: dict[str, tuple[int, slice]] = {}
        first = 0
        for place in layer.matrix_slots():
            product, rows = len(self._ops.made), place.reads[0].stop - place.reads[0].start
            place.fill(DenseMatrix(read(place.source)[place.reads]))
            if not place.rounds:
                self._ops.made[product].rounds = False
                continue
            # Parts of a matrix that the checkpoint has joined follow each other in its own order.
            start = places[place.source][1].start if place.source in places else first
            places[place.source] = product, slice(start, first + rows)
            first = first + rows if len(self._ops.made) == product else 0
        layer.prepare()
        try:
            self._delta = layer(self._x, self._delta, self._inputs[number], self._kv)
        except NotFiniteError:
            raise ModelError(f"layer {number}: the text leads to activations that are infinite or NaN") from None
        return {
            source: self._ops.made[product].quantized.cut(rows, slice(None)).to(torch.device("cpu"))
            for source, (product, rows) in places.items()
        }
