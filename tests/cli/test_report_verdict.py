"""`trl-r3 report`: the verdict on one run, and two runs side by side."""

import json
import os
from dataclasses import replace

import pytest
from made_traces import make_trace

from trl_r3.cli import command as cli
from trl_r3.cli.report.drawing import LIVE, REPLAYED
from trl_r3.cli.report.run_data import RunData, gather
from trl_r3.cli.report.run_verdict import WINDOW, judge_run
from trl_r3.cli.report.step_curves import agreement, mismatch
from trl_r3.traces.trace_file import save_trace

GOOD = {
    "sampling/k3_kl": 2e-4,
    "sampling/extreme_token_frac": 1e-4,
    "routing_replay/missing_frac": 0.0,
    "routing_replay/agreement": 0.97,
    "routing_replay/contrast": 0.4,
    "routing_replay/changed_router_frac": 0.1,
    "routing_replay/load/max_over_mean": 2.0,
}
TRAINED = {"reward": 0.5, "entropy": 1.0, "clip_ratio/region_mean": 0.01, "loss": -0.1}


def a_run(folder, changes=(), steps=30, **values):
    """A log that is healthy but for `changes`: (metric, steps, value)."""
    log = [{"step": step, **GOOD, **TRAINED, **values} for step in range(1, steps + 1)]
    for name, at, value in changes:
        for step in at:
            log[step - 1][name] = value
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def judged(folder):
    return judge_run(gather(folder))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("sampling/k3_kl", 0.05, "sampling/k3_kl reached 0.05, outside since step 20; healthy is below 0.001"),
        ("routing_replay/agreement", 0.3, "agreement reached 0.3, outside since step 20; healthy is above 0.8"),
        ("routing_replay/contrast", -0.9, "contrast reached -0.9, outside since step 20; healthy is above 0"),
        (
            "routing_replay/load/max_over_mean",
            16.0,
            "max_over_mean reached 16, outside since step 20; healthy is below 4",
        ),
    ],
)
def test_what_is_not_healthy_is_named(tmp_path, name, value, says):
    assert judged(a_run(tmp_path / "good")).is_healthy
    (found,) = judged(a_run(tmp_path / "bad", [(name, range(20, 31), value)])).unhealthy
    assert says in str(found)


no_number = pytest.mark.parametrize("value", [float("nan"), float("inf")])
DIVERGING = ["sampling/k3_kl", "entropy", "loss"]


@no_number
@pytest.mark.parametrize("name", DIVERGING)
def test_what_is_no_number_is_not_healthy(tmp_path, capsys, name, value):
    """A run that has diverged logs NaN; the steps before it are those of a healthy one."""
    folder = a_run(tmp_path / "bad", [(name, range(20, 31), value)])
    (found,) = judged(folder).unhealthy
    assert f"{name} reached {value}, outside since step 20; healthy is" in str(found)
    assert cli.main(["report", str(folder), "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["runs"]
    assert told["last"][name] is None and told["metrics"][name]["value"] is None


@no_number
def test_what_is_no_number_is_drawn(tmp_path, capsys, value):
    """Alone, and beside a run that is healthy."""
    folder = a_run(tmp_path / "bad", [(name, range(20, 31), value) for name in DIVERGING])
    for folders in ([folder], [a_run(tmp_path / "good"), folder]):
        assert cli.main(["report", *map(str, folders)]) == 1
        printed = capsys.readouterr().out
        assert all(f"{name} reached {value}, outside since step 20" in printed for name in DIVERGING)


def test_traces_that_were_scored_as_nan_are_not_healthy(tmp_path):
    trace = make_trace()
    scored = trace.train_logprobs.clone()
    scored[3] = float("nan")
    for rank, logprobs in ((0, trace.train_logprobs), (1, scored)):
        facts, rollout = replace(trace.facts, rank=rank), trace.train_logprobs.clone()
        save_trace(replace(trace, facts=facts, train_logprobs=logprobs, rollout_logprobs=rollout), tmp_path)
    assert any("sampling/k3_kl reached nan, outside since step 8" in str(each) for each in judged(tmp_path).unhealthy)


def test_the_log_of_a_run_that_was_resumed_is_the_last(tmp_path):
    """`trainer.save_state()` at the end of the first part leaves a log that the second has not written yet."""
    folder = a_run(tmp_path / "run", steps=20)
    a_run(folder / "checkpoint-60", [("sampling/k3_kl", range(30, 61), 0.5)], steps=60)
    own, later = folder / "trainer_state.json", folder / "checkpoint-60" / "trainer_state.json"
    os.utime(own, (1, 1))
    assert not judged(folder).is_healthy
    os.utime(later, (0, 0))  # of an earlier run into the same folder
    assert judged(folder).is_healthy


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([(0, 2), (1, 2)], None),
        ([(0, 2)], "Traces of some processes lack at 1 steps: step 7 has those of 1 of 2."),
        ([(0, 1), (1, 2)], "added up at 1 steps: step 7 has those of runs of 1 and of 2 processes."),
    ],
)
def test_traces_of_other_processes_are_missed(tmp_path, ranks, says):
    trace = make_trace()
    for rank, num_ranks in ranks:
        save_trace(replace(trace, facts=replace(trace.facts, rank=rank, num_ranks=num_ranks)), tmp_path)
    lacking = [each for each in gather(tmp_path).lacking if each.startswith("Traces of")]
    assert len(lacking) == (says is not None) and all(says in each for each in lacking)


def test_it_is_on_the_first_screen(tmp_path, capsys):
    bad = a_run(tmp_path / "bad", [("sampling/k3_kl", range(20, 31), 0.05)])
    assert cli.main(["report", str(bad)]) == 1
    told, page = capsys.readouterr().out, (bad / "routing_report" / "report.html").read_text()
    for text in (told, page.partition("<figure")[0]):
        assert "Not healthy: 1 of 7 metrics" in text and "sampling/k3_kl reached 0.05, outside since step 20" in text
        assert "by how much replay cuts k3 is not known" in text


def test_one_batch_is_no_verdict_but_one_lost_row_is(tmp_path):
    """k3 of a batch scatters by a factor of ten; a row without a record was trained through live experts."""
    scattered = a_run(tmp_path / "scattered", [("sampling/k3_kl", [9], 2e-3)])
    assert judged(scattered).is_healthy
    (found,) = judged(a_run(tmp_path / "lost", [("routing_replay/missing_frac", [9], 0.01)])).unhealthy
    assert (found.value, found.since, found.until) == (0.01, 9, 9)


def test_what_has_ended_says_when(tmp_path):
    (found,) = judged(a_run(tmp_path / "bad", [("sampling/k3_kl", range(5, 8), 0.05)])).unhealthy
    assert found.since == 5 and found.until == 7 + WINDOW - 1
    assert f"outside from step 5 to {found.until}" in str(found)


def test_ranges_are_those_of_the_experts(tmp_path):
    """A share that is healthy with 8 of 128 experts is not with 2 of 8, which traces tell."""
    folder = a_run(tmp_path / "run")
    assert judged(folder).is_healthy
    save_trace(make_trace(experts=8, top_k=2), folder)
    found = {each.name: each.healthy.high for each in judged(folder).unhealthy}
    assert found["routing_replay/changed_router_frac"] == pytest.approx(0.032, abs=1e-3)


@pytest.mark.parametrize(
    ("replayed", "live", "says"),
    [
        (2e-4, 1e-3, "Replay lowered k3 by a factor of 5.0 (0.001 live, 0.0002 replayed: medians of 6 steps"),
        (2e-13, 1e-3, "Replay lowered k3 by a factor of more than 1,000 (0.001 live, 2e-13 replayed"),
        (0.0, 1e-3, "Replay lowered k3 to 0 (0.001 live, 0 replayed"),
        (2e-4, 2.1e-4, "k3 is the same with replay and without"),
        (0.0, 0.0, "k3 is the same with replay and without"),
        (4e-4, 1e-4, "Replay raised k3 by a factor of 4.0"),
    ],
)
def test_by_how_much_replay_cut_k3(tmp_path, replayed, live, says):
    """Of the steps that were scored both ways, without the one that is far out."""
    compared = [("sampling/live/k3_kl", range(5, 31, 5), live), ("sampling/live/k3_kl", [10], 1.0)]
    alone = [("sampling/k3_kl", [step for step in range(1, 31) if step % 5], 0.5)]
    cut = judged(a_run(tmp_path / "run", compared + alone, **{"sampling/k3_kl": replayed})).cut
    assert str(cut).startswith(says)


def test_json_is_the_verdict_alone(tmp_path, capsys):
    folder = a_run(tmp_path / "run", [("sampling/k3_kl", range(20, 31), 0.05), ("sampling/live/k3_kl", [30], 0.5)])
    assert cli.main(["report", "--json", str(folder)]) == 1
    said = json.loads(capsys.readouterr().out)
    (run,) = said["runs"]
    assert said["healthy"] is run["healthy"] is False
    k3 = run["metrics"]["sampling/k3_kl"]
    assert (k3["healthy"], k3["range"], k3["since_step"]) == (False, [0.0, 1e-3], 20)
    assert run["k3"] == {"live": 0.5, "replayed": 0.05, "steps": 1, "times": pytest.approx(10)}
    assert run["last"]["reward"] == pytest.approx(0.5) and not (folder / "routing_report").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--json", "--output", "anywhere", str(folder)])
    assert ended.value.code == 2


@pytest.fixture
def plain(tmp_path):
    """A run without replay."""
    (tmp_path / "plain").mkdir()
    log = [{"step": step, **TRAINED, "reward": 0.25} for step in range(1, 31)]
    (tmp_path / "plain" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return tmp_path / "plain"


def test_two_runs_are_one_page(tmp_path, capsys):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other", [("sampling/k3_kl", range(1, 31), 0.002)])
    assert cli.main(["report", str(one), str(other)]) == 1
    page = (one / "routing_comparison" / "report.html").read_text()
    assert "A: one: Healthy" in page and "B: other: Not healthy: 1 of 7" in page
    assert "<td>0.0002</td><td>0.002</td><td>10.00 times</td>" in page
    written = {path.stem for path in (one / "routing_comparison").glob("*.png")}
    alone = ("changed_routers", "agreement", "missing_rows")
    assert written == {"mismatch", *(f"{run}-{name}" for run in "AB" for name in alone)}
    capsys.readouterr()
    assert cli.main(["report", "--json", str(one), str(other)]) == 1
    assert [run["healthy"] for run in json.loads(capsys.readouterr().out)["runs"]] == [True, False]


def test_a_run_without_replay_is_compared_and_not_judged(tmp_path, plain, capsys):
    assert cli.main(["report", str(a_run(tmp_path / "run")), str(plain)]) == 0
    assert "plain: Not judged" in capsys.readouterr().out
    page = (tmp_path / "run" / "routing_comparison" / "report.html").read_text()
    assert "<td>0.5</td><td>0.25</td><td>-0.25</td>" in page and "<td>not logged</td>" in page
    assert page.count("<div>not logged by this run</div>") == 3, "beside each picture of the other"
    assert cli.main(["report", str(plain), str(plain)]) == 2


def test_no_panel_is_empty(tmp_path, plain):
    """Of what was not logged there is none."""
    run, bare = gather(a_run(tmp_path / "run")), RunData(tmp_path, log={"routing_replay/agreement": {1: 0.9}})
    drawn = [mismatch(run), mismatch(gather(plain)), mismatch(run, gather(plain)), agreement(run), agreement(bare)]
    assert [len(picture.figure.axes) for picture in drawn] == [6, 4, 6, 2, 1]
    assert all(axes.lines for picture in drawn for axes in picture.figure.axes)
    assert mismatch(bare) is None


def test_a_colour_is_a_way_of_routing(tmp_path, plain):
    """Also of a run without replay that logs its mismatch, which is not judged."""
    run = gather(a_run(tmp_path / "run", [("sampling/live/k3_kl", [5, 10], 1e-3)]))
    live = gather(plain)
    live.log["sampling/k3_kl"] = {1: 0.5}
    assert judge_run(live).is_healthy is None
    k3, _, reward, *_ = mismatch(run, live).figure.axes
    assert [line.get_color() for line in k3.lines] == [REPLAYED, LIVE, LIVE]
    assert [(line.get_color(), line.get_linestyle()) for line in reward.lines] == [(REPLAYED, "-"), (LIVE, "--")]
