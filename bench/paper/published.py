"""Fit the cost model's constants to results that MagicDec's authors published, and report its errors.

Two constants are fitted, both to speed-ups: the fixed time of a layer, and the acceptance of a small draft model, which
was not published. All other fields of planner.placed_model.Efficiency keep typical values. Errors are reported for the
fit and with each row left out. Rows of other GPUs, step times in milliseconds, and what weights of fewer bits gain are
predicted only, never fitted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.known_shapes import SHAPES
from planner.cost_model import SpeculationCost
from planner.expected_acceptance import DRAFT_MODEL, expected_alpha
from planner.hardware import GPUS
from planner.placed_model import PUBLISHED, Efficiency, PlacedModel, product_seconds

_HERE = Path(__file__).parent
_BOUNDS = {"layer_s": (0.02e-3, 0.5e-3), "draft_model": (0.5, 0.9)}
"""Search ranges. A layer launches some ten kernels of 2 to 50 µs each; a small model is right more often than not."""


@dataclass(frozen=True, slots=True)
class Constants:
    """The fitted constants."""

    layer_s: float = PUBLISHED.layer_s
    draft_model: float = DRAFT_MODEL


@dataclass(frozen=True, slots=True)
class Row:
    """One published speed-up. draft: `self` or a model's name."""

    gpu: str
    tensor_parallel: int
    target: str
    draft: str
    budget: int
    context: int
    batch: int
    gamma: int
    speedup: float
    fit: bool

    def alpha(self, constants: Constants) -> float:
        small = self.draft != "self"
        return expected_alpha("window", self.budget, self.context, draft_model=small, ceiling=constants.draft_model)

    def speculation(self, efficiency: Efficiency) -> SpeculationCost:
        """Build the published deployment: the draft runs on at most as many GPUs as it has KV heads."""
        target = _place(self.gpu, self.target, self.tensor_parallel, efficiency)
        if self.draft == "self":
            return SpeculationCost(target=target, draft=target, budget=self.budget)
        ranks = min(self.tensor_parallel, SHAPES[self.draft].num_kv_heads)
        return SpeculationCost(target=target, draft=_place(self.gpu, self.draft, ranks, efficiency), budget=self.budget)

    def predict(self, constants: Constants) -> float:
        """Predict the speed-up at the published gamma."""
        speculation = self.speculation(replace(PUBLISHED, layer_s=constants.layer_s))
        return speculation.speedup(self.batch, self.context, self.gamma, self.alpha(constants))

    def best(self, constants: Constants) -> tuple[int, float]:
        """Find the gamma that the cost model would choose, and its speed-up."""
        speculation = self.speculation(replace(PUBLISHED, layer_s=constants.layer_s))
        return speculation.best_gamma(self.batch, self.context, self.alpha(constants))


@dataclass(frozen=True, slots=True)
class PublishedStep:
    """One published time of a plain decoding step."""

    gpu: str
    tensor_parallel: int
    target: str
    context: int
    batch: int
    milliseconds: float

    def predict(self, constants: Constants) -> float:
        """Predict the step time, in milliseconds."""
        efficiency = replace(PUBLISHED, layer_s=constants.layer_s)
        target = _place(self.gpu, self.target, self.tensor_parallel, efficiency)
        return 1e3 * target.forward_seconds(self.batch, self.batch * self.context)


@dataclass(frozen=True, slots=True)
class PublishedProduct:
    """One published speed-up of a matrix product by weights of fewer bits, over 16."""

    gpu: str
    bits: float
    rows: int
    speedup: float

    def predict(self, rows: int | None = None) -> float:
        """Predict the speed-up. rows: other than the published ones."""
        dense, fewer = (self._seconds(bits, rows or self.rows) for bits in (16, self.bits))
        return dense / fewer

    def _seconds(self, bits: float, rows: int) -> float:
        device = GPUS[self.gpu]
        flops, bandwidth = PUBLISHED.flops * device.flops, PUBLISHED.weights * device.bandwidth
        return product_seconds(rows, 1, bits / 8, flops=flops, bandwidth=bandwidth)


def _place(gpu: str, model: str, ranks: int, efficiency: Efficiency) -> PlacedModel:
    return PlacedModel(model=SHAPES[model], device=GPUS[gpu], ranks=ranks, efficiency=efficiency)


def read_rows() -> list[Row]:
    return [
        Row(
            gpu=row["gpu"],
            tensor_parallel=int(row["tensor_parallel"]),
            target=row["target"],
            draft=row["draft"],
            budget=int(row["budget"]),
            context=int(row["context"]),
            batch=int(row["batch"]),
            gamma=int(row["gamma"]),
            speedup=float(row["speedup"]),
            fit=row["fit"] == "yes",
        )
        for row in _read("published.csv")
    ]


def read_steps() -> list[PublishedStep]:
    return [
        PublishedStep(
            gpu=row["gpu"],
            tensor_parallel=int(row["tensor_parallel"]),
            target=row["target"],
            context=int(row["context"]),
            batch=int(row["batch"]),
            milliseconds=float(row["milliseconds"]),
        )
        for row in _read("published_steps.csv")
    ]


def read_products() -> list[PublishedProduct]:
    return [
        PublishedProduct(gpu=row["gpu"], bits=float(row["bits"]), rows=int(row["rows"]), speedup=float(row["speedup"]))
        for row in _read("published_weights.csv")
    ]


def _read(name: str) -> list[dict[str, str]]:
    lines = (_HERE / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def fit(rows: Sequence[Row]) -> Constants:
    """Fit by least squares of log(predicted / published): a pattern search along each constant, with halving steps."""

    def loss(values: dict[str, float]) -> float:
        return sum(math.log(row.predict(Constants(**values)) / row.speedup) ** 2 for row in rows)

    values = {name: (low + high) / 2 for name, (low, high) in _BOUNDS.items()}
    steps = {name: (high - low) / 4 for name, (low, high) in _BOUNDS.items()}
    min_loss = loss(values)
    for _ in range(12):
        moved = True
        while moved:
            moved = False
            for name, (low, high) in _BOUNDS.items():
                for sign in (1, -1):
                    tried = {**values, name: min(high, max(low, values[name] + sign * steps[name]))}
                    if (value := loss(tried)) < min_loss:
                        values, min_loss, moved = tried, value, True
        steps = {name: step / 2 for name, step in steps.items()}
    return Constants(**values)


def left_out(rows: Sequence[Row]) -> list[float]:
    """Predict each row with a fit to the others."""
    return [row.predict(fit([*rows[:i], *rows[i + 1 :]])) for i, row in enumerate(rows)]


def roofline(row: Row) -> float:
    """Predict the speed-up at the published gamma from data sheets alone: peak rates, no overheads."""
    sheet = Efficiency(flops=1.0, weights=1.0, kv=1.0, verify_attention=1.0, layer_s=0.0)
    speculation = row.speculation(sheet)
    return speculation.speedup(row.batch, row.context, row.gamma, row.alpha(Constants()))


def _errors(name: str, errors: Sequence[float]) -> str:
    mean = sum(map(abs, errors)) / len(errors)
    return f"{name}: mean {mean:.1%}, largest {max(map(abs, errors)):.1%}"


def main() -> None:
    rows, steps = read_rows(), read_steps()
    fitted, tested = [row for row in rows if row.fit], [row for row in rows if not row.fit]
    constants = fit(fitted)
    print(f"layer_s = {1e3 * constants.layer_s:.3f} ms, acceptance of the draft model = {constants.draft_model:.3f}\n")

    print(
        "| GPU | target | draft | context | batch | α | γ | published | predicted | error | left out | error | best γ |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    without = dict(zip(fitted, left_out(fitted), strict=True))
    for row in rows:
        predicted, (gamma, best) = row.predict(constants), row.best(constants)
        other = without.get(row)
        cells = (
            f"{row.tensor_parallel} × {row.gpu}",
            row.target,
            row.draft,
            row.context,
            row.batch,
            f"{row.alpha(constants):.2f}",
            row.gamma,
            f"{row.speedup:.2f}",
            f"{predicted:.2f}",
            f"{predicted / row.speedup - 1:+.1%}",
            f"{other:.2f}" if other else "",
            f"{other / row.speedup - 1:+.1%}" if other else "",
            f"{gamma}: {best:.2f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
    print(_errors("fitted rows", [row.predict(constants) / row.speedup - 1 for row in fitted]))
    print(_errors("left out", [predicted / row.speedup - 1 for row, predicted in without.items()]))
    print(_errors("rows never fitted", [row.predict(constants) / row.speedup - 1 for row in tested]))
    print(_errors("data sheets alone, all rows", [roofline(row) / row.speedup - 1 for row in rows]))

    print("\n| GPU | target | context | batch | published ms | predicted ms | error |\n|---|---|---|---|---|---|---|")
    for step in steps:
        ms = step.predict(constants)
        print(
            f"| {step.tensor_parallel} × {step.gpu} | {step.target} | {step.context} | {step.batch} "
            f"| {step.milliseconds:.1f} | {ms:.1f} | {ms / step.milliseconds - 1:+.1%} |"
        )

    print("\n| GPU | bits | rows | published | predicted | error |\n|---|---|---|---|---|---|")
    for product in read_products():
        gain = product.predict()
        print(
            f"| {product.gpu} | {product.bits} | {product.rows} | {product.speedup:.2f} | {gain:.2f} "
            f"| {gain / product.speedup - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
