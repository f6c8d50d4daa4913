"""Sinks: one more term of the softmax, whose value is zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.decoder import DecoderModel
from models.parts.self_attention import with_sinks
from parallel.group import Group
from parallel.matrix_layer import Placement
from tests.support.engines import TINY
from tests.support.rig import CPU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_softmax_with_one_more_score(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(5, 3, 7, dtype=torch.float64) * 3, torch.randn(7, 16, dtype=torch.float64)
    sinks = torch.tensor([-2.0, 0.5, 40.0], dtype=torch.float64)
    wanted = torch.cat([scores, sinks[None, :, None].expand(5, 3, 1)], 2).softmax(2)[:, :, :-1] @ values
    plain, lse = scores.softmax(2) @ values, scores.logsumexp(2)
    wide = torch.promote_types(dtype, torch.float32)
    found = with_sinks(plain.to(dtype), lse.to(wide), sinks.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_each_rank_has_the_sinks_of_its_heads() -> None:
    config = dataclasses.replace(TINY, has_sinks=True)
    model = DecoderModel(config, Placement(Group.single(), torch.float32, CPU))
    slots = [slot for slot in model.weight_slots() if slot.source.endswith("sinks")]
    assert [slot.source for slot in slots] == [f"model.layers.{i}.self_attn.sinks" for i in range(config.num_layers)]
    assert all(slot.full_shape == (config.num_heads,) == tuple(slot.tensor.shape) for slot in slots)
