"""Which cells are run, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from .cells import Cell, Setting

SEEDS = (0, 1, 2, 3, 4)
RATES = (3e-4, 1e-3, 2e-3)  # below, at and beyond the edge of stability
UPDATES = (1, 2, 4, 8)
NOISE = "noise 0.2"  # about 20 % changed routers
OTHER_ROLLOUTS = ("noise 0.5", "fp8", "bf16", "noise 0.1")
LONG = 288  # steps
_MANY, _SOME = 8, 4  # updates a rollout where one axis is varied alone


def parts() -> tuple[list[Cell], ...]:
    """The committed map, the most telling part first; each is of use without those after it."""
    noisy = list(product(UPDATES, RATES))
    edge = [_cell("softmax", NOISE, updates, rate, arm) for updates, rate in noisy for arm in ("live", "R3")]
    control = [_cell("softmax", "exact", _MANY, rate, arm) for rate in RATES for arm in ("live", "R3")]
    safe, at_edge, beyond = RATES
    rivals = ("R2", "frozen", "live+IS", "R3+IS", "R3 filtered")
    gate = {rate: [_cell("sigmoid", NOISE, _MANY, rate, arm) for arm in ("live", "R3")] for rate in RATES}

    def other(rollout: str, updates: int) -> list[Cell]:
        return [_cell("softmax", rollout, updates, at_edge, arm) for arm in ("live", "R3")]

    return (
        edge + control,
        [_cell("softmax", NOISE, _MANY, at_edge, arm) for arm in rivals],
        gate[at_edge],
        other("noise 0.5", _MANY),
        other("fp8", _MANY),
        other("noise 0.5", 1) + other("noise 0.5", _SOME),  # does what the first of these shows repeat?
        gate[safe],
        other("bf16", _MANY),
        other("noise 0.1", _MANY),
        [_cell("softmax", NOISE, _MANY, safe, arm) for arm in rivals],
        [_cell("softmax", "exact", 1, rate, "live") for rate in RATES],
        gate[beyond],
        long(),
    )


def long() -> list[Cell]:
    """Three arms for longer, where the learning rate is safe: what mismatch does may take its time."""
    arms = (("exact", "live"), (NOISE, "live"), (NOISE, "R3"))
    return [_cell("softmax", rollout, _SOME, RATES[0], arm, LONG) for rollout, arm in arms]


def all_cells() -> list[Cell]:
    """Every arm in every setting that it makes sense in: a night."""
    rollouts = ("exact", NOISE, *OTHER_ROLLOUTS)
    arms = ("live", "R3", "R2", "frozen", "live+IS", "R3+IS", "R3 filtered")
    every = product(("softmax", "sigmoid"), rollouts, UPDATES, RATES, arms)
    return [
        _cell(gate, rollout, updates, rate, arm)
        for gate, rollout, updates, rate, arm in every
        # without a second update there is no R2 to speak of; the filter compares scores of a softmax
        if not (arm == "R2" and updates == 1) and not (arm == "R3 filtered" and gate == "sigmoid")
    ] + long()


def runs(full: bool) -> Iterator[tuple[Cell, int]]:
    """Cells and seeds: a part after the other, and in it seeds outermost, so that a part that ends early is fair."""
    for part in (all_cells(),) if full else parts():
        yield from ((cell, seed) for seed in SEEDS for cell in part)


def _cell(gate: str, rollout: str, updates: int, learning_rate: float, arm: str, steps: int = 96) -> Cell:
    return Cell(Setting(gate, rollout, updates, learning_rate, steps), arm)
