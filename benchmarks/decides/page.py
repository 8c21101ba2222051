"""The generated parts of docs/when_it_helps.md, computed from the lines of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from .cells import Cell, Setting
from .grid import BRIEF, DECIDED, EXACT, FASTER, LONG, NUMERICS, REUSED
from .results import Cells, Line, by_cell, differences, judged, mean_of, reward_at_end

_FIRST, _LAST = slice(0, 3), slice(-3, None)  # of what was measured
NAMES = {
    "live": "live routing",
    "R3": "replay",
    "R2": "replay of the old-policy pass (R2)",
    "frozen": "live, routers frozen",
    "live+weights": "live, importance weights truncated at 2",
    "live+mask": "live, sequences with a ratio above 3 masked (TRL's default)",
    "R3+weights": "replay, importance weights truncated at 2",
    "R3+shift": "replay, ratios weighed by router shift (RSPO)",
}


def blocks(lines: Sequence[Line]) -> dict[str, str]:
    """What stands between the marks of the page, by name."""
    cells = by_cell(lines)
    each = {"arms": arms, "ladder": ladder, "shapes": shapes, "long": long, "rollouts": rollouts}
    return {"numbers": numbers(cells, lines), **{name: made(cells) for name, made in each.items()}}


def numbers(cells: Cells, lines: Sequence[Line]) -> str:
    """The decided case, and what all runs took."""
    live, replayed = (list(cells[Cell(DECIDED, arm)].values()) for arm in ("live", "R3"))
    exact = list(cells[Cell(EXACT, "live")].values())
    hours = sum(line["seconds"] for line in lines) / 3600
    facts = [
        f"Reward of the last fifty steps: {_reward(live)} live, {_reward(replayed)} with replay, "
        f"{_reward(exact)} without noise. Replay minus live: {_shown(differences(DECIDED, 'R3', cells))}.",
        f"k3 of live training grows from {mean_of(live, 'k3_live', _FIRST):.2f} to "
        f"{mean_of(live, 'k3_live', _LAST):.2f}; with replay it is at most "
        f"{max(value for line in replayed for value in line['k3_replay']):.0e}.",
        f"Entropy at the end: {mean_of(live, 'entropy', _LAST):.3f} live, {mean_of(replayed, 'entropy', _LAST):.3f} "
        f"with replay, {mean_of(exact, 'entropy', _LAST):.3f} without noise.",
        f"Rows sorted right when decoded greedily, without noise: {_mean(live + replayed, 'before')} before; after, "
        f"{_mean(live, 'after')} live, {_mean(replayed, 'after')} with replay, {_mean(exact, 'after')} without noise.",
        f"{len(lines)} runs, {hours:.1f} core hours.",
    ]
    return "".join(f"* {fact}\n" for fact in facts)


def arms(cells: Cells) -> str:
    """The decided setting, without noise and with four updates a rollout, arm by arm."""
    rows = ["| setting | arm | seeds | reward at the end | to live | k3 at the end | entropy at the end |"]
    rows.append("|---|---|---|---|---|---|---|")
    faster = [replace(EXACT, learning_rate=rate) for rate in FASTER]
    for setting in (DECIDED, EXACT, *faster, REUSED):
        for arm, name in NAMES.items():
            lines = list(cells.get(Cell(setting, arm), {}).values())
            if lines:
                way = "k3_replay" if arm.startswith("R3") else "k3_live"
                rows.append(
                    f"| {label(setting)} | {name} | {len(lines)} | {_reward(lines)} | "
                    f"{'' if arm == 'live' else _shown(differences(setting, arm, cells))} | "
                    f"{mean_of(lines, way, _LAST):.2f} | {mean_of(lines, 'entropy', _LAST):.3f} |"
                )
    return "\n".join(rows) + "\n"


def ladder(cells: Cells) -> str:
    """The decided setting with other rollouts."""
    return _compared((each for each in by_mismatch(cells) if _has_decided_shape(each)), cells)


def shapes(cells: Cells) -> str:
    """The decided setting, and those that differ from it in more than the rollout."""
    others = (each for each in by_mismatch(cells) if each == DECIDED or not _has_decided_shape(each))
    return _compared((each for each in others if each != LONG), cells)


def _has_decided_shape(setting: Setting) -> bool:
    return replace(setting, rollout=DECIDED.rollout) == DECIDED


def long(cells: Cells) -> str:
    """The decided setting over four times the steps, by quarters."""
    rows = ["| arm | seeds | reward | k3 | entropy at the end |", "|---|---|---|---|---|"]
    for arm in ("live", "R3"):
        lines = list(cells.get(Cell(LONG, arm), {}).values())
        if lines:
            way = "k3_replay" if arm == "R3" else "k3_live"
            rows.append(
                f"| {NAMES[arm]} | {len(lines)} | {_by_quarters(lines, 'reward')} | {_by_quarters(lines, way)} | "
                f"{mean_of(lines, 'entropy', _LAST):.3f} |"
            )
    return "\n".join(rows) + "\n"


def _by_quarters(lines: Sequence[Line], name: str) -> str:
    every = len(lines[0][name]) // 4
    return ", ".join(f"{mean_of(lines, name, slice(i * every, (i + 1) * every)):.2f}" for i in range(4))


def _compared(settings: Iterable[Setting], cells: Cells) -> str:
    """Live training and replay, setting by setting."""
    rows = [
        "| rollout | seeds | k3 live, first and last steps | F(2) live | changed routers | reward live | replay | "
        "replay minus live |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        live, replayed = cells[Cell(setting, "live")], cells[Cell(setting, "R3")]
        both = sorted(live.keys() & replayed.keys())
        first, second = [live[seed] for seed in both], [replayed[seed] for seed in both]
        rows.append(
            f"| {label(setting)} | {len(both)} | {mean_of(first, 'k3_live', _FIRST):.2g}, "
            f"{mean_of(first, 'k3_live', _LAST):.2g} | {mean_of(first, 'F2_live', slice(None)):.1%} | "
            f"{mean_of(first, 'changed_routers', slice(None)):.0%} | {_reward(first)} | {_reward(second)} | "
            f"{_shown(differences(setting, 'R3', cells))} |"
        )
    return "\n".join(rows) + "\n"


def rollouts(cells: Cells) -> str:
    """How far each kind of rollout is from training, with its experts and without."""
    rows = ["| rollout | k3 live | k3 with its experts | F(2) live | changed routers |", "|---|---|---|---|---|"]
    for name in NUMERICS:
        lines = list(cells.get(Cell(Setting(name, steps=BRIEF), "live"), {}).values())
        if lines:
            live, replayed, extreme, changed = (
                mean_of(lines, each, slice(None)) for each in ("k3_live", "k3_replay", "F2_live", "changed_routers")
            )
            rows.append(f"| {name} | {live:.1g} | {replayed:.1g} | {extreme:.1%} | {changed:.1%} |")
    return "\n".join(rows) + "\n"


def by_mismatch(cells: Cells) -> list[Setting]:
    """The settings that have live training and replay, the loudest first."""
    settings = {cell.setting for cell in cells if cell.arm == "R3"} & {c.setting for c in cells if c.arm == "live"}
    settings = {each for each in settings if differences(each, "R3", cells)}
    return sorted(settings, key=lambda each: -live_k3(each, cells))


def live_k3(setting: Setting, cells: Cells) -> float:
    """k3 of live training in its first steps."""
    return mean_of(cells[Cell(setting, "live")].values(), "k3_live", _FIRST)


def label(setting: Setting) -> str:
    """A setting in words: its rollout, and what is not as in the decided one."""
    parts = [setting.rollout]
    parts += [f"top-{setting.top_k} of {setting.experts}"] if experts(setting) != experts(DECIDED) else []
    parts += [f"answers of {setting.length}"] if setting.length != DECIDED.length else []
    parts += [f"{setting.updates} updates a rollout"] if setting.updates != DECIDED.updates else []
    parts += [f"learning rate {setting.learning_rate:g}"] if setting.learning_rate != DECIDED.learning_rate else []
    parts += [f"{setting.steps} steps"] if setting.steps != DECIDED.steps else []
    return ", ".join(parts)


def experts(setting: Setting) -> tuple[int, int]:
    """Experts a token and a layer."""
    return setting.top_k, setting.experts


def _mean(lines: Sequence[Line], name: str) -> str:
    return f"{fmean(line[name] for line in lines):.2f}"


def _reward(lines: Sequence[Line]) -> str:
    return f"{fmean(map(reward_at_end, lines)):.2f}"


def _shown(values: list[float]) -> str:
    found = judged(values)
    if found is None:
        each = ", ".join(f"{value:+.2f}" for value in values)
        return f"{fmean(values):+.2f} ({each})" if len(values) > 1 else each
    mark = "**" if found.is_clear else ""
    return f"{mark}{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{mark}"
