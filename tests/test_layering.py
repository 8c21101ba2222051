"""Imports go down the layers only, and what lies below the trainer knows nothing of TRL."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_r3

PACKAGE = Path(trl_r3.__file__).parent
ROOT = Path(__file__).parents[1]

# From the top down. A module may import what stands below its own line, and itself.
LAYERS = [
    ["cli", "demo", "report", "check", "bench", "__init__"],
    ["r3_trainer", "r3_config", "replay_log", "other_trainers"],
    ["rollout", "generation", "decoding", "metrics", "trace"],
    ["router_replay"],
    ["forward_pass", "discovery", "router_check", "gated_router"],
    ["selection", "gating"],
    ["replay_data"],
    ["record_checks"],
    ["routed_experts", "_compat"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
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


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_go_down(path):
    room = room_of(path)
    assert room in LEVEL, f"put {room} into a layer"
    # public names of the package are what the layer on top may use
    used = {name for name in rooms(imported(path)) if name in LEVEL and name != room}
    level = LEVEL[room]
    upward = {name for name in used if LEVEL[name] < level}
    assert not upward, f"{room} imports {sorted(upward)} from above"


def test_the_walk_sees_imports():
    """Or the test above could not fail."""
    assert {"selection", "routed_experts"} <= rooms(imported(PACKAGE / "forward_pass.py"))
    assert "router_replay" in rooms(imported(PACKAGE / "r3_trainer.py"))
    assert "routed_experts" in rooms(imported(PACKAGE / "rollout" / "turns.py"))
    assert {"r3_trainer", "router_replay"} <= rooms(imported(PACKAGE / "__init__.py"))
    assert any(name.split(".")[0] == "trl" for name in imported(PACKAGE / "r3_trainer.py"))


def tops(path):
    return {name.partition(".")[0] for name in imported(path)}


BELOW = [path for path in SOURCES if LEVEL.get(room_of(path), 0) >= LEVEL["router_replay"]]


@pytest.mark.parametrize("path", BELOW, ids=names(BELOW))
def test_router_replay_and_below_know_nothing_of_trl(path):
    assert not tops(path) & {"trl", "vllm", "sglang"}


def test_pure_tensors():
    """The record as data imports nothing but PyTorch."""
    standard = set(sys.stdlib_module_names)
    assert tops(PACKAGE / "routed_experts.py") - standard == {"torch"}
    assert tops(PACKAGE / "metrics.py") - standard == {"torch"}


def test_importing_the_package_does_not_import_trl():
    code = "import sys, trl_r3; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"trl_r3", "torch", "transformers"} <= set(loaded.stdout.split())
    assert not {"trl", "vllm", "peft"} & set(loaded.stdout.split())


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
