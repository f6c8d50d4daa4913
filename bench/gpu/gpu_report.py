"""Report of bench.gpu: its table, its file, and the state of the device beside the times."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.gpu.gpu_rounds import GpuResult

_STATE = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def table(results: Sequence[GpuResult]) -> str:
    head = ("rows", "context", "gamma", "T_T ms", "floor", "of it", "T_D ms", "T_V ms", "T_V/T_T", "round", "gap", "x")
    lines = ["".join(f"{name:>9}" for name in (*head, "x model", "tok/s"))]
    for each in results:
        gaps = "-" if each.gap_plain is None or each.gap is None else f"{each.gap_plain:.0%} {each.gap:.0%}"
        cells = (
            each.rows,
            each.context,
            each.gamma,
            f"{each.t_target_ms:.2f}",
            f"{each.floor_ms:.2f}",
            f"{each.floor_ms / each.t_target_ms:.0%}",
            f"{each.t_draft_ms:.2f}",
            f"{each.t_verify_ms:.2f}",
            f"{each.t_verify_ms / each.t_target_ms:.2f}",
            f"{each.t_round_ms:.2f}",
            gaps,
            f"{each.speedup:.2f}",
            f"{each.predicted:.2f}",
            f"{each.tokens_per_second:.0f}",
        )
        said = f"synthetic acceptance {each.alpha:.3g} ({each.accepted:.2f} accepted tokens)"
        if {each.weights, each.draft_weights} != {"dense"}:
            said += f", {each.weights} weights, drafts {each.draft_weights}"
        if each.kv_format != "dense":
            said += f", {each.kv_format} KV"
        lines.append("".join(f"{cell:>9}" for cell in cells) + f"  {each.shape}, {each.policy}, {said}")
    return "\n".join(lines)


@dataclass(slots=True)
class GpuReport:
    """What has been measured so far. `save` writes it after every point, so that a run that is cut short leaves
    something.

    about: device and software. ceiling: bytes per second of a copy. states: the device after each point.
    """

    about: str
    ceiling: float
    file: Path | None
    results: list[GpuResult] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self) -> None:
        if self.file is None:
            return
        said: dict[str, Any] = {"device": self.about, "copy_bandwidth": self.ceiling}
        said |= {"results": [asdict(each) for each in self.results], "states": self.states, "notes": self.notes}
        self.file.write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=2))


def device_state(device: torch.device) -> str:
    """Describe clocks, power and temperature of a CUDA device: a lowered clock explains slow rounds. Empty where
    nvidia-smi does not tell."""
    if device.type != "cuda":
        return ""
    serial = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader", f"--id={serial}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    parts = [part.strip() for part in done.stdout.strip().split(",")]
    if len(parts) != _STATE.count(",") + 1:
        return ""
    sm, max_sm, memory, power, limit, temperature = parts
    return f"SM clock {sm} of {max_sm}, memory clock {memory}, {power} of {limit}, {temperature} °C"
