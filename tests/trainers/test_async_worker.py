"""What the rollout process makes of answers: samples that carry their record, in few bytes, and never an error."""

from __future__ import annotations

import asyncio
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines.fake_vllm import npy_base64
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample, TrainingSequence

from trl_r3 import RoutingLayout
from trl_r3.engines.conversations import Conversation, ConversationRoutes, Piece
from trl_r3.trainers.async_worker import RecordingLoop, RoutedSample, RoutedSequence, recording_loop

SHAPE = RoutingLayout(moe_layers=(0, 1), num_decoder_layers=2, num_experts=16, top_k=2)


class Loop:
    """The parts of TRL's loop that the recording one calls, with a server that answers from a list."""

    def __init__(self, answers=()):
        self.answers, self.asked, self.model_version = list(answers), [], 3

    async def _post(self, path, payload, timeout):
        self.asked.append((path, payload))
        await asyncio.sleep(0)
        answer = self.answers.pop(0)
        self.model_version += answer.pop("updates", 0)
        return answer

    async def _generate_one(self, prompts):
        """Turns of a conversation, given one after the other."""
        return [(await self._post("/v1/completions", {"prompt": p}, 1))["choices"][0]["token_ids"] for p in prompts]

    async def _score_group(self, group):
        return [plain(s.input_ids, s.old_log_probs) for each in group.completions_sequences for s in each]


def plain(tokens, logprobs=None) -> RolloutSample:
    ids = np.array(tokens, dtype=np.int64)
    logprobs = np.zeros(len(ids), np.float32) if logprobs is None else np.array(logprobs, np.float32)
    return RolloutSample([], [], ids, np.ones_like(ids), logprobs, 0.5, 3, 7, {"reward": 1.0})


def rows(count, first=0):
    return np.array([[[at % 16, (at + 1) % 16]] * 2 for at in range(first, first + count)], dtype=np.uint8)


def answer(tokens, routes, **more):
    return {"choices": [{"token_ids": tokens, "routed_experts": None if routes is None else routes}], **more}


def made(answers) -> RecordingLoop:
    return recording_loop(Loop, SHAPE, answers=answers)


def test_a_loop_that_records_is_pickled_as_trl_spawns_it():
    spawned = pickle.loads(pickle.dumps(partial(recording_loop, Loop, SHAPE)))
    loop = spawned(answers=[])
    assert isinstance(loop, RecordingLoop) and isinstance(loop, Loop) and loop.layout == SHAPE


def test_turns_of_a_conversation_ask_for_the_rows_they_lack():
    loop = made(
        [
            answer([5, 6], npy_base64(rows(4))),
            answer([7], npy_base64(rows(3, 4))),
        ]
    )
    first, second = asyncio.run(loop._generate_one([[1, 2, 3], [1, 2, 3, 5, 6, 4, 4]]))
    assert [payload.get("routed_experts_prompt_start") for _, payload in loop.asked] == [None, 4]
    assert torch.equal(second.routes.rows, torch.from_numpy(rows(7)))
    assert first == [5, 6] and len(first.routes) == 4


def test_conversations_do_not_mix():
    """Tasks that take turns: the answers of one say nothing of the other."""

    async def both():
        tasks = [asyncio.create_task(loop._generate_one(p)) for p in ([[1, 2], [1, 2, 5, 9]], [[1, 2], [1, 2, 5, 8]])]
        return await asyncio.gather(*tasks)

    loop = made(
        [answer([5], npy_base64(rows(2, i))) for i in (0, 10)] + [answer([6], npy_base64(rows(2, i))) for i in (4, 13)]
    )
    (_, one), (_, other) = asyncio.run(both())
    assert torch.equal(one.routes.rows, torch.from_numpy(np.concatenate([rows(2), rows(2, 4)])))
    assert torch.equal(other.routes.rows, torch.from_numpy(np.concatenate([rows(2, 10), rows(2, 13)])))


class Branching(Loop):
    """A loop of one's own, which goes on from its first turn twice at once."""

    async def _generate_one(self, prompts):
        first, *others = ([p] for p in prompts)
        turns = await super()._generate_one(first)
        for each in await asyncio.gather(*map(super()._generate_one, others)):
            turns += each
        return turns


def test_requests_of_a_conversation_at_once():
    """What one of them was not asked for is what was known when it was sent, whichever is answered first."""
    prompts = [[1, 2], [1, 2, 5, 9, 7], [1, 2, 5, 9, 7, 7]]
    told = [rows(2), rows(3, 2), rows(4, 2)]
    loop = recording_loop(Branching, SHAPE, answers=[answer([5], npy_base64(each)) for each in told])
    first, *others = asyncio.run(loop._generate_one(prompts))
    asked = [payload.get("routed_experts_prompt_start", 0) for _, payload in loop.asked]
    assert asked == [0, 2, 2]
    assert [each.routes.fault for each in others] == [None, None]
    assert [len(each.routes) for each in others] == [5, 6]
    assert all(torch.equal(each.routes.rows, torch.from_numpy(rows(len(each.routes)))) for each in others)


def test_what_no_conversation_is_known_of_comes_whole():
    loop = made([answer([5], npy_base64(rows(2))), answer([6], npy_base64(rows(4)))])

    async def alone():
        turns = [await loop._post("/v1/completions", {"prompt": p}, 1) for p in ([1, 2], [1, 2, 5, 9])]
        return [turn["choices"][0]["token_ids"] for turn in turns]

    one, other = asyncio.run(alone())
    assert all("routed_experts_prompt_start" not in payload for _, payload in loop.asked)
    assert (len(one.routes), len(other.routes)) == (2, 4)


def test_versions_are_those_of_sending_and_answering():
    loop = made([answer([5], npy_base64(rows(2)), updates=1), answer([6], npy_base64(rows(2, 2)))])
    *_, last = asyncio.run(loop._generate_one([[1, 2], [1, 2, 5, 9]]))
    assert last.routes.spans.tolist() == [[2, 3, 4], [2, 4, 4]]


@pytest.mark.parametrize("routes", [None, "no base64!", npy_base64(rows(1)), npy_base64(rows(9))])
def test_nothing_is_raised_because_of_routes(routes):
    loop = made([answer([5], routes)])
    (output,) = asyncio.run(loop._generate_one([[1, 2]]))
    assert output == [5] and (output.routes.fault is None) == (routes is None)


def test_other_requests_are_left_alone():
    loop = made([{"status": "ok"}, {}])

    async def ask():
        return await loop._post("/pause", {}, 1), await loop._post("/v1/completions", {"prompt": [1]}, 1)

    assert asyncio.run(ask()) == ({"status": "ok"}, {})


def test_samples_get_the_routes_of_their_sequences():
    routes = [ConversationRoutes((Piece(torch.from_numpy(rows(2, i)), i, i),)) for i in range(3)]
    sequences = [RoutedSequence([i, 1, 2], [0, 1, 1], [0.0] * 3, "id", each) for i, each in enumerate(routes)]
    group = SimpleNamespace(completions_sequences=[[sequences[0]], [sequences[1], sequences[2]], []])
    samples = asyncio.run(made([])._score_group(group))
    assert [sample.input_ids[0] for sample in samples] == [0, 1, 2]
    assert [sample.record[0, 0, 0] for sample in samples] == [0, 1, 2]
    assert [sample.spans.tolist() for sample in samples] == [[[2, i, i]] for i in range(3)]
    assert all(isinstance(sample, RoutedSample) and sample.advantage == 0.5 for sample in samples)


class Choosing(Loop):
    """A loop of one's own, which leaves the first sample out and begins with the last."""

    async def _score_group(self, group):
        return (await super()._score_group(group))[:0:-1]


class Cutting(Loop):
    """One that edits a sample."""

    async def _score_group(self, group):
        first, *others = await super()._score_group(group)
        first.input_ids, first.old_log_probs = first.input_ids[:-1], first.old_log_probs[:-1]
        return [first, *others]


def a_group(count):
    """Sequences of equal tokens, which were drawn at weights of their own."""
    routes = [ConversationRoutes((Piece(torch.from_numpy(rows(2, i)), i, i),)) for i in range(count)]
    sequences = [RoutedSequence([4, 1, 2], [0, 1, 1], [0.0, -i / 3, -1.0], "id", r) for i, r in enumerate(routes)]
    return SimpleNamespace(completions_sequences=[[each] for each in sequences])


def test_a_loop_may_leave_samples_out():
    loop = recording_loop(Choosing, SHAPE)
    samples = asyncio.run(loop._score_group(a_group(4)))
    assert [sample.record[0, 0, 0] for sample in samples] == [3, 2, 1]
    assert not any(sample.fault for sample in samples)


class Clamping(Loop):
    """One that edits what is none of the tokens."""

    async def _score_group(self, group):
        samples = await super()._score_group(group)
        for sample in samples:
            sample.old_log_probs = sample.old_log_probs.clip(-0.5)
        return samples


def test_a_loop_may_edit_log_probabilities():
    samples = asyncio.run(recording_loop(Clamping, SHAPE)._score_group(a_group(3)))
    assert [sample.record[0, 0, 0] for sample in samples] == [0, 1, 2]


def test_a_sample_that_a_loop_edits_tells_so():
    samples = asyncio.run(recording_loop(Cutting, SHAPE)._score_group(a_group(3)))
    assert [sample.record is None for sample in samples] == [True, False, False]
    assert "those of no sequence of its group" in samples[0].fault and not samples[1].fault


def test_a_sequence_that_a_loop_made_itself_tells_so():
    group = SimpleNamespace(completions_sequences=[[TrainingSequence([4, 1], [0, 1], [0.0, -1.0], "id")]])
    (sample,) = asyncio.run(made([])._score_group(group))
    assert sample.record is None and "made the sampled tokens of a turn anew" in sample.fault


def test_a_sample_in_the_queue_is_hardly_larger_than_its_ids():
    layout = RoutingLayout(tuple(range(48)), 48, 128, 8)
    tokens = list(range(4096))
    ids = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(128), (4095, 48, 128)), axis=2)[:, :, :8]
    conversation = Conversation(layout)
    output = conversation.add(tokens[:1000], tokens[1000:], ids.astype(np.int32), (3, 3), 0)
    assert output.routes.fault is None
    sample = RoutedSample.of(plain(tokens), output.routes)
    size, own, record = (len(pickle.dumps(each)) for each in (sample, plain(tokens), sample.record))
    assert sample.record.nbytes == 4095 * 48 * 8
    assert size <= 1.1 * (sample.record.nbytes + own)
    assert len(pickle.dumps(output.routes.rows.long().numpy())) > 1.1 * (sample.record.nbytes + own)  # as it came
