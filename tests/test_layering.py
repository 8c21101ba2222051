"""Imports go down the layers only, and what lies below the trainer knows nothing of TRL."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import trl_r3
from trl_r3.traces import trace_conditions

PACKAGE = Path(trl_r3.__file__).parent
ROOT = Path(__file__).parents[1]

# The stations of the data, from the top down. A room may import what stands below it, and itself; rooms of one floor
# know nothing of each other.
FLOORS = (
    ("cli",),
    ("trainers",),
    ("traces", "engines"),
    ("masks", "alarm", "routers"),
    ("gating",),
    ("records",),
)
ROOMS = tuple(room for floor in FLOORS for room in floor)
LEVEL = {"__init__": -1, "_compat": len(FLOORS)}
LEVEL |= {room: level for level, floor in enumerate(FLOORS) for room in floor}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def names(paths):
    return [str(path.relative_to(PACKAGE)) for path in paths]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    package = ("trl_r3", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "trl_r3" else {module}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("trl_r3.")}


def test_the_rooms_are_the_folders():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "_compat"}


def upward(path: Path) -> set[str]:
    """Rooms above its own, and beside it, that a file imports from."""
    own = room_of(path)
    return {name for name in rooms(imported(path)) - {own} if name in LEVEL and LEVEL[name] <= LEVEL[own]}


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_go_down(path):
    assert upward(path) == set()


def test_the_walk_sees_imports(monkeypatch):
    """Or the test above could not fail."""
    assert {"records", "gating"} <= rooms(imported(PACKAGE / "routers" / "passes.py"))
    assert {"engines", "records"} <= rooms(imported(PACKAGE / "trainers" / "lifecycle.py"))
    assert "routers" in rooms(imported(PACKAGE / "trainers" / "attaching.py"))
    assert {"trainers", "routers"} <= rooms(imported(PACKAGE / "__init__.py"))
    assert any(name.split(".")[0] == "trl" for name in imported(PACKAGE / "trainers" / "grpo.py"))
    monkeypatch.setitem(LEVEL, "records", -1)
    assert upward(PACKAGE / "routers" / "passes.py") == {"records"}


def tops(path):
    return {name.partition(".")[0] for name in imported(path)}


TRL_MAY_BE_KNOWN_IN = {"cli", "trainers", "traces", "masks"}
ENGINES_THAT_KNOW_TRL = {"vllm_colocate", "vllm_server"}
WITHOUT_TRL = [
    path for path in SOURCES if room_of(path) not in TRL_MAY_BE_KNOWN_IN and path.stem not in ENGINES_THAT_KNOW_TRL
]


@pytest.mark.parametrize("path", WITHOUT_TRL, ids=names(WITHOUT_TRL))
def test_only_trainers_know_trl(path):
    if path.parent != PACKAGE:
        assert not tops(path) & {"trl", "vllm", "sglang"}


def test_pure_tensors():
    """The record as data imports nothing but PyTorch, NumPy and a format of files."""
    standard = set(sys.stdlib_module_names)
    for path in (PACKAGE / "records").glob("*.py"):
        assert tops(path) - standard <= {"torch", "numpy", "safetensors", "trl_r3"}


def without_tests(modules: list[Path], files: set[str]) -> list[str]:
    """Modules that no test file is named after."""
    return names(path for path in modules if f"test_{path.stem.removeprefix('_')}.py" not in files)


def test_each_module_has_a_test_file():
    """Who changes a module finds by its name what holds it. What a command does is tested by commands."""
    modules = [path for path in SOURCES if room_of(path) not in ("cli", "__init__") and path.stem != "__init__"]
    files = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert len(modules) > 45
    assert without_tests(modules, files) == []
    assert without_tests(modules, files - {"test_compat.py", "test_turns.py"}) == ["_compat.py", "engines/turns.py"]


def test_no_name_stands_twice():
    """A file, or a class, that is named like another one is looked for in the wrong place."""
    stems = [path.stem for path in SOURCES if not path.stem.startswith("__")]
    trees = [ast.parse(path.read_text(encoding="ascii")) for path in SOURCES]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert len(stems) > 80 and len(classes) > 80
    assert [name for name in (*stems, *classes) if (stems + classes).count(name) > 1] == []


def imported_at_once(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported itself, not for type checkers only."""
    package = ("trl_r3", *path.relative_to(PACKAGE).parent.parts)
    nodes = [node for node in ast.parse(path.read_text(encoding="ascii")).body if isinstance(node, ast.ImportFrom)]
    base = {node: package[: len(package) - node.level + 1] for node in nodes if node.level}
    return {".".join(filter(None, [*parts, node.module])) for node, parts in base.items()}


def test_no_circle():
    """Nothing is imported while it is being imported."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in SOURCES}
    graph = {name: imported_at_once(path) & set(names) for name, path in names.items()}
    assert "trl_r3.trainers.log" in graph["trl_r3.trainers.attaching"]
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)
    graph["trl_r3.trainers.log"].add("trl_r3.trainers.attaching")
    with pytest.raises(CycleError, match="trl_r3.trainers"):
        list(TopologicalSorter(graph).static_order())


def test_public_names():
    """Each exists, and nothing else is public; type checkers see the same names."""
    for name in trl_r3.__all__:
        assert getattr(trl_r3, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.name for node in imports for alias in node.names) == trl_r3.__all__
    assert set(trl_r3.__all__) <= set(dir(trl_r3))
    with pytest.raises(AttributeError, match="no attribute 'R4Trainer'"):
        trl_r3.R4Trainer  # noqa: B018


def test_the_version_is_that_of_the_code_that_runs(tmp_path):
    """A checkout that is not installed has one, and so has a copy; an installation tells that of its metadata."""
    script = "import trl_r3; print(trl_r3.__version__)"

    def said(folder: Path) -> str:
        # without site-packages of its own, in which this very package may be installed
        names = "import sys, importlib.metadata as m; own = m.Distribution.from_name\n"
        hidden = "m.Distribution.from_name = lambda name: own('no-' + name if 'r3' in name else name)\n"
        command = [sys.executable, "-c", f"{names}{hidden}sys.path.insert(0, {str(folder)!r})\n{script}"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    copytree(PACKAGE, tmp_path / "trl_r3", ignore=ignore_patterns("__pycache__"))
    assert said(tmp_path) == "unknown"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = another\nversion = 7\n")
    assert said(tmp_path) == "unknown"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = trl-r3\nversion = 9.9.9\n")
    assert said(tmp_path) == "9.9.9"
    (ROOT / "setup.cfg").exists() or pytest.skip("this is no checkout")
    assert metadata.version("trl-r3") == trl_r3.__version__ == trace_conditions.__version__


def test_importing_the_package_does_not_import_trl():
    code = "import sys; from trl_r3 import enable_routing_replay; "
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"trl_r3", "torch", "transformers"} <= set(loaded.stdout.split())
    assert not {"trl", "vllm", "peft"} & set(loaded.stdout.split())


USED = [*ROOT.glob("examples/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]


@pytest.mark.parametrize("path", USED, ids=lambda path: path.name)
def test_users_need_no_deeper_import(path):
    """What examples and documents use is public by place."""
    found = re.findall(r"^ *(?:from|import) (trl_r3[.\w]*)", path.read_text(), re.M)
    assert set(found) <= {"trl_r3"}


def environment_reads(source: str) -> list[int]:
    """Lines that read the environment."""
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv"))
    )


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_no_environment_variables(path):
    """What the package does follows from its arguments."""
    assert environment_reads("import os\nos.environ['A']\nos.getenv('A')\nfrom os import environ") == [2, 3, 4]
    assert environment_reads(path.read_text(encoding="ascii")) == []


CONTAINERS = {
    "dict",
    "list",
    "set",
    "defaultdict",
    "OrderedDict",
    "WeakKeyDictionary",
    "WeakValueDictionary",
    "WeakSet",
}


def empty_containers(source: str) -> list[int]:
    """Lines that put an empty container into the module: it is there to be filled."""
    found = []
    for node in ast.parse(source).body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        literal = value is not None and ast.unparse(value) in ("[]", "{}")
        called = (
            isinstance(value, ast.Call) and not value.args and ast.unparse(value.func).split(".")[-1] in CONTAINERS
        )
        if literal or called:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_no_registry(path):
    """A registry would be shared by all models."""
    assert empty_containers("a = []\nb: dict = {}\nc = set()\nd = [1]\ne = {1: 2}\n__all__ = ['f']") == [1, 2, 3]
    source = path.read_text(encoding="ascii")
    assert empty_containers(source) == []
    assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(source)))


TEXT = [
    path
    for pattern in ("trl_r3/**/*", "tests/**/*", "docs/**/*", "examples/**/*", "*")
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".md", ".cfg", ".toml", ".txt", ".h", ".cpp", ".cu", ".sh"} and path.is_file()
]


def test_ascii_only():
    assert len(TEXT) > 40
    assert [str(path) for path in TEXT if not path.read_bytes().isascii()] == []
