"""The kit for GPU machines without a network: what it holds, its size, and its installation."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import kit
from tests.support.paths import ROOT
from tests.support.profiles import is_all


def test_platforms_are_named_as_pip_names_them() -> None:
    tags = kit.platform_tags()
    assert tags[0] == "manylinux_2_35_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(tags)
    assert len(set(tags)) == len(tags)


def test_packages_have_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert set(kit.PACKAGES) <= pinned
    assert kit.FLASHINFER.partition("==")[0] in pinned  # a version of its own: not among the kit's constraints


def test_the_listing_and_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "modules/long_name").mkdir(parents=True)
    (tmp_path / "wheels/a.whl").write_bytes(b"x" * (3 << 20))
    (tmp_path / "modules/long_name/long_name.so").write_bytes(b"x" * (1 << 20))
    files = kit.listing(tmp_path)
    assert files == [(3 << 20, "wheels/a.whl"), (1 << 20, "modules/long_name/long_name.so")]
    assert kit.table(files).splitlines() == [
        "    3.00 MiB  wheels/a.whl",
        "    1.00 MiB  modules/…/long_name.so",
        "    4.00 MiB  in all",
    ]
    kit.check_size(files)
    monkeypatch.setattr(kit, "LIMIT_BYTES", (4 << 20) - 1)
    with pytest.raises(kit.KitError, match=r"has 4\.0 MiB, more than 3; the largest file is wheels/a\.whl"):
        kit.check_size(files)


def test_a_kit_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: str) -> str:
        commands.append(command)
        if "download" in command:
            constraints = Path(command[command.index("-c") + 1]).read_text()
            assert "flashinfer" not in constraints
            assert "pydantic==" in constraints
            folder = Path(command[command.index("-d") + 1])
            (folder / "a.whl").write_bytes(b"x")
            return ""
        module = tmp_path / "cache/some/some.so"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_bytes(b"y")
        return f"   2.6 MB  {module}\n"

    into = tmp_path / "build/kit"
    monkeypatch.setattr(kit, "_run", run)
    monkeypatch.setattr(kit, "_installed", lambda name, requirements: tmp_path / name)
    kit.make_kit("3.12", into, ["8.0"], [64, 128], ["float16"])
    assert [command[command.index("--python-version") + 1] for command in commands[:1]] == ["3.12"]
    assert commands[1][-7:] == ["--architectures", "8.0", "--head-dims", "64", "128", "--dtypes", "float16"]
    assert {path for _, path in kit.listing(into)} == {
        *("wheels/a.whl", "modules/some/some.so", "install.sh", "CONTENTS"),
    }
    assert os.access(into / "install.sh", os.X_OK)

    monkeypatch.setattr(kit, "LIMIT_BYTES", 0)
    with pytest.raises(kit.KitError):
        kit.make_kit("3.12", into, ["8.0"], [], [])
    assert (into / "wheels/a.whl").exists()  # what was there before
    assert [path.name for path in into.parent.iterdir()] == ["kit"]


def test_installation(tmp_path: Path) -> None:
    """The packages, and FlashInfer's modules where it looks for them; again over the same folder."""
    (tmp_path / "kit/wheels").mkdir(parents=True)
    (tmp_path / "kit/modules/some").mkdir(parents=True)
    (tmp_path / "kit/modules/some/some.so").write_bytes(b"y")
    (tmp_path / "kit/install.sh").write_text(kit.INSTALL)
    with zipfile.ZipFile(tmp_path / "kit/wheels/flashinfer-1-py3-none-any.whl", "w") as wheel:
        info = "flashinfer-1.dist-info"
        wheel.writestr("flashinfer/__init__.py", "")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: flashinfer\nVersion: 1\nRequires-Dist: absent\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for _ in range(2 if is_all() else 1):
        done = subprocess.run(
            ["sh", str(tmp_path / "kit/install.sh")],
            env=os.environ | {"PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert done.stdout == f"export PYTHONPATH={tmp_path}/kit/site\n"
    assert (tmp_path / "kit/site/flashinfer/__init__.py").exists()
    assert (tmp_path / "kit/site/flashinfer/data/aot/some/some.so").read_bytes() == b"y"


def test_a_failing_program(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(kit.KitError, match="ended with status 3"):
        kit._run([sys.executable, "-c", "import sys; sys.exit(3)"])
