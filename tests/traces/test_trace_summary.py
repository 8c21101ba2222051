"""Traces of all processes are one summary a step; those of two models are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_traces import make_trace

from trl_r3.traces.trace_summary import EVEN_POINTS, LARGEST_POINTS, Mismatch, summarise


def test_processes_are_added_up_by_step():
    traces = [make_trace(step=step, rank=rank, seed=10 * step + rank) for step in (3, 1) for rank in range(2)]
    facts, steps = summarise(traces, [2.0])
    assert facts is traces[0].facts
    assert [each.step for each in steps] == [1, 3]
    for each, own in zip(steps, (traces[2:], traces[:2]), strict=True):
        for name in ("load_live", "load_recorded", "changed"):
            assert torch.equal(getattr(each, name), sum(getattr(trace, name).long() for trace in own))
        assert each.compared_rows == each.rows == sum(trace.facts.rows for trace in own)
        assert each.agreements == [0.9, 0.9] and each.contrasts == [0.5, 0.5]
        assert each.replayed.tokens == each.live.tokens == sum(int(trace.counted.sum()) for trace in own)


def test_what_a_trace_lacks_is_left_out():
    trace = replace(make_trace(), live_logprobs=None)
    _, (step,) = summarise([trace], [2.0])
    assert step.replayed.tokens > 0 and step.live.tokens == 0
    _, (step,) = summarise([replace(trace, rollout_logprobs=None)], [2.0])
    assert step.replayed.tokens == 0 and step.replayed.points == []


def test_two_models_are_refused():
    one = make_trace(step=1)
    other = replace(one, facts=replace(one.facts, step=2, config_digest="1" * 64))
    with pytest.raises(
        ValueError, match=r"of two models: step 1 of a qwen3_moe with config 00000000, step 2 .* 11111111"
    ):
        summarise([one, other], [2.0])
    with pytest.raises(ValueError, match="of two models"):
        summarise([one, make_trace(experts=32)], [2.0])
    with pytest.raises(ValueError, match="no trace to summarise"):
        summarise([], [2.0])


def test_mismatch_keeps_its_largest_tokens():
    """Tokens that one side could not score do not count; of many, some are kept, the largest among them."""
    generator = torch.Generator().manual_seed(0)
    rollout = -3 * torch.rand(5000, generator=generator)
    scored = rollout + 0.01 * torch.randn(5000, generator=generator)
    scored[1234] = rollout[1234] + 3.0
    rollout[7], scored[8] = float("nan"), float("nan")
    mismatch = Mismatch()
    mismatch.add(scored, rollout, [1.5, 2.0])
    assert mismatch.tokens == 4998 and mismatch.diverged == 1 and mismatch.extreme == {1.5: 1, 2.0: 1}
    (points,) = mismatch.points
    assert EVEN_POINTS <= len(points) <= EVEN_POINTS + LARGEST_POINTS
    assert float(points[:, 1].max()) == pytest.approx(3.0, abs=1e-5)
    mismatch.add(scored[:3], rollout[:3], [1.5, 2.0])
    assert mismatch.tokens == 5001 and len(mismatch.points) == 2
    mismatch.add(scored[7:9], rollout[7:9], [1.5, 2.0])
    assert mismatch.tokens == 5001 and len(mismatch.points) == 2
