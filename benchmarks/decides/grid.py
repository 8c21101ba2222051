"""Which cells are run, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from .cells import Cell, Setting

SEEDS = (0, 1, 2, 3, 4)
LOUD = "noise 0.7"
DECIDED = Setting(LOUD)


def parts() -> Iterator[tuple[list[Cell], tuple[int, ...]]]:
    """Cells and their seeds, the most telling part first; each is of use without those after it."""
    few, two = SEEDS[:3], SEEDS[:2]
    yield [Cell(DECIDED, "live"), Cell(DECIDED, "R3"), Cell(Setting("exact"), "live")], SEEDS
    yield [Cell(Setting(f"noise {level}"), arm) for level in (0.35, 0.2, 0.1) for arm in ("live", "R3")], two
    yield [Cell(DECIDED, arm) for arm in ("live+weights", "live+mask")], few
    yield [Cell(Setting(LOUD, top_k=1), arm) for arm in ("live", "R3")], few
    yield [Cell(Setting(name), arm) for name in ("int4", "fp8") for arm in ("live", "R3")], two
    yield [Cell(Setting("noise 0.5"), arm) for arm in ("live", "R3")], two
    yield [Cell(DECIDED, arm) for arm in ("R3+weights", "frozen")], few
    yield [Cell(Setting(LOUD, updates=4), arm) for arm in ("live", "R3", "R2")], two
    yield [Cell(Setting(LOUD, length=length), arm) for length in (4, 20) for arm in ("live", "R3")], two
    yield [Cell(Setting(name), arm) for name in ("noise 0.05", "int8", "bf16") for arm in ("live", "R3")], two
    yield [Cell(Setting(LOUD, learning_rate=1e-3), arm) for arm in ("live", "R3")], two
    yield [Cell(Setting(LOUD, top_k=1), arm) for arm in ("live+weights", "live+mask")], two
    yield [Cell(Setting("exact", top_k=1), "live")], few


def runs() -> Iterator[tuple[Cell, int]]:
    """Cells and seeds, a part after the other, and in it seeds outermost, so that a part that ends early is fair."""
    for cells, seeds in parts():
        yield from ((cell, seed) for seed in seeds for cell in cells)
