"""A long conversation with a real engine: rows are sent once, and are those of a forward over all of it."""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import numpy as np
import pytest
import torch
from test_vllm_engine import start, tokens

from trl_r3 import RoutingLayout, stitch
from trl_r3.engines.known_routes import KnownRoutes
from trl_r3.engines.vllm_colocate import recorded_llm

pytestmark = pytest.mark.vllm

TURNS, SAMPLED, HEARD = 20, 8, 2  # a turn is 10 tokens: the engine has room for 256
LAYOUT = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=8, top_k=2)


@pytest.fixture
def llm(model_folder):
    llm = start(model_folder, max_num_batched_tokens=48, max_num_seqs=16, enable_chunked_prefill=True)
    yield llm
    cpu_engine.close(llm)


def converse(llm, prompts, known_of_turn):
    """The tool loop of TRL; returns turns, conversations, and the bytes of routes of each turn."""
    from vllm import SamplingParams

    torch.manual_seed(0)
    generation = SimpleNamespace(llm=llm, tensor_parallel_size=1, tp_group=None)
    trainer = SimpleNamespace(vllm_generation=generation)
    sampling = SamplingParams(temperature=1.0, logprobs=0, max_tokens=SAMPLED, ignore_eos=True)
    turns, sent, given = [], [], prompts
    for turn in range(TURNS):
        with recorded_llm(trainer, LAYOUT, False, known_of_turn()) as make_turn:
            inputs = [{"prompt_token_ids": ids} for ids in given]
            outputs = llm.generate(inputs, sampling_params=sampling, use_tqdm=False)
        said = [list(output.outputs[0].token_ids) for output in outputs]
        sent.append(sum(output.outputs[0].routed_experts.nbytes for output in outputs))
        turns.append(make_turn(given, said))
        ends = [[*p, *c] for p, c in zip(given, said, strict=True)]
        given = [[*end, *tokens(HEARD, 100 * turn + i)] for i, end in enumerate(ends)]
    return turns, ends, sent


def test_bytes_of_twenty_turns(llm, model):
    """At most 1.2 times those of one request with the whole conversation, instead of ten times."""
    prompts = [tokens(9, 1), tokens(9, 1), tokens(14, 2)]
    known = KnownRoutes()
    turns, ends, sent = converse(llm, prompts, lambda: known)
    whole = sum((len(end) - 1) * LAYOUT.num_decoder_layers * LAYOUT.top_k for end in ends)
    assert sum(sent) <= 1.2 * whole
    record = stitch(turns, prompts, [end[len(p) :] for p, end in zip(prompts, ends, strict=True)], LAYOUT)
    wrong = pairs = 0
    for rows, end in zip(record.records, ends, strict=True):
        full = np.zeros((len(end) - 1, LAYOUT.num_decoder_layers, LAYOUT.top_k), dtype=np.uint8)
        full[:, list(LAYOUT.moe_layers)] = rows.numpy()
        differ, count = cpu_engine.mismatches(model, end, full)
        wrong, pairs = wrong + differ, pairs + count
    assert wrong == 0, f"{wrong} of {pairs} pairs of position and layer differ"
    print(f"\n{TURNS} turns: {sum(sent)} bytes, {sum(sent) / whole:.3f} times those of one request")


def test_bytes_without_what_is_known(llm):
    """Or the test above could not fail: an engine that is asked for everything sends ten times as much."""
    _, ends, sent = converse(llm, [tokens(9, 1)], KnownRoutes)
    whole = (len(ends[0]) - 1) * LAYOUT.num_decoder_layers * LAYOUT.top_k
    print(f"\n{TURNS} turns, everything asked for: {sum(sent) / whole:.3f} times one request")
    assert sum(sent) > 8 * whole
