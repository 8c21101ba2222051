"""The map: its page says what its runs say, and its arms are what they are called."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.map import grid, results
from benchmarks.map.cells import Cell, Setting, Sizes
from benchmarks.map.model import start
from benchmarks.map.numerics import rollout_numerics
from benchmarks.map.page import blocks, filled
from benchmarks.map.report import PAGE
from benchmarks.map.results import by_cell, collapse_step, differences, paired, pooled, price, to_live
from benchmarks.map.run import FOLDER, run_missing
from benchmarks.map.trainer import plausible_replay
from benchmarks.map.training import run
from trl_r3 import RouterReplay
from trl_r3.cli.demo.policy import build_tokenizer, encode_sums, make_sums

LINES = results.read(FOLDER / "runs.jsonl")
TINY = Sizes(
    largest=9,
    held_out=20,
    start_accuracy=0.0,
    warm_up_steps=30,
    prompts=4,
    generations=4,
    evaluate_every=2,
    measure_every=2,
)
EXACT = Setting("softmax", "exact", 1, 1e-3, steps=4)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for small matrices
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


def test_the_page_says_what_the_runs_say():
    page = PAGE.read_text(encoding="ascii")
    assert filled(page, blocks(LINES)) == page, "run `python -m benchmarks.map.report`"
    first = LINES[0]
    other = {**first, "accuracies": [value + 0.1 for value in first["accuracies"]]}
    assert filled(page, blocks([other, *LINES[1:]])) != page  # it would tell


def test_the_page_has_places_for_its_parts():
    with pytest.raises(ValueError, match="0 parts named 'table', expected 1"):
        filled("<!-- numbers: generated -->\n<!-- end of numbers -->", blocks(LINES))


def test_the_advice_agrees_with_the_runs():
    cells = by_cell(LINES)
    compared = {cell: found for cell in cells if (found := to_live(cell, cells)) is not None}
    noisy = [cell.setting for cell in cells if cell.arm == "live" and cell.setting.rollout == grid.NOISE]
    at_once = [each for each in noisy if (each.gate, each.steps) == ("softmax", 96)]
    assert not pooled(at_once, "R3", cells).is_clear  # 1
    for rate in grid.RATES:  # 2
        priced = [each for each in at_once if each.learning_rate == rate and each.updates in (1, 8)]
        assert price(priced, cells).low <= 0
    collapsed = {
        cell: sum(collapse_step(line) is not None for line in seeds.values()) for cell, seeds in cells.items()
    }
    for cell in cells:  # 3
        if cell.arm == "R3":
            live = collapsed[Cell(cell.setting, "live")]
            assert abs(live - collapsed[cell]) <= 1
    by_updates = {count: pooled([s for s in at_once if s.updates == count], "R3", cells) for count in (1, 2, 4, 8)}
    assert {count for count, found in by_updates.items() if found.is_clear} == {4} and by_updates[4].high < 0  # 5
    loud = {cell.setting.updates: found for cell, found in compared.items() if cell.setting.rollout == "noise 0.5"}
    assert {count for count, found in loud.items() if found.is_clear} == {8} and loud[8].low > 0  # 6
    replayed = [found for cell, found in compared.items() if cell.arm == "R3"]
    assert [sum(each.low > 0 for each in replayed), sum(each.high < 0 for each in replayed)] == [2, 2]
    for arm in ("live+IS", "R3+IS", "R2", "frozen"):  # 7, 8
        settings = [cell.setting for cell in cells if cell.arm == arm]
        assert not pooled(settings, arm, cells).is_clear
    filtered = [cell.setting for cell in cells if cell.arm == "R3 filtered"]
    assert pooled(filtered, "R3 filtered", cells, "R3").low <= 0  # 9
    clear = sum(found.is_clear for found in compared.values())
    assert clear <= sum(found.by_chance for found in compared.values()) + 2  # 10


def test_every_run_is_of_the_map_and_there_once():
    runs = [(Cell.of(line), line["seed"]) for line in LINES]
    assert len(set(runs)) == len(runs)
    assert set(runs) <= set(grid.runs(full=False)) and set(grid.runs(full=False)) <= set(grid.runs(full=True))
    assert all(sorted(seeds) == list(grid.SEEDS) for seeds in by_cell(LINES).values())


def test_starts_are_shared_by_the_runs_of_a_gate_and_seed():
    before = {(line["gate"], line["seed"]): line["before"] for line in LINES}
    assert all(line["before"] == before[line["gate"], line["seed"]] for line in LINES)


def test_on_policy_without_mismatch_replay_changes_nothing(starts):
    def trained(setting, arm):
        line = run(Cell(setting, arm), 0, TINY, starts)
        return {name: line[name] for name in ("accuracies", "reward", "entropy", "grad_norm")}

    noisy = replace(EXACT, rollout="noise 0.5")
    assert trained(noisy, "R3") != trained(noisy, "live")  # where there is a mismatch, it does
    assert trained(noisy, "live+IS") != trained(noisy, "live")
    live = trained(EXACT, "live")
    assert trained(EXACT, "R3") == live
    assert trained(EXACT, "live+IS") == live
    assert trained(EXACT, "frozen") != live


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_numerics_are_of_the_rollout_only(gate, starts):
    model = start(gate, TINY, 0, starts).eval()
    batch = encode_sums(build_tokenizer(), make_sums(3))

    def logits():
        with torch.no_grad():
            return model(**batch).logits.float()

    before = logits()
    for name in ("bf16", "fp8", "noise 0.2"):
        with rollout_numerics(name, model, torch.Generator().manual_seed(0)):
            assert not torch.equal(logits(), before), name
        assert torch.equal(logits(), before), name
    with rollout_numerics("exact", model, torch.Generator()):
        assert torch.equal(logits(), before)
    with pytest.raises(ValueError, match="the rollout is 'loud 2'"):
        rollout_numerics("loud 2", model, torch.Generator())


def test_the_filter_lets_go_what_live_routing_finds_implausible(starts):
    model = start("softmax", TINY, 0, starts).eval()
    ids = encode_sums(build_tokenizer(), make_sums(3))["input_ids"]
    with torch.no_grad(), RouterReplay(model, "intercept") as replay:
        live = model(ids).logits
        with replay.record() as recorded:
            model(ids)
        foreign = (recorded.routed_experts + 1) % 16

        def replayed():
            with replay.replay(foreign):
                return model(ids).logits

        unfiltered = replayed()
        assert not torch.equal(unfiltered, live)
        with plausible_replay(0.0):
            assert torch.equal(replayed(), unfiltered)
        with plausible_replay(1.0):
            assert torch.allclose(replayed(), live, atol=1e-5)
        with plausible_replay(0.5):
            half = replayed()
        assert not torch.allclose(half, live, atol=1e-5) and not torch.allclose(half, unfiltered, atol=1e-5)
        assert torch.equal(replayed(), unfiltered)


@pytest.mark.parametrize(
    "accuracies, step",
    [
        ([0.6, 0.6, 0.6], None),
        ([0.6, 0.2, 0.2], 24),
        ([0.2, 0.2, 0.2], 12),
        ([0.2, 0.4, 0.2], 36),  # the first dip was none
        ([0.2, 0.2, 0.3], None),  # half is not below half
    ],
)
def test_the_step_of_collapse(accuracies, step):
    assert collapse_step({"before": 0.6, "accuracies": accuracies}, 12) == step


def test_the_interval_is_that_of_all_resamples():
    values = np.array([0.01, 0.03, -0.02, 0.05, 0.02])
    means = [np.mean(each) for each in product(values, repeat=5)]
    found = paired(values)
    assert found.mean == pytest.approx(0.018)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.003)
    assert not found.is_clear and paired(np.abs(values)).is_clear and paired(-np.abs(values)).high < 0


def test_how_often_chance_alone_is_clear():
    # of equal sizes only all of one sign, and four of five, are at stake: 2 patterns of 32, or 12
    assert paired([0.1] * 5).by_chance == 2 / 32
    assert paired([0.0] * 5).by_chance == 0


def test_pairs_are_by_seed():
    def line(value):
        return {"accuracies": [value]}

    first, second = {seed: line(seed + 0.5) for seed in (4, 1, 0)}, {seed: line(seed) for seed in (0, 1, 2, 4)}
    assert differences(first, second) == [0.5, 0.5, 0.5]
    by_position = [
        a["accuracies"][0] - b["accuracies"][0] for a, b in zip(first.values(), second.values(), strict=False)
    ]
    assert by_position != [0.5, 0.5, 0.5]


def test_cells_with_too_few_seeds_are_left_out():
    lines = [{**Cell(EXACT, "live").as_dict(), "seed": seed} for seed in range(results.MIN_SEEDS)]
    assert by_cell(lines[:-1]) == {} and list(by_cell(lines)) == [Cell(EXACT, "live")]


def test_finished_runs_are_not_run_again(tmp_path):
    finished = tmp_path / "runs.jsonl"
    lines = [json.dumps({**cell.as_dict(), "seed": seed}) for cell, seed in grid.runs(full=False)]
    finished.write_text("\n".join(lines) + "\n")
    run_missing(finished, tmp_path / "starts", workers=1, full=False)
    assert finished.read_text().splitlines() == lines and not (tmp_path / "starts").exists()
