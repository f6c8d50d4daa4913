"""bench.gpu.check with steps that need no GPU: order, time, table, failures, hangs and interrupts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import check
from bench.gpu.check import Step
from bench.gpu.check_report import Finding, read_tests
from tests.support.paths import ROOT
from tests.support.profiles import whole_test_only_in_all

PYTEST = (*check._PYTEST, "-o", "addopts=-ra")
FILES = {
    "good": "def test_a(): pass\n\ndef test_b(): pass",
    "bad": "def test_a(): pass\n\ndef test_b():\n    assert 1 + 1 == 3, 'two lines\\nof text'",
    "absent": "import pytest\n\npytest.skip('no CUDA device is present', allow_module_level=True)",
    "broken": "import a_package_that_is_missing",
}
HUNG = """
import time
print('a.py::test_a FAILED [ 50%]', flush=True)
print('a.py::test_b ', end='', flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print('\\n\\nFAILED a.py::test_a - AssertionError: early', flush=True)
"""
"""What pytest prints when it is interrupted in a test that hangs, after one that failed."""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('a.py::test_a PASSED [ 50%]', flush=True)
print('a.py::test_b ', end='', flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture(autouse=True)
def _few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps start sooner without the plugins that this environment happens to have."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def step_of(folder: Path, name: str, seconds: float = 20) -> Step:
    file = folder / f"test_{name}.py"
    file.write_text(FILES[name], encoding="utf-8")
    return Step(name, (*PYTEST, str(file)), seconds)


def program(name: str, code: str, seconds: float = 20, results: bool = False) -> Step:
    return Step(name, ("-c", code), seconds, results=results)


def lines_of(text: str) -> dict[str, list[str]]:
    """Words of the table's lines, by step."""
    _, _, lines = text.partition("step ")
    return {line.split()[0]: line.split()[1:] for line in lines.splitlines()[1:] if line[:1].strip()}


def notes_in(folder: Path) -> dict[str, str]:
    results = msgspec.json.decode((folder / "results.json").read_bytes())
    return {result["name"]: result["found"]["note"] for result in results}


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_steps_go_on_after_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("good", "bad", "absent", "broken")
    missing = Step("missing", ("-c", "1 / 0"), 20, package="a_package_that_is_missing")
    crash = program("crash", "import os; print('on the way', flush=True); os.kill(os.getpid(), 11)")
    steps = [*(step_of(tmp_path, name) for name in names), missing, crash, program("late", "", 1000)]
    assert check.run(steps[:1], 30, tmp_path / "logs") == 0
    assert check.run([missing], 30, tmp_path / "logs") == 1  # nothing ran
    assert check.run([steps[0], missing], 30, tmp_path / "logs") == 0
    capsys.readouterr()
    assert check.run(steps, 200, tmp_path / "logs") == 1
    out, err = capsys.readouterr()
    assert err.split() == [word for i, step in enumerate(steps) for word in (f"{i + 1}/7", step.name)]
    said = lines_of(out)
    assert list(said) == [step.name for step in steps]
    assert [said[name][:1] + said[name][2:5] for name in names] == [
        ["passed", "2", "0", "0"],
        ["failed", "1", "1", "0"],
        ["failed", "0", "0", "0"],
        ["failed", "0", "0", "0"],
    ]
    notes = notes_in(tmp_path / "logs")
    assert notes["bad"].endswith("test_bad.py::test_b - AssertionError: two lines")
    assert notes["absent"] == "no test ran: no CUDA device is present"
    assert "test_broken.py" in notes["broken"]
    assert notes["crash"] == "ended by signal 11: on the way"
    assert notes["missing"] == "a_package_that_is_missing is not installed"
    assert said["missing"][0] == "skipped"
    assert notes["late"].startswith("needs 1000 s, and ")
    assert said["late"][:2] == ["no", "time"]
    assert "of text" in (tmp_path / "logs" / "bad.log").read_text(encoding="utf-8")
    assert (tmp_path / "logs" / "table.txt").read_text(encoding="utf-8") in out
    assert (tmp_path / "logs" / "machine.txt").read_text(encoding="utf-8") in out
    assert str(tmp_path / "logs") in out


@whole_test_only_in_all
def test_a_hanging_step_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that hangs gets no more than its limit; its processes end; what it found until then is in the table."""
    monkeypatch.setattr(check, "_GRACE", 1)
    monkeypatch.setattr(check, "_COST", 1.5)
    steps = [program("hung", HUNG, 2), program("deaf", DEAF, 2), program("parent", PARENT, 1)]
    steps.append(step_of(tmp_path, "good", 5))
    began = time.monotonic()
    assert check.run(steps, sum(step.seconds + 1.5 for step in steps), tmp_path / "logs") == 1
    assert time.monotonic() - began < sum(step.seconds + 1.5 for step in steps)
    said = lines_of(capsys.readouterr().out)
    assert said["hung"][:2] + said["hung"][3:6] == ["too", "long", "0", "1", "0"]
    assert said["deaf"][:2] + said["deaf"][3:6] == ["too", "long", "1", "0", "0"]
    assert said["parent"][:2] == ["too", "long"]
    assert said["good"][0] == "passed"
    notes = notes_in(tmp_path / "logs")
    assert notes["hung"] == "ended in a.py::test_b; a.py::test_a - AssertionError: early"
    assert notes["deaf"] == "ended in a.py::test_b"
    assert gone(int((tmp_path / "logs" / "parent.log").read_text(encoding="utf-8").split()[0]))


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_the_step_and_prints_the_table(tmp_path: Path, signal: str) -> None:
    interrupt = f"import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.{signal})"
    steps = [program("first", ""), program("second", f"{interrupt}; time.sleep(600)"), program("third", "")]
    code = (
        "import sys; from pathlib import Path; from bench.gpu.check import Step, run; "
        f"sys.exit(run({steps!r}, 100, Path({str(tmp_path / 'logs')!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130, done.stderr
    said = lines_of(done.stdout)
    assert list(said) == ["first", "second"]
    assert said["second"][0] == "interrupted"
    assert "third" not in done.stdout
    assert gone(int((tmp_path / "logs" / "second.log").read_text(encoding="utf-8").split()[0]))


def test_what_pytest_prints() -> None:
    head = "==== test session starts ====\nplatform linux\ncollected 4 items\n\n"
    slow = 'a/b.py::test_slow[x-1] Timeout (0:00:20)!\nThread 0x1 (most recent first):\n  File "a/b.py", line 3 in f\n'
    quick = "a/b.py::test_a PASSED   [ 25%]\na/b.py::test_b SKIPPED (no GPU)  [ 50%]\n"
    passed = head + quick + slow + "PASSED [100%]\n"
    assert read_tests(passed, 0) == (True, Finding("", (2, 0, 1)))
    assert read_tests(passed, None) == (False, Finding("ended outside tests", (2, 0, 1)))
    assert read_tests(head + quick + slow, None) == (False, Finding("ended in a/b.py::test_slow[x-1]", (1, 0, 1)))
    behind = "==== warnings summary ====\na/b.py::test_a\n  a warning\n"
    assert read_tests(passed + behind, None)[1].note == "ended outside tests"
    failed = (
        head + "a/b.py::test_a FAILED [ 50%]\n==== FAILURES ====\nPASSED [ 50%]\n==== short test summary info ====\n"
    )
    found = read_tests(failed + "SKIPPED [1] a.py:3: old\nFAILED a/b.py::test_a - Boom\nsecond line\n", 1)
    assert found == (False, Finding("a/b.py::test_a - Boom", (0, 1, 0)))
    assert (
        read_tests("ImportError while loading conftest\nE   no module\n", 4)[1].note == "exit status 4: E   no module"
    )


def test_time_that_is_left_goes_to_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run(self: check.Check, command: list[str], log: Path, limit: float) -> int:
        limits.append(limit)
        log.touch()
        return 1

    monkeypatch.setattr(check.Check, "_run", run)
    steps = [program("first", "", 50), program("second", "", 30)]
    check.run(steps, 100, tmp_path)
    assert limits == pytest.approx([59, 95], abs=2)
    check.run(steps, 60, tmp_path)  # they would not fit if the first took its time
    assert limits[2:] == pytest.approx([55, 55], abs=2)
    check.run(steps, 40, tmp_path)
    assert limits[4:] == pytest.approx([35], abs=2)


def test_rows_of_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrote(**said: object) -> str:
        return f"import sys, json; json.dump({said}, open(sys.argv[-1], 'w'))"

    lines = "print('16 x 8000', '     rows  context', '       16     8000', '', 'behind', sep='\\n')"
    bench = program("bench", f"{wrote(results=[1])}; {lines}", results=True)
    assert check.run([bench], 30, tmp_path / "logs") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["         rows  context", "           16     8000"]
    none = [
        program("left_out", f"{wrote(results=[])}; print('     rows  context'); print('does not fit')", results=True),
        program("noted", f"{wrote(results=[], notes=['why', 'more'])}; sys.exit(1)", results=True),
        program("error", "import sys; sys.exit('error: no CUDA device is present')", results=True),
    ]
    assert check.run(none, 60, tmp_path / "logs") == 1
    assert notes_in(tmp_path / "logs") == {
        "left_out": "no result: does not fit",
        "noted": "exit status 1: why",
        "error": "exit status 1: error: no CUDA device is present",
    }


def test_the_steps_fit_and_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(step.seconds + check._COST for step in check.STEPS) <= check.SECONDS
    for step in check.STEPS:
        if step.results:
            assert step.arguments[:2] == ("-m", "bench.gpu")
            monkeypatch.setattr(sys, "argv", ["gpu", *step.arguments[2:], "--json", "file"])
            arguments = gpu._arguments()
            assert len(arguments.points) == 1
            assert arguments.kernels == step.name.removeprefix("bench-")
        else:
            assert (ROOT / step.arguments[-1]).is_file()
    files = {f"tests/gpu/{file}" for file in os.listdir(ROOT / "tests" / "gpu") if file.startswith("test_")}
    assert files <= {step.arguments[-1] for step in check.STEPS}


def test_gpu_tests_need_nothing_that_only_development_needs() -> None:
    """A GPU machine may have pytest and what serving needs, and nothing else."""
    missing = ("hypothesis", "psutil", "httpx", "jsonschema", "transformers", "xdist", "flashinfer")
    code = (
        f"import sys, pytest; sys.modules.update(dict.fromkeys({missing}));"
        "sys.exit(pytest.main(['-p', 'pytest_timeout', '--collect-only', '-q', 'tests/gpu', 'tests/unit/conftest.py']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout + done.stderr


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "STEPS", [step_of(tmp_path, "good"), step_of(tmp_path, "bad")])
    monkeypatch.setattr(sys, "argv", ["check", "--steps", "good", "--logs", str(tmp_path / "kept")])
    assert check.main() == 0
    assert list(lines_of(capsys.readouterr().out)) == ["good"]
    assert (tmp_path / "kept" / "good.log").is_file()
    monkeypatch.setattr(sys, "argv", ["check", "--steps", "good,other"])
    with pytest.raises(SystemExit):
        check.main()
