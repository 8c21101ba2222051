"""
Bugs that other implementations of routing replay had between an engine and a record: here each is right, or refused.

Legend: T tokens of a sequence, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines.fake_vllm import fake_vllm, npy_base64, routes_of
from oracles import some_rows

from trl_r3 import RoutingLayout, Turn, stitch
from trl_r3.engines.known_routes import KnownRoutes
from trl_r3.engines.vllm_colocate import recorded_llm
from trl_r3.engines.vllm_server import RecordingVLLMClient
from trl_r3.records.record import to_record

LAYOUT = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=16, top_k=4)
SMALL = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=100, top_k=2)


def routed(tokens, who):
    """(T - 1, D, K): the same tokens are routed by each of several requests in a way of its own."""
    return (routes_of(tokens) + who) % 16


class Engine:
    """`vllm.LLM` that says what it is told to, and routes each request by its place in the call and by the call."""

    def __init__(self, calls, leaves_out):
        self.calls, self.leaves_out, self.number = calls, leaves_out, 0

    def generate(self, prompts, sampling_params=None, use_tqdm=False):
        said, self.number = self.calls[self.number], self.number + 1
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        outputs = []
        for place, (prompt, completion, one) in enumerate(zip(prompts, said, each, strict=True)):
            ids = prompt["prompt_token_ids"]
            start = one.routed_experts_prompt_start if self.leaves_out else 0
            rows = routed([*ids, *completion], 5 * self.number + place)[start:]
            answer = SimpleNamespace(token_ids=completion, routed_experts=rows)
            outputs.append(SimpleNamespace(prompt_token_ids=ids, outputs=[answer]))
        return outputs


def play(calls, prompts, heard, leaves_out):
    """Calls of one rollout, between which each sample hears the same; returns the turns and the completions."""
    trainer = SimpleNamespace(
        vllm_generation=SimpleNamespace(llm=Engine(calls, leaves_out), tensor_parallel_size=1, tp_group=None)
    )
    known, turns, given = KnownRoutes(), [], [list(prompt) for prompt in prompts]
    for said in calls:
        with recorded_llm(trainer, LAYOUT, False, known) as make_turn:
            asked = SimpleNamespace(routed_experts_prompt_start=0)
            trainer.vllm_generation.llm.generate([{"prompt_token_ids": ids} for ids in given], asked)
        turns.append(make_turn(given, said))
        ends = [[*ids, *completion] for ids, completion in zip(given, said, strict=True)]
        given = [[*end, *heard] for end in ends]
    return turns, [end[len(prompt) :] for end, prompt in zip(ends, prompts, strict=True)]


@pytest.mark.parametrize("leaves_out", [True, False])
@pytest.mark.parametrize("heard", [[], [9]], ids=["a partial rollout", "turns"])
def test_equal_tokens_keep_routes_of_their_own(leaves_out, heard):
    """Twins of a group, batched with different neighbours; also in a rollout that was only interrupted."""
    calls, prompts = [[[7, 8], [7, 8]], [[5, 6], [5, 6]]], [[30, 31], [30, 31]]
    turns, completions = play(calls, prompts, heard, leaves_out)
    assert completions[0] == completions[1] == [7, 8, *heard, 5, 6]
    records = stitch(turns, prompts, completions, LAYOUT).records
    tokens = [*prompts[0], *completions[0]]
    for place, record in enumerate(records):
        first, second = routed(tokens, 5 + place), routed(tokens, 10 + place)
        expected = np.concatenate([first[:3], second[3:]])[:, [0, 2, 3]]
        assert len(record) == len(tokens) - 1
        assert np.array_equal(record.numpy(), expected)
    assert not torch.equal(records[0], records[1])


def test_a_partial_rollout_that_was_joined_twice_is_refused():
    """The part that was sampled before the interruption, and the whole of what was returned after it."""
    generator = torch.Generator().manual_seed(0)
    before, after = some_rows(3, generator), some_rows(5, generator)
    twice = Turn([[5, 6, 7, 8]], [[10, 11]], [torch.cat([before, after])])
    with pytest.raises(ValueError, match="sample 0: the record has 8 rows for 6 tokens"):
        stitch([twice], [[5, 6]], [[7, 8, 10, 11]], SMALL)


def test_a_template_that_gives_back_less_than_was_said():
    """Thoughts are left out of the next prompt: rows behind the last shared token are those of the later turn."""
    prompt, thought, answer = [5, 6], [40, 41], [7]
    later = [*prompt, *answer, 9]
    known = KnownRoutes()
    known.complete(prompt, thought + answer, routes_of(prompt + thought + answer))
    known.end_turn()
    assert known.start(later) == 0
    generator = torch.Generator().manual_seed(0)
    first = Turn([prompt], [thought + answer], [some_rows(4, generator)])
    second = Turn([later], [[10, 11]], [some_rows(5, generator)])
    (record,) = stitch([first, second], [prompt], [[*answer, 9, 10, 11]], SMALL).records
    assert torch.equal(record, torch.cat([first.records[0][:2], second.records[0][2:]]))


def test_a_boundary_token_of_zeros():
    """The last token of a turn was never fed. Zeros in its place are refused, and not used where they look right."""
    generator = torch.Generator().manual_seed(0)
    rows = some_rows(3, generator)
    zeros = torch.zeros_like(rows[:1])
    first = Turn([[5, 6]], [[7, 8]], [torch.cat([rows, zeros])])
    second = Turn([[5, 6, 7, 8, 9]], [[10]], [some_rows(5, generator)])
    with pytest.raises(ValueError, match=r"sample 0, decoder layer 0 .*row 3: expert 0 appears 2 times"):
        stitch([first, second], [[5, 6]], [[7, 8, 9, 10]], SMALL)
    one = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=100, top_k=1)
    for turn in (first, second):
        turn.records = [turn.records[0][..., :1] + (0 if turn is first else 1)]
    (record,) = stitch([first, second], [[5, 6]], [[7, 8, 9, 10]], one).records
    assert torch.equal(record, torch.cat([first.records[0][:3], second.records[0][3:]]))


@pytest.mark.parametrize("said", [[], [12]], ids=["no token", "one token"])
def test_an_aborted_request_is_no_empty_record(said):
    answers = [([30], [10], routes_of([30, 10])), ([31], said, None)]
    outputs = [
        SimpleNamespace(prompt_token_ids=p, outputs=[SimpleNamespace(token_ids=c, routed_experts=ids)])
        for p, c, ids in answers
    ]
    llm = SimpleNamespace(generate=lambda *args, **kwargs: outputs)
    trainer = SimpleNamespace(vllm_generation=SimpleNamespace(llm=llm, tensor_parallel_size=1, tp_group=None))
    for known in (None, KnownRoutes()):
        with recorded_llm(trainer, LAYOUT, False, known) as make_turn:
            trainer.vllm_generation.llm.generate([{"prompt_token_ids": [1]}] * 2, SimpleNamespace())
        with pytest.raises(ValueError, match="request was aborted"):
            make_turn([[30], [31]], [[10], said])


@pytest.fixture
def ask(monkeypatch):
    """Ask a server of its own, whose answers `spoil` changes, for completions with routes."""
    pytest.importorskip("requests", reason="TRL's client of a vLLM server needs `pip install requests`")
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *args, **kwargs: True)

    def run(spoil, masks=False):
        with fake_vllm() as fake:
            fake.info["model_config"]["return_sampling_mask"] = masks
            own = fake.complete
            fake.complete = lambda body: {"choices": [spoil(choice) for choice in own(body)["choices"]]}
            client = RecordingVLLMClient(base_url=fake.base_url, connection_timeout=5.0, routes=True, masks=masks)
            return client.generate([[30, 31]], max_tokens=8), client

    return run


def aborted(choice):
    empty = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    return {**choice, "token_ids": [], "logprobs": empty, "routed_experts": None}


def without_the_field(choice):
    return {key: value for key, value in choice.items() if key != "routed_experts"}


@pytest.mark.parametrize("masks", [False, True], ids=["/v1/completions", "/inference/v1/generate"])
@pytest.mark.parametrize("spoil", [aborted, without_the_field])
def test_an_answer_without_routes_is_an_error_on_each_path(ask, spoil, masks):
    _, client = ask(lambda choice: choice, masks)
    assert len(client.take_routes()) == 1
    with pytest.raises(ValueError, match="no `routed_experts`"):
        ask(spoil, masks)


def test_physical_ids_of_an_engine_with_redundant_experts_are_refused(ask):
    """Under expert balancing a copy of an expert has an id of its own, behind those of the model."""
    physical = routes_of([30, 31, 12]).astype(int)
    physical[1, 2, 0] = 16  # the first copy
    with pytest.raises(ValueError, match=r"sample 3.*: expert id 16 is outside \[0, 16\)"):
        to_record(physical, LAYOUT, 3)
    _, client = ask(lambda choice: {**choice, "routed_experts": npy_base64(physical.astype(np.uint8))})
    with pytest.raises(ValueError, match=r"expert id 16 is outside \[0, 16\)"):
        to_record(client.take_routes()[0], LAYOUT, 3)
