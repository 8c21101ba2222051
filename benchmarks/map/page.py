"""The generated parts of README.md: figures and table, computed from the lines of finished runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from .cells import Cell, Setting
from .grid import LONG, NOISE
from .results import Cells, Difference, Line, by_cell, collapse_step, outcome, pooled, price, to_live

AXES = ("gate", "rollout", "updates", "learning rate", "steps")
COLUMNS = {  # of the table: what a line calls it, and its format
    "reward": ("reward", ".2f"),
    "k3 live": ("k3_live", ".1e"),
    "k3 replayed": ("k3_replay", ".1e"),
    "F(2) live": ("F2_live", ".1%"),
    "changed routers": ("changed_routers", ".1%"),
    "entropy": ("entropy", ".2f"),
    "length": ("length", ".2f"),
    "gradient norm": ("grad_norm", ".1f"),
    "auxiliary loss": ("aux_loss", ".2f"),
    "clipped": ("clipped", ".1%"),
}


def blocks(lines: Sequence[Line]) -> dict[str, str]:
    """What stands between the marks of the page, by name."""
    cells = by_cell(lines)
    kept = [line for seeds in cells.values() for line in seeds.values()]
    return {"numbers": numbers(cells, kept), "table": table(cells)}


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with its generated parts replaced."""
    for name, text in parts.items():
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- end of {name} -->"
        page, count = re.subn(
            re.escape(begin) + ".*?" + re.escape(end), lambda _, t=begin + text + end: t, page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page has {count} parts named {name!r}, expected 1. Put its two marks in.")
    return page


def numbers(cells: Cells, kept: Sequence[Line]) -> str:
    """What the runs say, as a list."""
    against_live = {cell: found for cell in cells if (found := to_live(cell, cells)) is not None}
    replayed = {cell: found for cell, found in against_live.items() if cell.arm == "R3" and _mismatches(cell.setting)}
    width = np.median([(found.high - found.low) / 2 for found in against_live.values()])
    hours = sum(line["seconds"] for line in kept) / 3600
    facts = [
        f"{len(cells)} cells, {len(kept)} runs, {hours:.1f} core hours.",
        f"R3 against live training where the rollout differs: {_tally(replayed.values())}.",
        f"All {len(against_live)} comparisons of an arm with live training: {_tally(against_live.values())}.",
        f"Half of an interval's width, median over these comparisons: {width:.3f}.",
        *_by_axis(cells),
        *_mismatch(cells),
        *_collapses(cells),
    ]
    return "".join(f"* {fact}\n" for fact in facts)


def _mismatches(setting: Setting) -> bool:
    return setting.rollout != "exact"


def _tally(found: Iterable[Difference]) -> str:
    found = list(found)
    ahead, behind = sum(each.low > 0 for each in found), sum(each.high < 0 for each in found)
    chance = sum(each.by_chance for each in found)
    signs = sum(each.mean > 0 for each in found), sum(each.mean < 0 for each in found)
    return (
        f"ahead in {signs[0]} of {len(found)} and behind in {signs[1]}; with an interval that excludes zero, ahead in "
        f"{ahead} and behind in {behind}, where chance alone gives {chance:.1f}"
    )


def _by_axis(cells: Cells) -> list[str]:
    """R3 minus live, pooled along one axis at a time, in the noisy softmax settings and in the others."""
    both = [cell.setting for cell in cells if cell.arm == "R3" and Cell(cell.setting, "live") in cells]
    noisy = [each for each in both if (each.gate, each.rollout, each.steps) == ("softmax", NOISE, Setting.steps)]
    groups = {
        "learning rate": {f"{rate:g}": [s for s in noisy if s.learning_rate == rate] for rate in _rates(noisy)},
        "updates a rollout": {
            str(n): [s for s in noisy if s.updates == n] for n in sorted({s.updates for s in noisy})
        },
    }
    facts = [f"R3 minus live, softmax gate, {NOISE}, all of them pooled: {_shown(pooled(noisy, 'R3', cells))}."]
    for axis, group in groups.items():
        shown = "; ".join(f"{name}: {_shown(pooled(settings, 'R3', cells))}" for name, settings in group.items())
        facts.append(f"The same by {axis}: {shown}.")
    for name, settings in {
        "sigmoid gate": [s for s in both if s.gate == "sigmoid"],
        f"{LONG} steps": [s for s in both if s.steps == LONG],
        "exact rollout, more than one update": [s for s in both if not _mismatches(s) and s.updates > 1],
    }.items():
        if settings:
            facts.append(f"R3 minus live, {name}: {_shown(pooled(settings, 'R3', cells))}.")
    for arm in sorted({cell.arm for cell in cells} - {"live", "R3"}):
        facts.append(_rival(arm, cells))
    return facts


def _rival(arm: str, cells: Cells) -> str:
    settings = [cell.setting for cell in cells if cell.arm == arm]
    where = "one setting" if len(settings) == 1 else f"{len(settings)} settings pooled"
    text = f"{arm} minus live, {where}: {_shown(pooled(settings, arm, cells))}"
    return f"{text}; minus R3: {_shown(pooled(settings, arm, cells, 'R3'))}."


def _rates(settings: Iterable[Setting]) -> list[float]:
    return sorted({each.learning_rate for each in settings})


def _mismatch(cells: Cells) -> list[str]:
    """What mismatch there was, what replay left of it, and what it cost live training."""
    facts = []
    names = sorted({cell.setting.rollout for cell in cells if cell.arm == "live" and _mismatches(cell.setting)})
    for rollout in names:
        these = [cell for cell in cells if (cell.arm, cell.setting.rollout) == ("live", rollout)]
        measured = ("k3_live", "k3_replay", "changed_routers")
        values = [[line[name] for name in measured] for cell in these for line in cells[cell].values()]
        live, replayed, changed = np.mean(values, axis=0)
        facts.append(
            f"{rollout}: {changed:.1%} changed routers; k3 {live:.1e} live and {replayed:.1e} with the rollout's "
            f"experts, a factor of {live / replayed:.0f}."
        )
    exact = {cell.setting for cell in cells if cell.arm == "live" and not _mismatches(cell.setting)}
    priced = [
        cell.setting
        for cell in cells
        if cell.arm == "live" and cell.setting.rollout == NOISE and _without_noise(cell.setting) in exact
    ]
    for steps, rate in sorted({(each.steps, each.learning_rate) for each in priced}):
        settings = [each for each in priced if (each.steps, each.learning_rate) == (steps, rate)]
        updates = " and ".join(str(each.updates) for each in settings)
        facts.append(
            f"What {NOISE} costs live training (accuracy without it minus with it), learning rate {rate:g}, {steps} "
            f"steps, {updates} updates a rollout: {_shown(price(settings, cells))}."
        )
    return facts


def _without_noise(setting: Setting) -> Setting:
    return replace(setting, rollout="exact")


def _collapses(cells: Cells) -> list[str]:
    counts = {cell: sum(collapse_step(line) is not None for line in seeds.values()) for cell, seeds in cells.items()}
    pairs = [(cell, Cell(cell.setting, "R3")) for cell in cells if cell.arm == "live"]
    pairs = [(live, replayed) for live, replayed in pairs if replayed in cells]
    saved = sum(counts[live] == len(cells[live]) and counts[replayed] == 0 for live, replayed in pairs)
    lost = sum(counts[live] == 0 and counts[replayed] == len(cells[replayed]) for live, replayed in pairs)
    total = [sum(counts[pair[side]] for pair in pairs) for side in (0, 1)]
    return [
        f"Collapsed runs in the {len(pairs)} settings that have both: {total[0]} live, {total[1]} with R3. Settings "
        f"in which live training collapses in every seed and R3 in none: {saved}; the other way round: {lost}."
    ]


def _shown(each: Difference) -> str:
    mark = "**" if each.is_clear else ""
    return f"{mark}{each.mean:+.3f} [{each.low:+.3f}, {each.high:+.3f}]{mark}"


def table(cells: Cells) -> str:
    """Every cell, marked where its interval excludes zero."""
    head = [
        "gate",
        "rollout",
        "updates",
        "learning rate",
        "steps",
        "arm",
        "accuracy",
        "to live",
        "collapsed",
        *COLUMNS,
    ]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows += ["| " + " | ".join(_row(cell, cells)) + " |" for cell in cells]
    return "\n".join(rows) + "\n"


def _row(cell: Cell, cells: Cells) -> list[str]:
    setting, lines = cell.setting, list(cells[cell].values())
    steps = sorted(step for line in lines if (step := collapse_step(line)) is not None)
    difference = to_live(cell, cells)
    return [
        *(
            setting.gate,
            setting.rollout,
            str(setting.updates),
            f"{setting.learning_rate:g}",
            str(setting.steps),
            cell.arm,
        ),
        f"{np.mean([outcome(line) for line in lines]):.3f}",
        "" if difference is None else _shown(difference),
        f"{len(steps)} of {len(lines)}" + (f", at {', '.join(map(str, steps))}" if steps else ""),
        *(_mean(lines, name, form) for name, form in COLUMNS.values()),
    ]


def _mean(lines: Sequence[Line], name: str, form: str) -> str:
    values = [line[name] for line in lines if line[name] is not None]
    return f"{np.mean(values):{form}}" if values else ""
