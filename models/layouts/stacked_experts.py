"""Tensors in which all experts of a layer are stacked, as gpt-oss stores them: each part of one expert is a tensor of
its own for the rest of the loader, which reads no more than that."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.files.json_values import ModelError
from models.model_config import ModelConfig, WeightNames

_STACK = re.compile(r"(.+\.experts\.)(gate_up_proj|down_proj)(|_bias|_blocks|_scales)")
_ROLES = {"": ("weight", 3), "_bias": ("bias", 2), "_blocks": ("weight_packed", 4), "_scales": ("weight_scale", 3)}
"""By the end of a stack's name: what one expert's part is named in its module, and the dimensions of the stack."""


@dataclass(frozen=True, slots=True)
class StackedPart:
    """One expert's matrix or bias in a stack [experts, …].

    expert: its number. first, step: the part has the first and then each step-th of the expert's rows. transposed:
    whether the stack is [experts, features, rows], rather than [experts, rows, features]. Dimensions behind the
    features are theirs too: [experts, rows, groups, bytes] has groups · bytes features.
    """

    expert: int
    first: int = 0
    step: int = 1
    transposed: bool = False

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of a stack of this shape."""
        rows, *features = stack[1:][::-1] if self.transposed else stack[1:]
        count = len(range(self.first, rows, self.step))
        return (count, math.prod(features)) if features else (count,)

    def read(self, handle: Any, *index: slice) -> Tensor:
        """Read rows, and features, of the part; without an index, all of it. handle: the stack, of safetensors."""
        stack = tuple(handle.get_shape())
        shape = self.shape(stack)
        whole = (slice(None),) * len(shape)
        rows, *others = (range(size)[part] for size, part in zip(shape, index or whole, strict=True))
        wanted = slice(self.first + rows.start * self.step, self.first + rows.stop * self.step, self.step)
        if not others:
            bias: Tensor = handle[self.expert, wanted]
            return bias.contiguous()  # gates and values are neighbours
        (features,) = others
        if self.transposed:
            turned: Tensor = handle[self.expert, features.start : features.stop, wanted]
            return turned.T.contiguous()
        inner = math.prod(stack[3:])
        first = features.start // inner
        values: Tensor = handle[self.expert, wanted, first : -(-features.stop // inner)]
        return values.flatten(1)[:, features.start - first * inner : features.stop - first * inner]


@dataclass(frozen=True, slots=True)
class ExpertStacks:
    """Stacks of a model. count: number of experts. names: of an expert's matrices.

    `….experts.gate_up_proj` [experts, hidden, 2 size]: row 2i of an expert is row i of gate, and row 2i + 1 of up.
    `….experts.down_proj` [experts, size, hidden]. `…_bias` [experts, rows]. In MXFP4, instead of the matrices:
    `…_blocks` [experts, rows, groups, 16] uint8, two codes per byte, and `…_scales` [experts, rows, groups] uint8.
    """

    count: int
    names: WeightNames

    def split(self, name: str, stack: tuple[int, ...]) -> Iterator[tuple[str, StackedPart]]:
        """Yield the parts of tensor `name`, of shape `stack`, with their names; none if it is no stack. Raises
        ModelError: a shape that no stack of so many experts has."""
        if (found := _STACK.fullmatch(name)) is None:
            return
        prefix, matrix, end = found.groups()
        role, dimensions = _ROLES[end]
        if len(stack) != dimensions:
            raise ModelError(f"has {len(stack)} dimensions, expected {dimensions}")
        if stack[0] != self.count:
            raise ModelError(f"has {stack[0]} experts, expected {self.count}")
        gate, up, down = self.names.gate, self.names.up, self.names.down
        modules = (gate, up) if matrix == "gate_up_proj" else (down,)
        for expert in range(self.count):
            for first, module in enumerate(modules):
                part = StackedPart(expert, first, len(modules), transposed=not end)
                yield f"{prefix}{expert}.{module}.{role}", part


def stacks_of(config: ModelConfig) -> ExpertStacks | None:
    """Return the stacks of a model; None: its checkpoints have none."""
    if config.experts is None or not config.names.stacks_experts:
        return None
    return ExpertStacks(config.experts.count, config.names)
