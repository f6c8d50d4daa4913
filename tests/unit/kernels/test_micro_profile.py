"""Choice of instruction sets by measurement, on small shapes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kernels.cpu import compiler, micro_profile
from kernels.cpu.choice import PREFETCHES, TILES_FROM, KernelChoice, Prefetch
from kernels.cpu.compiler import SOFTWARE_TILES, InstructionSet, KernelsUnavailable, supported
from kernels.cpu.cpus import usable_cores
from kernels.cpu.library import CpuKernels, open_set
from kernels.cpu.micro_profile import (
    KINDS,
    PRODUCTS,
    MicroProfile,
    Rate,
    choose,
    full_profile,
    measure,
    measured_choice,
    usable,
)
from models.default import user_cache
from server.cli import main
from tests.support.rig import as_tested, compiled

BEST = supported()[0]
TILES = as_tested(SOFTWARE_TILES)
NO_COMPILER_TAKES = InstructionSet("avx1024", frozenset(), ("-mno-such-thing",))
needs_software_tiles = pytest.mark.skipif(
    not SOFTWARE_TILES.features <= BEST.features,
    reason="this processor lacks what tiles in software are made of",
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that take no time, sets of this processor's own kernels alone, and no memory of earlier choices."""
    compiled()  # skips where there are no kernels
    for name, value in {
        "_SECONDS": 0.0,
        "_REPEATS": 2,
        "_QUERIES": ((2, 64, 1), (1, 64, 20)),
        "_ROWS": (1, 17),
        "_TILES_FROM": (1, 4),
        "_SIZE": 64,
        "_POOL_BYTES": 1 << 16,
    }.items():
        monkeypatch.setattr(micro_profile, name, value)
    # Libraries are found there, so that each test can have a folder of its own for what is measured.
    monkeypatch.setattr(compiler, "BUILT", user_cache() / "kernels")
    restrict(monkeypatch, [BEST])
    micro_profile._kept.cache_clear()


def restrict(
    monkeypatch: pytest.MonkeyPatch, sets: list[InstructionSet], others: Sequence[InstructionSet] = ()
) -> None:
    """Let the processor have these sets, of which `others` are not among the fastest."""
    monkeypatch.setattr(micro_profile, "rivals", lambda: list(sets))
    monkeypatch.setattr(micro_profile, "supported", lambda: [*sets, *others])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[MicroProfile]:
    """The profiles that are measured from now on."""
    made: list[MicroProfile] = []

    def count(*arguments: Any, **more: Any) -> MicroProfile:
        made.append(measure(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(micro_profile, "measure", count)
    return made


def restart() -> None:
    """Forget what a new process would not know."""
    micro_profile._kept.cache_clear()


# -- the fastest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "max_rows", "fastest"),
    [
        ({"int4": (1.0, 9.0), "int8": (2.0, 2.0), "dense": (4.0, 4.0)}, 16, "int4"),  # 17 rows are not counted
        ({"int4": (1.0, 9.0), "int8": (2.0, 2.0), "dense": (4.0, 4.0)}, 17, "int8"),  # geometric means of 3, 2 and 4
        ({"int4": (1.0, 1.0), "int8": (1.05, 1.05), "dense": (4.0, 4.0)}, 17, "int8"),  # nearly equal: more bits
        ({"int4": (4.0, 4.0), "int8": (4.0, 4.0), "dense": (3.0, 3.0)}, 1, None),
    ],
)
def test_the_fastest_format(seconds: dict[str, tuple[float, float]], max_rows: int, fastest: str | None) -> None:
    """Only the chosen set of each kind counts."""
    rates = [
        Rate(PRODUCTS[name], f"{rows} rows", variant, taken if variant == "mine" else 0.1, 1.0, "bytes")
        for name, each in seconds.items()
        for rows, taken in zip((1, 17), each, strict=True)
        for variant in ("mine", "other")
    ]
    profile = MicroProfile(rates, "other", "mine", "mine", "mine", 1, 1, PREFETCHES[0])
    assert profile.fastest_format(max_rows) == fastest


def test_the_format_of_drafts_where_nothing_is_measured() -> None:
    assert compiled().fastest_format(8) == "int8"


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_it_is_measured_once(tmp_path: Path, measured: list[MicroProfile]) -> None:
    folder = tmp_path / "not there yet"
    first = choose(folder)
    assert choose(folder) == first
    restart()
    assert choose(folder) == first
    assert len(measured) == 1
    (file,) = folder.iterdir()
    assert file.name.startswith("rates-")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"{}",
        b'{"rates": [], "attention": 5}',
        {"attention": "none such"},
        {"products_int8": "none such"},
        {"products_int4": "none such"},
        {"prefetch": {"blocks": 1000, "to_l2": True}},
    ],
    ids=str,
)
def test_a_broken_file_is_measured_again(
    tmp_path: Path, measured: list[MicroProfile], content: bytes | dict[str, object]
) -> None:
    first = choose(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = msgspec.json.decode(file.read_bytes())
    file.write_bytes(content if isinstance(content, bytes) else msgspec.json.encode(whole | content))
    restart()
    second = choose(tmp_path)
    assert (second.attention, second.products) == (first.attention, first.products)
    assert len(measured) == 2
    restart()
    choose(tmp_path)
    assert len(measured) == 2


def test_without_a_folder_nothing_is_measured(tmp_path: Path, measured: list[MicroProfile]) -> None:
    """Another start, or another rank, might choose otherwise."""
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file/kernels"):
        assert choose(folder) == KernelChoice.all_of(BEST)
    assert measured == []
    assert full_profile(None, anew=False).attention == BEST.name


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    choose(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_full_profile_is_what_is_chosen_from_then_on(tmp_path: Path, measured: list[MicroProfile]) -> None:
    choose(tmp_path)
    whole = full_profile(tmp_path, anew=False)
    assert {rate.kernel for rate in whole.rates} == set(KINDS)
    assert measured_choice(tmp_path)[1] == whole
    assert len(measured) == 1
    anew = full_profile(tmp_path, anew=True)
    assert len(measured) == 2
    restart()
    assert choose(tmp_path) == anew.choice([BEST])
    assert measured_choice(tmp_path)[1] == anew
    assert len(measured) == 2


def test_other_numbers_of_threads_are_measured_apart(
    tmp_path: Path, measured: list[MicroProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(tmp_path)
    monkeypatch.setattr(micro_profile, "usable_cores", lambda: usable_cores() + 1)
    restart()
    before = torch.get_num_threads()
    choose(tmp_path)
    assert torch.get_num_threads() == before
    assert len(measured) == len(list(tmp_path.iterdir())) == 2


# -- sets that cannot be used ------------------------------------------------------------------------------------------


def test_a_set_that_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restrict(monkeypatch, [NO_COMPILER_TAKES], [BEST])
    assert usable(tmp_path) == [BEST]
    (message,) = caplog.messages
    assert message.startswith("kernels for avx1024 are not used: ")
    assert "no-such-thing" in message
    assert choose(tmp_path).sets == [BEST]


def test_a_set_that_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = InstructionSet("amx", frozenset(), ())

    def open_some(folder: Path | None, target: InstructionSet) -> tuple[Path, int]:
        if target == refused:
            raise KernelsUnavailable("the system does not permit the instructions of amx")
        return open_set(folder, target)

    def build_some(target: InstructionSet, folder: Path | None) -> Path:
        if target == refused:  # compilers take every set; it would take them long
            return tmp_path / "amx.so"
        return compiler.build_kernels(target, folder)

    monkeypatch.setattr(micro_profile, "open_set", open_some)
    monkeypatch.setattr(micro_profile, "build_kernels", build_some)
    restrict(monkeypatch, [refused, BEST], [NO_COMPILER_TAKES])
    assert usable(tmp_path) == [BEST]
    assert caplog.messages == ["kernels for amx are not used: the system does not permit the instructions of amx"]
    choice = choose(tmp_path)
    assert choice.sets == [BEST]
    CpuKernels(tmp_path, choice)


def test_where_no_set_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restrict(monkeypatch, [NO_COMPILER_TAKES], [replace(NO_COMPILER_TAKES, name="avx2048")])
    with pytest.raises(KernelsUnavailable, match="no-such-thing"):
        choose(tmp_path)


# -- tiles -------------------------------------------------------------------------------------------------------------


@needs_software_tiles
def test_tiles_beside_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.build_kernels(TILES, user_cache() / "kernels")
    restrict(monkeypatch, [TILES, BEST])
    profile = full_profile(tmp_path, anew=False)
    sets = {TILES.name, BEST.name}
    assert {rate.variant for rate in profile.rates if rate.kernel != KINDS[0]} == sets
    assert {rate.variant for rate in profile.rates if rate.kernel == KINDS[0]} == {
        f"{name}, {prefetch}" for name in sets for prefetch in PREFETCHES
    }
    assert all(rate.seconds > 0 and rate.rate > 0 for rate in profile.rates)
    choice = choose(tmp_path)
    assert set(choice.sets) <= {TILES, BEST}
    assert choice.rest == TILES
    CpuKernels(tmp_path, choice)


@needs_software_tiles
def test_a_name_tells_what_each_set_is_for() -> None:
    """Times of rounds are kept by this name."""
    folder = user_cache() / "kernels"
    others = ((TILES, BEST, TILES), (BEST, TILES, TILES), (BEST, BEST, TILES), (TILES, TILES, BEST))
    choices = [KernelChoice(TILES, *each, TILES) for each in others]
    assert len({CpuKernels(folder, choice).name for choice in choices}) == 4


@needs_software_tiles
@pytest.mark.parametrize("int8", [False, True])
def test_tiles_round_as_their_twin_does(int8: bool) -> None:
    folder = user_cache() / "kernels"
    whole = KernelChoice.all_of(TILES)
    by_tiles, by_vectors = (
        CpuKernels(folder, replace(whole, tiles_from=rows, tiles_from_int8=rows)) for rows in (1, 1 << 30)
    )
    assert micro_profile._agree(by_tiles, by_vectors, int8=int8)
    if not int8:  # sums of bytes are exact on all sets
        assert not micro_profile._agree(by_tiles, compiled()._kernels, int8=int8)


@needs_software_tiles
@pytest.mark.parametrize("agree", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_the_number_of_rows_that_tiles_start_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, agree: bool, fast: bool
) -> None:
    """Tiles that round otherwise than their twin multiply at all numbers of rows, or results would depend on it."""

    def seconds(kernels: dict[str, CpuKernels], rows: int, weights: object) -> dict[str, float]:
        return dict.fromkeys(kernels, 1.0) | {"tiles": 0.5 if fast and rows >= 4 else 2.0}

    monkeypatch.setattr(micro_profile, "_agree", lambda *_, **__: agree)
    monkeypatch.setattr(micro_profile, "_product_seconds", seconds)
    monkeypatch.setattr(micro_profile, "_TILES_FROM", (1, 2, 4, 6))
    profile = measure(user_cache() / "kernels", [TILES])
    expected = 1 if not agree else 4 if fast else 6
    assert (profile.tiles_from, profile.tiles_from_int8) == (expected, expected)
    warning = "AMX tiles round otherwise than specified: they multiply at all numbers of rows"
    assert caplog.messages.count(warning) == (0 if agree else 2)


def test_a_set_without_tiles(tmp_path: Path) -> None:
    choice = choose(tmp_path)
    assert (choice.tiles_from, choice.tiles_from_int8) == (1, 1)
    assert KernelChoice.all_of(BEST).tiles_from == TILES_FROM


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: list[MicroProfile]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*flags: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["magicdec", "kernels", *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out.splitlines()

    head, attention, products, products_int8, products_int4, *rates = run()
    assert head.endswith(f", {usable_cores()} threads")
    assert attention in [f"attention: {BEST.name}, {prefetch}" for prefetch in PREFETCHES]
    assert [products, products_int8, products_int4] == [f"{kind}: {BEST.name}" for kind in PRODUCTS.values()]
    # Two shapes of attention with each way to prefetch, and two of each kind of product.
    assert len(rates) == 2 * len(PREFETCHES) + 3 * 2
    assert [line[0] for line in rates].count("*") == 2 + 3 * 2
    assert all(" us " in line and line.endswith(("GB/s", "GFLOP/s")) for line in rates)
    runs = len(measured)
    assert run() == [head, attention, products, products_int8, products_int4, *rates]
    assert len(measured) == runs
    run("--measure")
    assert len(measured) == runs + 1


def test_prefetches_are_named() -> None:
    assert str(Prefetch(2, to_l2=True)) == "prefetch 2 ahead to L2"
    assert str(Prefetch(1, to_l2=False)) == "prefetch 1 ahead"
