"""A vLLM that several processes share; with a server and two processes in `test_vllm_server.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trl_r3 import RoutingLayout
from trl_r3.engines.vllm_colocate import recorded_llm

SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=16, top_k=4)


def test_ranks_that_bring_different_numbers_of_prompts_are_refused(monkeypatch):
    """Under tensor parallelism TRL slices what all of them made by each rank's own number."""

    def gather(counts, count, group):
        assert group == "ours"
        counts[:] = [count, 2]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    asked = []
    generation = SimpleNamespace(
        llm=SimpleNamespace(generate=None),
        tensor_parallel_size=2,
        tp_group="ours",
        generate=lambda prompts, num_generations: asked.append((prompts, num_generations)),
    )
    own = generation.generate
    with recorded_llm(SimpleNamespace(vllm_generation=generation), SHAPE, False, None):
        generation.generate(prompts=[[30], [31]], num_generations=1)
        with pytest.raises(ValueError, match=r"bring \[1, 2\] prompts .* set `vllm_tensor_parallel_size=1`"):
            generation.generate(prompts=[[30]], num_generations=1)
    assert asked == [([[30], [31]], 1)], "nothing is generated that would be mixed up"
    assert generation.generate is own
