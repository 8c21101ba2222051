"""The oldest versions that the metadata allows are those that CI runs."""

from __future__ import annotations

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="ascii").splitlines()
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}


def lower_bounds() -> dict[str, Version]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="ascii")
    requirements = [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]
    bounds = {each.name: [s.version for s in each.specifier if s.operator == ">="] for each in requirements}
    return {name: Version(versions[0]) for name, versions in bounds.items() if versions}


def test_the_oldest_set_is_that_of_the_metadata():
    bounds, oldest = lower_bounds(), pinned("constraints-oldest.txt")
    assert bounds.pop("torch") <= oldest.pop("torch") == pinned("constraints.txt")["torch"]
    assert oldest == bounds and {"transformers", "trl", "peft"} <= set(oldest)


def test_the_pinned_set_is_allowed():
    bounds = lower_bounds()
    below = {name for name, version in pinned("constraints.txt").items() if version < bounds.get(name, version)}
    assert below == set()
