"""Sinks as weights of a model."""

from __future__ import annotations

import dataclasses

import torch

from models.decoder import DecoderModel
from parallel.group import Group
from parallel.matrix_layer import Placement
from tests.support.engines import TINY
from tests.support.rig import CPU


def test_each_rank_has_the_sinks_of_its_heads() -> None:
    config = dataclasses.replace(TINY, has_sinks=True)
    model = DecoderModel(config, Placement(Group.single(), torch.float32, CPU))
    slots = [slot for slot in model.weight_slots() if slot.source.endswith("sinks")]
    assert [slot.source for slot in slots] == [f"model.layers.{i}.self_attn.sinks" for i in range(config.num_layers)]
    assert all(slot.full_shape == (config.num_heads,) == tuple(slot.tensor.shape) for slot in slots)
