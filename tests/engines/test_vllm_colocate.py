"""What colocate mode takes from an engine, and what it makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines.fake_vllm import completion_of, routes_of

from trl_r3 import RoutingLayout, decode_vllm_output
from trl_r3.engines.vllm_colocate import recorded_llm

SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=16, top_k=4)


class FakeEngine:
    """`vllm.LLM` as far as colocate mode uses it: completions of all prompts of a tensor-parallel group."""

    def __init__(self, sequences, corrupt=None):
        self.sequences, self.corrupt = sequences, corrupt

    def generate(self, *args, **kwargs):
        outputs = []
        for i, (prompt, completion) in enumerate(self.sequences):
            ids = routes_of(prompt + completion)
            completion = SimpleNamespace(token_ids=completion, routed_experts=ids)
            if self.corrupt == i:
                completion.routed_experts = None
            outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=[completion]))
        return outputs


def colocated(engine, ranks=1):
    generation = SimpleNamespace(llm=engine, tensor_parallel_size=ranks, tp_group=None, generate=lambda prompts: None)
    return SimpleNamespace(vllm_generation=generation)


SEQUENCES = [([30 + i] * (i + 1), completion_of([30 + i], 0)) for i in range(4)]


@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_ranks_keep_their_slice(monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    trainer = colocated(FakeEngine(SEQUENCES), ranks=2)
    mine = SEQUENCES[2 * rank : 2 * rank + 2]
    with recorded_llm(trainer, SHAPE, False, None) as make_turn:
        trainer.vllm_generation.llm.generate([{"prompt_token_ids": prompt} for prompt, _ in SEQUENCES])
    turn = make_turn([prompt for prompt, _ in mine], [completion for _, completion in mine])
    expected = [routes_of(prompt + completion)[:, [0, 2, 3]] for prompt, completion in mine]
    assert [record.tolist() for record in turn.records] == [ids.tolist() for ids in expected]
    assert "generate" not in vars(trainer.vllm_generation.llm), "the engine was not given back"


def test_an_aborted_request_is_an_error():
    trainer = colocated(FakeEngine(SEQUENCES, corrupt=2))
    with recorded_llm(trainer, SHAPE, False, None) as make_turn:
        trainer.vllm_generation.llm.generate([])
    with pytest.raises(ValueError, match="request was aborted"):
        make_turn([prompt for prompt, _ in SEQUENCES], [completion for _, completion in SEQUENCES])


@pytest.mark.parametrize("layers", [(0, 2, 3), (1, 2), (0, 1, 2, 3)])
def test_records_do_not_hang_on_a_buffer_of_the_engine(layers):
    """An engine may hand out views of a buffer that it fills again."""
    engine = FakeEngine(SEQUENCES)
    held = engine.generate()
    buffers = [output.outputs[0].routed_experts for output in held]
    for output, buffer in zip(held, buffers, strict=True):
        output.outputs[0].routed_experts = buffer[:]
    engine.generate = lambda *args, **kwargs: held
    trainer = colocated(engine)
    layout = RoutingLayout(layers, num_decoder_layers=4, num_experts=16, top_k=4)
    with recorded_llm(trainer, layout, False, None) as make_turn:
        trainer.vllm_generation.llm.generate([])
    turn = make_turn([prompt for prompt, _ in SEQUENCES], [completion for _, completion in SEQUENCES])
    expected = [buffer[:, list(layers)].copy() for buffer in buffers]
    for buffer in buffers:
        buffer[:] = 0
    assert all(np.array_equal(record, ids) for record, ids in zip(turn.records, expected, strict=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_output_of_the_engine_passes_through(dtype):
    ids = np.arange(24, dtype=dtype).reshape(3, 4, 2)
    assert decode_vllm_output(SimpleNamespace(routed_experts=ids)) is ids


@pytest.mark.parametrize(
    "ids, fact",
    [
        (np.full((3, 4, 2), -1, np.int16), "dtype int16, expected uint8 or uint16.*before 0.22"),
        (np.zeros((3, 4, 2), np.float32), "dtype float32"),
        (np.zeros((3, 4), np.uint8), r"shape \(3, 4\), expected 3 dimensions"),
        (np.zeros((0, 4, 2), np.uint8), r"shape \(0, 4, 2\), expected 3 dimensions of at least 1"),
        ([[[0, 1]]], "is a list, expected a numpy.ndarray"),
    ],
)
def test_output_of_another_format(ids, fact):
    with pytest.raises(ValueError, match=fact):
        decode_vllm_output(SimpleNamespace(routed_experts=ids))
