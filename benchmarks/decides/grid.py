"""Which cells are run, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from .cells import Cell, Setting

SEEDS = (0, 1, 2, 3, 4)
LOUD = "noise 0.7"
DECIDED = Setting(LOUD)
EXACT = Setting("exact")
ALONE = Setting(LOUD, top_k=1)
REUSED = Setting(LOUD, updates=4)
LONG = Setting(LOUD, steps=1200)
FASTER = (7e-4, 1e-3)  # at these a run without noise falls, too
BRIEF = 20  # steps after which the mismatch of a rollout is known, and nothing of what it does
NUMERICS = ("noise 0.5", "noise 0.35", "noise 0.2", "noise 0.1", "noise 0.05", "int4", "fp8", "int8", "bf16")
SHAPES = (
    Setting(LOUD, updates=8),
    *(Setting(LOUD, learning_rate=rate) for rate in (2.5e-4, *FASTER)),
    *(Setting(LOUD, length=length) for length in (4, 20)),
    Setting("noise 0.35", length=20),
    Setting(LOUD, top_k=4),
    Setting(LOUD, experts=16),
    Setting(LOUD, experts=32, top_k=4),
)


def parts() -> Iterator[tuple[list[Cell], tuple[int, ...]]]:
    """Cells and their seeds, the most telling part first; each is of use without those after it."""
    few, two, one = SEEDS[:3], SEEDS[:2], SEEDS[:1]
    faster = [Cell(Setting("exact", learning_rate=rate), "live") for rate in FASTER]
    reused = [*_both(REUSED), Cell(REUSED, "R3+shift"), Cell(REUSED, "R2")]
    others = [cell for setting in SHAPES for cell in _both(setting)]
    yield [*_both(DECIDED), Cell(EXACT, "live")], SEEDS
    yield [Cell(DECIDED, arm) for arm in ("live+weights", "live+mask", "R3+weights", "frozen")], SEEDS
    yield [Cell(Setting(name, steps=BRIEF), "live") for name in NUMERICS], one
    yield [cell for name in NUMERICS for cell in _both(Setting(name))], one
    yield [*others, *faster], one
    yield _both(LONG), two
    yield [cell for name in ("int4", "noise 0.5", "noise 0.35", "noise 0.2") for cell in _both(Setting(name))], few
    yield [*reused, *_both(ALONE)], SEEDS
    yield [*others, *faster, *(cell for name in ("fp8", "noise 0.1") for cell in _both(Setting(name)))], two
    yield [cell for name in ("noise 0.35", "noise 0.2") for cell in _both(Setting(name))], SEEDS


def _both(setting: Setting) -> list[Cell]:
    return [Cell(setting, "live"), Cell(setting, "R3")]


def runs() -> Iterator[tuple[Cell, int]]:
    """Cells and seeds, each once: a part after the other, and in it seeds outermost, so that any end is fair."""
    told: set[tuple[Cell, int]] = set()
    for cells, seeds in parts():
        for each in ((cell, seed) for seed in seeds for cell in cells):
            if each not in told:
                told.add(each)
                yield each
