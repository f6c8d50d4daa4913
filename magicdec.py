"""The offline API: `from magicdec import LLM, SamplingParams`."""

from __future__ import annotations

from engine.config.deployment import ConfigError, EngineConfig
from engine.llm import LLM, Completion, Piece, RequestFailed
from engine.params import SamplingParams

__all__ = ["LLM", "Completion", "ConfigError", "EngineConfig", "Piece", "RequestFailed", "SamplingParams"]
