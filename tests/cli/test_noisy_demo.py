"""`trl-r3 demo --smoke`, run as a user runs it: the run that replay decides, and the noise that makes it one."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from trl_r3.cli import command as cli
from trl_r3.cli import demo as demo_command
from trl_r3.cli.demo.noise import noisy_selection
from trl_r3.cli.demo.noisy_runs import LENGTH, LIVE, REPLAY, START, load_start
from trl_r3.cli.demo.sorting import all_right, draw_batch, make_rows, share_sorted, sorting_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a smoke run and its log."""
    folder = tmp_path_factory.mktemp("noisy")
    assert cli.main(["demo", "--smoke", "--output", str(folder)]) == 0
    return folder, json.loads((folder / "log.json").read_text())


def test_both_ways_begin_with_the_same_rollouts(demo):
    _, log = demo
    (live,), (replayed,) = log["runs"][LIVE], log["runs"][REPLAY]
    assert live["measured"][0] == pytest.approx(replayed["measured"][0], rel=1e-3, abs=1e-9)
    assert live["log"][0]["reward"] == replayed["log"][0]["reward"]
    assert live["log"][-1]["grad_norm"] != replayed["log"][-1]["grad_norm"]
    for entry in live["measured"] + replayed["measured"]:
        assert entry["live/k3_kl"] > 0.05 and entry["replay/k3_kl"] < 1e-6
        assert entry["live/changed_router_frac"] > 0.3


def test_table_has_the_mismatch_that_each_way_trains_with(demo):
    folder, log = demo
    k3 = log["table"]["k3, at the end"]
    assert k3[LIVE] > 0.05 and k3[REPLAY] < 1e-6
    assert "Real engines" in (folder / "table.md").read_text()
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_demo_suggests_shows_something(demo, capsys):
    folder, _ = demo
    traces = sorted((folder / "traces").glob("step-*"))
    assert len(traces) > 1
    assert cli.main(["verify", str(folder / "start"), "--trace", str(traces[0])]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert cli.main(["report", str(folder)]) == 1  # noise in the rollout is not healthy, and the report says so
    said = capsys.readouterr().out
    assert "changed_router_frac" in said and "Not drawn" not in said


def test_traces_of_an_earlier_demo_are_not_those_of_this_one(demo, tmp_path, capsys):
    """A shorter demo has traces between those of a longer one; the demo in bfloat16 has none, and another model."""
    folder, _ = demo
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "traces" / "step-00000300-rank-00000.safetensors").write_bytes(b"of a longer one")
    assert cli.main(["demo", "--smoke", "--output", str(again)]) == 0
    assert [path.name for path in sorted((again / "traces").iterdir())] == [
        path.name for path in sorted((folder / "traces").iterdir())
    ]
    capsys.readouterr()
    assert cli.main(["demo", "--smoke", "--mismatch", "bf16", "--output", str(again)]) == 0
    assert "Next:" not in capsys.readouterr().out and not (again / "traces").exists()


def test_a_folder_of_no_demo_keeps_its_traces(tmp_path, monkeypatch):
    trace = tmp_path / "traces" / "step-00000300-rank-00000.safetensors"
    trace.parent.mkdir()
    trace.write_bytes(b"of a run")
    monkeypatch.setattr(demo_command, "_noisy", lambda *args: None)
    assert cli.main(["demo", "--smoke", "--output", str(tmp_path)]) == 0 and trace.exists()


def test_a_model_of_the_other_demo_is_refused(capsys, tmp_path):
    assert cli.main(["demo", "--model", "mixtral", "--output", str(tmp_path / "new")]) == 2
    assert "`--mismatch bf16`" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_start_is_small_and_sorts():
    assert START.stat().st_size < 1e6
    rows = draw_batch(200, LENGTH, torch.Generator().manual_seed(7))
    assert 0.5 < share_sorted(load_start(), rows) < 0.8  # neither all to learn nor nothing


def test_noise_changes_what_is_selected_and_not_its_weights():
    model = load_start()
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
    clean = gate(hidden)
    with noisy_selection(model, 0.7, torch.Generator().manual_seed(0)):
        logits, weights, ids = gate(hidden)
    assert torch.equal(logits, clean[0])
    assert 0.2 < float((ids.sort(-1).values != clean[2].sort(-1).values).any(-1).float().mean()) < 0.9
    kept = F.linear(hidden, gate.weight).softmax(-1).gather(-1, ids)
    assert torch.allclose(weights, kept / kept.sum(-1, keepdim=True), atol=1e-6)
    noisy = clean[0] + 0.7 * clean[0].std(-1, keepdim=True) * torch.randn(
        logits.shape, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(ids, noisy.topk(2).indices)
    assert torch.equal(gate(hidden)[2], clean[2])  # afterwards there is none


def test_rows_and_their_answers():
    tokenizer, rows = sorting_tokenizer(), make_rows(5, LENGTH, 0)
    for row in rows:
        ids = tokenizer(row["prompt"], return_token_type_ids=False)["input_ids"]
        assert len(ids) == LENGTH + 1 and sorted(ids[:-1]) == row["answer"]
    right = [row["answer"] for row in rows]
    wrong = [[*right[0][:-1], right[0][-1] - 1], *right[1:]]
    assert all_right(wrong, right) == [0.0, 1.0, 1.0, 1.0, 1.0]
