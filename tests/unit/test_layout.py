"""Rules of the source tree: import layers, sizes, names, the map in docs, no torch in the server, no unpickling."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = ("server", "bench", "planner", "engine", "models", "parallel", "kernels")
"""Layers from top to bottom: a module imports its own layer and those below."""
ROOMS = (
    *("processes", "llm", "core", "worker", "ranks", "speculation", "kv", "sampling", "batch", "control", "scheduler"),
    *("ngram", "config", "text", "plan", "messages", "params", "oom", "logs"),
)
"""The same order for folders and modules inside engine/."""
MAX_FILES, MAX_LINES = 14, 400
"""Modules in a folder of the product, and lines in a module."""
SAME_NAME = ("server/cli/", "bench/peers/programs/", "bench/gpu/__main__.py", "__init__.py")
"""Modules that are named after a command or an engine, whatever else has that name."""
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING = {
    *("broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list"),
    *("all_gather_object", "gather_object", "send_pyobj", "recv_pyobj", "unsafe_load", "full_load"),
}
UNPICKLING_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("yaml", "load")}


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool
    """Whether it is in a function, or only for type checkers or a program: not executed when the module is imported."""
    program: bool
    """Whether it is executed only when the module runs as a program, which is then not the module that others
    import."""


@cache
def parsed(text: str) -> ast.Module:
    """Parse each file once for all tests."""
    return ast.parse(text)


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return parsed(self.path.read_text(encoding="utf-8"))

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, lazy=False, program=False))

    def _imports(self, node: ast.AST, lazy: bool, program: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, program) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = self._base(child)
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy, program) for alias in child.names)
            test = ast.unparse(child.test) if isinstance(child, ast.If) else ""
            main = test == "__name__ == '__main__'"
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or test == "TYPE_CHECKING"
            yield from self._imports(child, lazy or later or main, program or main)

    def _base(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        return ".".join([*parents, node.module] if node.module else parents)


def find_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, path)
    return modules


def resolve(target: str, modules: dict[str, Module]) -> str | None:
    """Return our module that `target` names or that defines it, or None."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target or None


def height(name: str) -> tuple[int, int] | None:
    """Place of a module in the order of imports, top first; None for a module of others."""
    layer, _, rest = name.partition(".")
    if layer == "tests":
        return (-1, 0)
    if layer not in LAYERS:
        return None
    room = rest.partition(".")[0]
    return (LAYERS.index(layer), ROOMS.index(room) if layer == "engine" and room in ROOMS else 0)


def upward_imports(modules: dict[str, Module]) -> list[str]:
    faults = []
    for module in modules.values():
        own = height(module.name)
        assert own is not None
        for item in module.imports:
            target = height(item.target)
            if target is not None and target < own:
                faults.append(f"{module.path}:{item.line} imports {item.target}")
    return faults


def find_cycle(modules: dict[str, Module]) -> list[str] | None:
    graph = {}
    for module in modules.values():
        targets = {resolve(item.target, modules) for item in module.imports if not item.program}
        graph[module.name] = {target for target in targets if target and target != module.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return None


def route_to_torch(start: str, modules: dict[str, Module], lazy_too: bool) -> list[str] | None:
    """Find a chain of imports from `start` (with `lazy_too`, also from its functions) to torch, or None."""
    routes = [[start]]
    seen = {start}
    for route in routes:
        module = modules[route[-1]]
        targets = {item.target for item in module.imports if not item.lazy or (lazy_too and len(route) == 1)}
        parts = module.name.split(".")
        # Importing a module first imports its packages.
        targets |= {".".join(parts[:count]) for count in range(1, len(parts))}
        for target in sorted(targets):
            if target.partition(".")[0] in ("torch", "transformers", "flashinfer", "triton"):
                return [*route, target]
            if (name := resolve(target, modules)) is not None and name not in seen:
                seen.add(name)
                routes.append([*route, name])
    return None


def unpickling(tree: ast.Module) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
            faults += [f"{node.lineno}: {name}" for name in names if name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0], *(alias.name for alias in node.names)]
            faults += [f"{node.lineno}: {name}" for name in names if name in UNPICKLERS | UNPICKLING]
            faults += [f"{node.lineno}: {name}" for name in names[1:] if (node.module, name) in UNPICKLING_CALLS]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in UNPICKLING or (owner, node.attr) in UNPICKLING_CALLS:
                faults.append(f"{node.lineno}: {owner}.{node.attr}")
        elif isinstance(node, ast.keyword):
            setting = f"{node.arg}={ast.unparse(node.value)}"
            if setting in ("allow_pickle=True", "weights_only=False"):
                faults.append(f"{node.value.lineno}: {setting}")
    return faults


MODULES = find_modules(ROOT)
SERVER = [name for name in MODULES if name.partition(".")[0] == "server"]


def test_every_layer_is_there() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(LAYERS)


def test_imports_run_downward() -> None:
    assert upward_imports(MODULES) == []


def test_every_room_has_its_place() -> None:
    rooms = {name.split(".")[1] for name in MODULES if name.startswith("engine.")}
    assert rooms == set(ROOMS)


def test_no_import_cycles() -> None:
    assert find_cycle(MODULES) is None


@pytest.mark.parametrize("name", SERVER)
def test_server_never_imports_torch(name: str) -> None:
    """Commands that run an engine in their own process may import torch, but only when they are called."""
    command = name.startswith("server.cli.")
    assert route_to_torch(name, MODULES, lazy_too=not command) is None


def test_server_runs_without_torch() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code, *SERVER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_unpickles() -> None:
    paths = [path for layer in (*LAYERS, "tests") for path in sorted((ROOT / layer).rglob("*.py"))]
    faults = {path: unpickling(parsed(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: found for path, found in faults.items() if found} == {}


def test_folders_and_files_stay_small() -> None:
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if path.name != "__init__.py"]
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in files)
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}
    files += (ROOT / "tests").rglob("*.py")
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_no_two_modules_or_classes_of_one_name() -> None:
    modules, classes = defaultdict(list), defaultdict(list)
    for module in MODULES.values():
        file = module.path.relative_to(ROOT).as_posix()
        if not any(file.startswith(each) or file.endswith(each) for each in SAME_NAME):
            modules[module.path.stem].append(file)
        if not file.startswith("bench/peers/programs/"):  # each is a program of its own
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    classes[node.name].append(file)
    assert {name: files for name, files in (modules | classes).items() if len(files) > 1} == {}


def test_the_map_lists_every_module() -> None:
    folder, listed = "", []
    for line in (ROOT / "docs" / "structures.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\*\*`(.+/)`\*\*", line):
            folder = found[1]
        elif found := re.match(r"- `(\w+\.py)` \S", line):
            listed.append(folder + found[1])
    modules = [module.path.relative_to(ROOT).as_posix() for module in MODULES.values()]
    assert sorted(listed) == sorted(["magicdec.py", *(file for file in modules if not file.endswith("__init__.py"))])


def test_no_test_module_imports_from_another() -> None:
    faults = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            faults += [
                f"{path}:{node.lineno} imports {name}" for name in names if re.match(r"tests\.(?!support\b)", name)
            ]
    assert faults == []


class TestTheChecksThemselves:
    """Each check detects the fault that it looks for."""

    @staticmethod
    def tree(root: Path, files: dict[str, str]) -> dict[str, Module]:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return find_modules(root)

    def test_upward(self, tmp_path: Path) -> None:
        modules = self.tree(tmp_path, {"models/a.py": "def f():\n    from engine.b import x\n", "engine/b.py": ""})
        assert len(upward_imports(modules)) == 1

    def test_upward_inside_engine(self, tmp_path: Path) -> None:
        files = {"engine/batch/a.py": "from engine.kv.b import x", "engine/kv/b.py": "from engine.batch import c"}
        (fault,) = upward_imports(self.tree(tmp_path, files | {"engine/batch/c.py": ""}))
        assert fault.endswith("imports engine.kv.b.x")

    def test_cycle(self, tmp_path: Path) -> None:
        files = {
            "engine/a.py": "from . import b",
            "engine/b.py": "def f():\n    import engine.a",
            "engine/__init__.py": "",
        }
        assert set(find_cycle(self.tree(tmp_path, files)) or ()) == {"engine.a", "engine.b"}
        files["engine/b.py"] = "if __name__ == '__main__':\n    import engine.a"
        assert find_cycle(self.tree(tmp_path, files)) is None

    def test_torch(self, tmp_path: Path) -> None:
        files = {
            "server/__init__.py": "",
            "server/a.py": "import engine.b",
            "engine/__init__.py": "import kernels.c",
            "engine/b.py": "def f():\n    import torch",
            "kernels/c.py": "from torch import Tensor",
            "models/d.py": "def f():\n    import torch\nif __name__ == '__main__':\n    import torch",
        }
        modules = self.tree(tmp_path, files)
        expected = ["server.a", "engine.b", "engine", "kernels.c", "torch.Tensor"]
        assert route_to_torch("server.a", modules, lazy_too=False) == expected
        assert route_to_torch("models.d", modules, lazy_too=False) is None
        assert route_to_torch("models.d", modules, lazy_too=True) == ["models.d", "torch"]

    @pytest.mark.parametrize(
        "code",
        [
            "import pickle",
            "from pickle import loads",
            "import torch\ntorch.load('x')",
            "from torch import load",
            "import torch.distributed as dist\ndist.broadcast_object_list([])",
            "import numpy as np\nnp.fromfile('x', allow_pickle=True)",
            "socket.recv_pyobj()",
        ],
    )
    def test_unpickling(self, code: str) -> None:
        assert unpickling(ast.parse(code))
