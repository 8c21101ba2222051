"""Two processes write a trace each, and one that cannot write holds up nobody."""

from __future__ import annotations

import torch
from trainers.two_processes import TRACES, launched
from transformers import AutoModelForCausalLM

from trl_r3 import load_trace
from trl_r3.traces.trace_file import find_traces
from trl_r3.traces.trace_replay import verify_trace


def test_each_process_writes_its_own(tmp_path_factory):
    results = launched(tmp_path_factory)
    (steps, told), (other_steps, other_told) = ((one["steps"], one["told"]) for one in results(TRACES))
    folder = results.folder / TRACES
    traces = folder / "traces"
    assert (steps, other_steps) == (3, 3) and told == []
    assert len(other_told) == 1 and other_told[0].startswith("tracing ends at step 1, the run goes on")
    first, *_ = loaded = [load_trace(path) for path in find_traces(traces)]
    assert [(each.facts.step, each.facts.rank) for each in loaded] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert {each.facts.num_ranks for each in loaded} == {2}
    assert not torch.equal(first.tokens, loaded[1].tokens), "each process has prompts of its own"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")  # of step 0
    assert [verify_trace(model, each).matches for each in loaded] == [True, True, False, False]
    assert sorted(traces.iterdir()) == find_traces(traces), "nothing half written is left"
