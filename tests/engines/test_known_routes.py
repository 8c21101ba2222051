"""Rows that an engine has returned are not asked for again, and every record stays whole.

Legend: D decoder layers, K experts per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from engines.fake_vllm import completion_of, fake_vllm, routes_of
from hypothesis import given
from hypothesis import strategies as st

from trl_r3 import RoutingLayout, stitch
from trl_r3.engines.known_routes import KnownRoutes
from trl_r3.engines.vllm_colocate import recorded_llm
from trl_r3.engines.vllm_server import RecordingVLLMClient
from trl_r3.trainers.session import ReplaySession

SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=16, top_k=4)


class Sampling:
    """`vllm.SamplingParams`, as far as it is read."""

    routed_experts_prompt_start = 0


class Engine:
    """`vllm.LLM`: each turn routes a token otherwise, so that it shows which turn a row comes from."""

    def __init__(self, leaves_out=True):
        self.leaves_out, self.turns, self.starts = leaves_out, 0, []

    def routes(self, tokens, turn):
        return (routes_of(tokens) + turn) % 16

    def generate(self, prompts, sampling_params=None, use_tqdm=False):
        self.turns += 1
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        self.starts.append([one.routed_experts_prompt_start for one in each])
        outputs = []
        for prompt, start in zip(prompts, self.starts[-1], strict=True):
            prompt = prompt["prompt_token_ids"]
            completion = completion_of(prompt, self.turns)
            rows = self.routes([*prompt, *completion], self.turns)[start if self.leaves_out else 0 :]
            completion = SimpleNamespace(token_ids=completion, routed_experts=rows)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=[completion]))
        return outputs


def play(engine, prompts, turns, known=None):
    """The tool loop of TRL: every sample hears a token after each turn. Returns turns, and what was said."""
    trainer = SimpleNamespace(
        vllm_generation=SimpleNamespace(llm=engine, tensor_parallel_size=1, tp_group=None),
    )
    known, played, given = known or KnownRoutes(), [], [list(prompt) for prompt in prompts]
    for number in range(turns):
        with recorded_llm(trainer, SHAPE, False, known) as make_turn:
            outputs = trainer.vllm_generation.llm.generate([{"prompt_token_ids": ids} for ids in given], Sampling())
        said = [output.outputs[0].token_ids for output in outputs]
        played.append(make_turn(given, said))
        last = number == turns - 1
        given = [[*p, *c, *([] if last else [120 + number])] for p, c in zip(given, said, strict=True)]
    return played, given


PROMPTS = [[30], [31, 40], [30, 40, 41], [30]]  # two alike, and the beginning of another


@pytest.mark.parametrize("leaves_out", [True, False])
def test_turns_are_whole_and_the_earliest_wins(leaves_out):
    """Also with an engine that cannot leave rows out."""
    engine = Engine(leaves_out)
    turns, ends = play(engine, PROMPTS, 4)
    completions = [end[len(prompt) :] for end, prompt in zip(ends, PROMPTS, strict=True)]
    record = stitch(turns, PROMPTS, completions, SHAPE)
    for sample, (rows, end) in enumerate(zip(record.records, ends, strict=True)):
        expected, filled = [], 0
        for number, turn in enumerate(turns, 1):
            fed = [*turn.prompt_ids[sample], *turn.completion_ids[sample]]
            assert turn.records[sample].shape[0] == len(fed) - 1
            expected.append(engine.routes(fed, number)[filled:])
            filled = len(fed) - 1
        assert filled == len(end) - 1
        assert np.array_equal(rows, np.concatenate(expected)[:, [0, 2, 3]])


def test_only_new_rows_are_asked_for():
    engine = Engine()
    turns, _ = play(engine, PROMPTS, 4)
    assert engine.starts[0] == [0, 0, 0, 0]
    for before, starts in zip(turns, engine.starts[1:], strict=False):
        fed = [len(p) + len(c) - 1 for p, c in zip(before.prompt_ids, before.completion_ids, strict=True)]
        assert starts == fed


def test_a_prompt_that_was_edited_is_asked_for_whole():
    known = KnownRoutes()
    known.complete([5, 6], [7], routes_of([5, 6, 7]))
    known.end_turn()
    assert known.start([5, 6, 7, 8]) == 2
    assert known.start([5, 6]) == known.start([5, 7, 7, 8]) == known.start([6, 7]) == 0


def test_one_record_a_conversation_is_kept():
    known = KnownRoutes()
    play(Engine(), PROMPTS[:3], 5, known)
    assert len(known._rows) == 3


def test_rollouts_of_one_turn_keep_nothing():
    """Nothing is looked for, and nothing kept, where no later turn can go on."""
    args = SimpleNamespace(routing_replay_load_every=0)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), args=args, tools=[])
    session = ReplaySession(trainer, routes=True, masks=False)
    session.begin_turns()
    assert session.turns.known is None
    trainer.tools = [print]
    session.begin_turns()
    assert isinstance(session.turns.known, KnownRoutes)


def test_the_next_rollout_knows_nothing():
    """Its weights are others: rows of an earlier rollout would be wrong, not only late."""
    engine = Engine()
    for _ in range(2):
        play(engine, PROMPTS, 2)
    assert engine.starts[2] == [0, 0, 0, 0]


def test_rows_that_do_not_add_up_are_left_as_they_are():
    """The length of a record is checked later, with the sample that errors name."""
    known = KnownRoutes()
    known.complete([5, 6], [7], routes_of([5, 6, 7]))
    known.end_turn()
    short = routes_of([5, 6, 7, 8, 9])[1:]
    assert known.complete([5, 6, 7, 8], [9], short) is short


def test_a_buffer_that_is_filled_again():
    known, buffer = KnownRoutes(), routes_of([5, 6, 7])
    known.complete([5, 6], [7], buffer[:])
    known.end_turn()
    expected = buffer.copy()
    buffer[:] = 0
    assert np.array_equal(known.complete([5, 6, 7], [8], routes_of([5, 6, 7, 8])[2:])[:2], expected)


@pytest.mark.parametrize("leaves_out", [True, False])
def test_servers(monkeypatch, leaves_out):
    """The request says from which row on; a conversation of ten turns costs little more than its last answer."""
    pytest.importorskip("requests", reason="TRL's client of a vLLM server needs `pip install requests`")
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *args, **kwargs: True)
    with fake_vllm(leaves_out=leaves_out) as fake:
        client = RecordingVLLMClient(base_url=fake.base_url, connection_timeout=5.0, routes=True)
        client.known_routes = KnownRoutes()
        given = [[30, 31], [40, 41]]
        for _ in range(10):
            answer = client.generate(given, max_tokens=8, generation_kwargs={"seed": 3})
            routes = client.take_routes()
            ends = [[*p, *c] for p, c in zip(given, answer["completion_ids"], strict=True)]
            for rows, end in zip(routes, ends, strict=True):
                assert np.array_equal(rows, routes_of(end))
            given = [[*end, 99] for end in ends]
    starts = [body.get("routed_experts_prompt_start", 0) for body in fake.requests if "prompt" in body]
    assert len(starts) == 20
    assert starts.count(0) == 2
    assert all(body["seed"] == 3 for body in fake.requests if "prompt" in body)


# few tokens, so that beginnings are shared, some of which differ in a later byte of a token only
TOKENS = st.sampled_from([0, 1, 255, 256, 257, 65536])
CONVERSATIONS = st.lists(st.lists(TOKENS, min_size=2, max_size=8), max_size=12)


def known(conversations):
    routes = KnownRoutes()
    for tokens in conversations:
        routes.complete(tokens[:1], tokens[1:], np.zeros((len(tokens) - 1, 1, 1), np.uint8))
    routes.end_turn()
    return routes


@given(CONVERSATIONS, st.lists(TOKENS, min_size=1, max_size=12))
def test_the_longest_beginning_is_found(conversations, prompt):
    begun = [len(each) - 1 for each in conversations if prompt[: len(each)] == each]
    assert known(conversations).start(prompt) == max(begun, default=0)


def test_a_conversation_behind_others_that_only_begin_alike_is_found():
    routes = known([[5, 6], [5, 6, 7, 1], [5, 6, 7, 2], [5, 6, 7, 3, 0]])
    assert routes.start([5, 6, 7, 3, 1]) == 1
    assert routes.start([5, 6, 7, 2, 9]) == 3
    assert routes.start([6, 5]) == 0
