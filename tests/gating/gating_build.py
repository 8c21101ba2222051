"""Building the extension from a copy of the source, so that no test writes into the checkout."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent


def copy_source(target: Path) -> Path:
    """The package's source without anything that was built in it."""
    shutil.copytree(ROOT / "trl_r3", target / "trl_r3", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def run(command, **options) -> str:
    """Standard output and error of a command that has to succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


def environment(site: Path) -> dict[str, str]:
    """Environment of a Python that imports the package from `site`."""
    return {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
