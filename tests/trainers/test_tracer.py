"""What a traced run writes, against what was watched from outside, and that tracing changes and ends no run."""

import warnings

import pytest
import torch
from trainers.runs import OLD_POLICY

from trl_r3 import load_trace
from trl_r3.traces.trace_file import find_traces


@pytest.mark.parametrize("rollout", ["rounded", "scrambled"])
def test_a_trace_holds_what_the_run_did(qwen3, traced, gap, rollout):
    """Against what was watched from outside: tokens, log-probabilities, routes and load."""
    trainer, paths, _ = traced(
        qwen3(), while_generating=gap[rollout], routing_replay_compare_every=1, max_steps=1, num_iterations=2
    )
    (path,), old = paths, trainer.of("old policy")[0]
    trace, live = load_trace(path), trainer.of("comparison")[0]
    assert trace.facts.mode == "R3" and trace.facts.step == 0 and trace.facts.missing == 0
    routes = trainer.live_routes(old)  # (B, T, L, K)
    load = torch.zeros_like(trace.load_live)
    seen = iter(
        zip(
            trace.samples(),
            *(
                each.split(trace.lengths[:, 1].tolist())
                for each in (trace.train_logprobs, trace.live_logprobs, trace.rollout_logprobs, trace.masks)
            ),
            strict=True,
        )
    )
    for row, (sample, train, compared, rollout, masks) in enumerate(seen):
        watched = trainer.sample_of(old, row)
        start, width = old.prompt_width - sample.prompt_length, len(train)
        assert torch.equal(sample.tokens, old.input_ids[row, start : start + len(sample.tokens)])
        assert torch.equal(train, old.logps[row, :width]) and torch.equal(compared, live.logps[row, :width])
        assert torch.equal(sample.record.long(), watched.rows)
        assert torch.allclose(rollout.double(), watched.logps, atol=1e-5)
        assert masks.eq(3).all()
        for layer in range(load.shape[0]):
            ids = routes[row, start : start + len(sample.record), layer]
            load[layer] += torch.bincount(ids.flatten(), minlength=load.shape[1]).int()
    # a live router behind replayed layers sees other hidden states, so only the first one is that of a live model
    assert torch.equal(trace.load_live[0], load[0])
    assert torch.equal(trace.load_live.sum(1), trace.load_recorded.sum(1))
    recorded = torch.stack(
        [torch.bincount(ids.flatten().long(), minlength=load.shape[1]) for ids in trace.records.unbind(1)]
    )
    assert torch.equal(trace.load_recorded.long(), recorded)
    assert 0 < trace.changed.sum() <= trace.changed.numel() * trace.facts.compared_rows
    changed = float(trace.changed.sum()) / trace.changed.numel() / trace.facts.compared_rows
    assert changed == pytest.approx(trainer.state.log_history[0]["routing_replay/changed_router_frac"], abs=1e-6)


def test_only_so_many_steps_are_traced(qwen3, traced):
    _, paths, _ = traced(qwen3(), max_steps=5, routing_replay_trace_every=2)
    assert [path.name for path in paths] == [f"step-0000000{step}-rank-00000.safetensors" for step in (0, 2, 4)]


def test_a_full_disk_ends_tracing_and_not_the_run(qwen3, train, tmp_path, gap):
    run = {"while_generating": gap["rounded"], "max_steps": 3}
    traces = tmp_path / "traces"
    traces.mkdir()
    full = traces / "step-00000001-rank-00000.part"
    full.symlink_to("/dev/full")  # a device of Linux whose writes fail as a full disk does
    with pytest.warns(RuntimeWarning, match=r"tracing ends at step 1, the run goes on: .*No space left on device"):
        traced = train(qwen3(), routing_replay_trace_dir=str(traces), **run)
    assert [path.name for path in traces.iterdir()] == ["step-00000000-rank-00000.safetensors"]
    assert traced.losses == train(qwen3(), **run).losses and len(traced.losses) == 3


def test_traces_of_an_earlier_run_are_told(qwen3, train, tmp_path, gap):
    """Those that this run writes over are none, and a folder of its own has none."""
    run = {"while_generating": gap["rounded"], "routing_replay_trace_dir": str(tmp_path / "traces")}
    message = "traces of steps after 0, which are of an earlier run"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{message}")
        train(qwen3(), max_steps=3, **run)
        train(qwen3(), max_steps=3, **{**run, "routing_replay_trace_dir": str(tmp_path / "others")})
    with pytest.warns(RuntimeWarning, match=f"holds 2 {message}.* Remove them, or set `routing_replay_trace_dir`"):
        train(qwen3(), max_steps=1, **run)


def test_tracing_changes_no_bit_of_training(qwen3, train, tmp_path, gap):
    plain, traced = qwen3(), qwen3()
    run = {"while_generating": gap["rounded"], "learning_rate": 1e-2, **OLD_POLICY}
    one = train(plain, **run)
    other = train(traced, routing_replay_trace_dir=str(tmp_path / "traces"), **run)
    assert one.losses == other.losses and find_traces(tmp_path / "traces")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))


def test_a_folder_that_cannot_be_made(qwen3, train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`routing_replay_trace_dir` cannot be used: .* Set it to a folder"):
        train(qwen3(), routing_replay_trace_dir=str(tmp_path / "file" / "traces"))
