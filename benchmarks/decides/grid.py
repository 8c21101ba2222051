"""Which cells are run, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from .cells import Cell, Setting

SEEDS = (0, 1, 2, 3, 4)
LOUD = "noise 0.7"
DECIDED = Setting(LOUD)
EXACT = Setting("exact")
REUSED = Setting(LOUD, updates=4)
BRIEF = 20  # steps after which the mismatch of a rollout is known, and nothing of what it does
NUMERICS = ("noise 0.5", "noise 0.35", "noise 0.2", "noise 0.1", "noise 0.05", "int4", "fp8", "int8", "bf16")


def parts() -> Iterator[tuple[list[Cell], tuple[int, ...]]]:
    """Cells and their seeds, the most telling part first; each is of use without those after it."""
    few, one = SEEDS[:3], SEEDS[:1]
    yield [*_both(DECIDED), Cell(EXACT, "live")], one
    yield _both(DECIDED), few
    yield [Cell(Setting(name, steps=BRIEF), "live") for name in NUMERICS], one
    yield _both(Setting("noise 0.35")), one
    yield _both(DECIDED), SEEDS
    yield [Cell(DECIDED, "live+weights"), Cell(DECIDED, "live+mask")], one
    yield _both(Setting("noise 0.35")), SEEDS[:2]
    yield _both(Setting(LOUD, top_k=1)), one
    yield _both(Setting("noise 0.2")), one
    yield [*_both(Setting("int4")), Cell(EXACT, "live")], one
    yield _both(Setting("noise 0.5")), SEEDS[:2]
    yield [*_both(Setting("noise 0.35")), Cell(EXACT, "live")], few
    yield [*_both(Setting("noise 0.2")), *_both(Setting("fp8"))], one
    yield [Cell(DECIDED, arm) for arm in ("live+weights", "live+mask", "R3+weights", "frozen")], few
    yield _both(Setting(LOUD, top_k=1)), few
    yield [*_both(REUSED), Cell(REUSED, "R3+shift")], one
    yield [*_both(REUSED), Cell(REUSED, "R3+shift"), Cell(REUSED, "R2")], SEEDS[:2]
    yield [cell for length in (4, 20) for cell in _both(Setting(LOUD, length=length))], SEEDS[:2]
    yield [cell for name in ("int8", "bf16", "noise 0.1", "noise 0.05") for cell in _both(Setting(name))], SEEDS[:2]
    yield _both(Setting(LOUD, learning_rate=1e-3)), SEEDS[:2]
    yield [Cell(EXACT, "live")], SEEDS


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
