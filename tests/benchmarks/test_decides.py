"""The run that replay decides: its page says what its runs say, and its rollouts are what they are called."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.decides.cells import Cell, Setting, Sizes
from benchmarks.decides.grid import DECIDED, LONG, LOUD, SEEDS, runs
from benchmarks.decides.numerics import ROUNDED, rollout_numerics
from benchmarks.decides.page import blocks, by_mismatch, live_k3
from benchmarks.decides.report import PAGE
from benchmarks.decides.results import by_cell, differences, judged, mean_of, reward_at_end
from benchmarks.decides.run import FOLDER
from benchmarks.decides.training import run
from benchmarks.map.page import filled
from benchmarks.map.results import read
from trl_r3.cli.demo.noisy_runs import load_start
from trl_r3.cli.demo.sorting import draw_batch
from trl_r3.trainers.deciding_mismatch import DECIDING_K3

LINES = read(FOLDER / "runs.jsonl")
CELLS = by_cell(LINES)
TINY = Sizes(prompts=8, generations=4, average_over=2, measure_every=2, held_out=20)


def test_the_page_says_what_the_runs_say():
    page = PAGE.read_text(encoding="ascii")
    assert filled(page, blocks(LINES)) == page, "run `python -m benchmarks decides --redraw`"
    other = {**LINES[0], "reward": [value + 0.1 for value in LINES[0]["reward"]]}
    assert filled(page, blocks([other, *LINES[1:]])) != page  # it would tell


def test_every_run_is_of_the_study_and_there_once():
    kept = [(Cell.of(line), line["seed"]) for line in LINES]
    assert len(set(kept)) == len(kept) and set(kept) <= set(runs())


def test_replay_decides_the_case_that_is_called_decided():
    found = judged(differences(DECIDED, "R3", CELLS))
    assert found is not None and sorted(CELLS[Cell(DECIDED, "R3")]) == list(SEEDS)
    assert found.mean >= 0.1 and found.low > 0
    live = CELLS[Cell(DECIDED, "live")].values()
    assert all(max(line["k3_replay"]) < 1e-6 for line in CELLS[Cell(DECIDED, "R3")].values())
    assert mean_of(live, "k3_live", slice(-3, None)) > 2 * mean_of(live, "k3_live", slice(0, 3)) > 2 * DECIDING_K3


def test_longer_runs_decide_more():
    live, replayed = (CELLS[Cell(LONG, arm)] for arm in ("live", "R3"))
    assert live.keys() == replayed.keys() and len(live) > 1
    assert min(differences(LONG, "R3", CELLS)) > judged(differences(DECIDED, "R3", CELLS)).high
    assert min(map(reward_at_end, live.values())) > 0.2  # it stalls, and does not fall to 0
    assert mean_of(live.values(), "k3_live", slice(-3, None)) > 2  # and goes on moving away


def gains(settings):
    """What replay gains by the live k3 of each setting, where replay removes it and something is learned."""
    removed = {each for each in settings if left(each) < live_k3(each, CELLS) / 10}
    learned = {each for each in removed if fmean(map(reward_at_end, CELLS[Cell(each, "R3")].values())) > 0.3}
    return {live_k3(each, CELLS): differences(each, "R3", CELLS) for each in learned}


def left(setting):
    return mean_of(CELLS[Cell(setting, "live")].values(), "k3_replay", slice(0, 3))


def test_the_boundary_is_where_the_log_warns():
    settings = by_mismatch(CELLS)
    found = gains(settings)
    above = {k3: each for k3, each in found.items() if k3 > DECIDING_K3}
    assert len(above) > 8 and all(min(each) > 0.05 for each in above.values())
    assert all(max(map(abs, each)) < 0.05 for k3, each in found.items() if k3 <= DECIDING_K3 / 2)
    rest = [differences(each, "R3", CELLS) for each in settings if left(each) >= live_k3(each, CELLS) / 10]
    assert len(rest) > 3 and all(max(each) < 0.05 for each in rest)  # what is left with replay is not routing
    assert len(settings) - len(found) - len(rest) == 4  # rates that are too high, and no reward to learn from


@pytest.mark.parametrize("name", ["noise 0.7", "bf16", *ROUNDED])
def test_numerics_are_of_the_rollout_only(name):
    model = load_start().eval()
    rows = draw_batch(8, 10, torch.Generator().manual_seed(0))

    def logits():
        with torch.no_grad():
            return model(rows).logits.float()

    before = logits()
    with rollout_numerics(name, model, torch.Generator().manual_seed(0)):
        inside = logits()
    assert torch.equal(logits(), before) and not torch.equal(inside, before)
    if name in ROUNDED and name != "int4":  # coarser rounding is further away
        with rollout_numerics("int4", model, torch.Generator()):
            assert (inside - before).norm() < (logits() - before).norm()


def test_the_arms_differ_where_the_rollout_does(tmp_path):
    save_file(load_start().state_dict(), tmp_path / "8-2-10-0.safetensors")  # an untrained one earns no reward

    def trained(arm, setting):
        return run(Cell(replace(setting, steps=2), arm), 0, TINY, tmp_path)

    lines = {arm: trained(arm, Setting(LOUD)) for arm in ("live", "R3", "live+weights", "live+mask")}
    norms = [line["grad_norm"][0] for line in lines.values()]
    assert len({line["entropy"][0] for line in lines.values()}) > 1 and len(set(norms)) == len(norms)
    assert max(lines["R3"]["k3_replay"]) < 1e-6 < min(lines["R3"]["k3_live"])
    exact = {arm: trained(arm, Setting("exact"))["grad_norm"] for arm in ("live", "R3")}
    assert exact["live"] == exact["R3"]


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="the rollout is 'loud 2'"):
        rollout_numerics("loud 2", torch.nn.Linear(1, 1), torch.Generator())
