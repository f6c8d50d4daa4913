"""What an engine says about the formats of its weights: those of loaded models, not of settings."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engine.worker.weight_choice import describe_formats
from kernels.weights.weight_format import FORMATS
from models.decoder import DecoderModel
from models.loader import random_model
from parallel.group import Group
from parallel.matrix_layer import Placement, WeightChoice
from tests.support.engines import TINY, tiny_engine

CPU = torch.device("cpu")


def model_of(own: str | None, drafts: str | None = None) -> DecoderModel:
    return random_model(TINY, 1, torch.float32, CPU, Group.single(), weights=WeightChoice(own, drafts))


def stored_as(name: str) -> DecoderModel:
    """A model whose checkpoint stores its matrices in this format, but for the embedding and the head."""
    model = DecoderModel(TINY, Placement(Group.single(), torch.float32, CPU))
    for weight in model.weight_slots():
        weight.tensor.fill_(1.0)
    for slot in model.matrix_slots():
        kept = name if "layers" in slot.source else "dense"
        slot.fill(FORMATS[kept].quantize(torch.rand(slot.full_shape)))
    model.prepare()
    return model


@pytest.mark.parametrize(
    ("own", "drafts", "said"),
    [
        (None, None, {"target": "dense", "drafts": "dense"}),
        (None, "fp8", {"target": "dense", "drafts": "fp8"}),
        ("int4", "int8", {"target": "int4 and int8", "drafts": "int8"}),
        ("int8", None, {"target": "int8", "drafts": "int8"}),
    ],
)
def test_formats_by_choice(own: str | None, drafts: str | None, said: dict[str, str]) -> None:
    """The head of int4 is int8."""
    model = model_of(own, drafts)
    assert describe_formats(model, [model.drafting()]) == said
    assert describe_formats(model, [model.drafting()] * 2) == said
    assert describe_formats(model, []) == {"target": said["target"]}


def test_formats_of_a_checkpoint() -> None:
    assert describe_formats(stored_as("int4"), []) == {"target": "int4 and dense (as stored)"}
    assert describe_formats(stored_as("dense"), []) == {"target": "dense"}
    formats = stored_as("int4").matrix_formats
    assert formats["dense"] == 64 * 32
    assert formats["int4"] == 2 * (32 * (48 + 32) + 48 * 32 + 3 * 32 * 48)


def test_an_engine_says_what_it_multiplies_by(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = tiny_engine(model_of("int4", "int8"), gamma=2, speculation={"weights": "int8"}, weights="int4")
    assert engine.stats().weights == engine.ready.stats.weights == {"target": "int4 and int8", "drafts": "int8"}
    assert "kernels reference, weights int4 and int8, drafts int8, KV pool" in caplog.text
    engine.close()


def test_without_drafts_only_the_target_has_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = tiny_engine(model_of(None), gamma=0)
    assert engine.stats().weights == {"target": "dense"}
    assert "weights dense, KV pool" in caplog.text
    engine.close()


@pytest.mark.parametrize(
    ("loaded", "settings", "said"),
    [
        ((None, None), {"weights": "dense"}, {"target": "dense", "drafts": "dense"}),
        (
            ("int4", "int8"),
            {"speculation": {"weights": "int4"}},
            {"target": "int4 and int8", "drafts": "int4 and int8"},
        ),
        ((None, "int8"), {"speculation": {"weights": "same"}}, {"target": "dense", "drafts": "dense"}),
        ((None, "int8"), {"speculation": {"weights": "auto"}}, {"target": "dense", "drafts": "int8"}),
        ((None, None), {"gamma": 0, "speculation": {"weights": "int8"}}, {"target": "dense"}),
    ],
    ids=str,
)
def test_settings_that_a_loaded_model_meets(
    loaded: tuple[str | None, str | None], settings: dict[str, Any], said: dict[str, str]
) -> None:
    model = model_of(*loaded)
    engine = tiny_engine(model, **{"gamma": 2, **settings})
    assert engine.stats().weights == said
    engine.close()
