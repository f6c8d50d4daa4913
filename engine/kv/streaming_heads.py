"""KV heads that look little beyond the first and the most recent tokens, and may stream (LServe, arXiv 2502.14866)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.config.deployment import ConfigError
from models.config import ModelConfig


class HeadShares(msgspec.Struct, forbid_unknown_fields=True):
    """File of `magicdec profile heads`: how much each KV head looks at other tokens than its first and recent ones.

    num_layers, num_kv_heads: the model's. sink, window: numbers of first and of recent tokens. context: tokens of each
    passage that was measured. shares: [num_layers][num_kv_heads], share of attention outside sink and window, 0 to 1.
    """

    num_layers: int
    num_kv_heads: int
    sink: int
    window: int
    context: int
    shares: list[list[float]]


def read_streaming_heads(file: str, shape: ModelConfig) -> list[list[bool]]:
    """Read which KV heads stream, [layers][kv_heads]: of all of them the half with the lowest shares.

    shape: config of the model. Raises ConfigError for a file that cannot be read, or that is another model's.
    """
    try:
        found = msgspec.json.decode(Path(file).read_bytes(), type=HeadShares)
    except OSError as error:
        raise _error(file, f"cannot be read ({error.strerror})") from None
    except msgspec.MsgspecError as error:
        raise _error(file, f"is no file of `magicdec profile heads` ({error})") from None
    theirs, ours = (found.num_layers, found.num_kv_heads), (shape.num_layers, shape.num_kv_heads)
    if theirs != ours:
        raise _error(file, "has {} layers of {} KV heads, but the model has {} of {}".format(*theirs, *ours))
    if [len(layer) for layer in found.shares] != [shape.num_kv_heads] * shape.num_layers:
        raise _error(file, "does not have one share for each KV head of each layer")
    shares = [share for layer in found.shares for share in layer]
    if not all(0 <= share <= 1 for share in shares):
        raise _error(file, "has a share that is not from 0 to 1")
    lowest = set(sorted(range(len(shares)), key=lambda place: shares[place])[: len(shares) // 2])
    return [
        [layer * shape.num_kv_heads + head in lowest for head in range(shape.num_kv_heads)]
        for layer in range(shape.num_layers)
    ]


def _error(file: str, fault: str) -> ConfigError:
    return ConfigError(f"engine.target_kv.heads: {file} {fault}; write it with `magicdec profile heads`")
