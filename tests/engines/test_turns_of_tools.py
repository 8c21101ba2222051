"""Tools and environments: the turns of a conversation become one record, and the earliest turn wins."""

from __future__ import annotations

import pytest
import torch
from engines import environments
from engines.script import SAID, again, big, deep, ids_of, look, scripted
from engines.tiny_chat import TOOLS, VOCAB, WatchedGRPO, conversations, make_trainer
from engines.watch import Watched, WatchedTurn, assert_nothing_missing, assert_replayed, wrong_rows
from oracles import kept_rows

MAX_COMPLETION = 16


def rows_by_hand(turns: list[WatchedTurn], prompt: list[int], completion: list[int], duplicate: int) -> torch.Tensor:
    """(T - 1, L, K) of one conversation: of each turn that was given its beginning, the rows that no earlier had."""
    tokens, pieces, filled = [*prompt, *completion], [], 0
    for turn in turns:
        mine = [i for i, ids in enumerate(turn.prompt_ids) if ids == tokens[: len(ids)]]
        if not mine:
            continue
        sample = mine[duplicate]
        fed = (turn.prompt_ids[sample] + turn.completion_ids[sample])[: len(tokens)]
        assert fed == tokens[: len(fed)]
        rows = turn.rows(sample)[: len(tokens) - 1]
        pieces.append(rows[filled:])
        filled = max(filled, len(rows))
    return torch.cat(pieces)


def expected_rows(trainer: Watched) -> dict[int, list]:
    expected = {}
    for step in {turn.step for turn in trainer.turns}:
        turns = [turn for turn in trainer.turns if turn.step == step]
        expected[step] = [
            (prompt + ids_of(SAID[word]), rows_by_hand(turns, prompt, ids_of(SAID[word]), duplicate))
            for word in SAID
            for duplicate in range(2)
            for prompt in [ids_of(f"<user> {word} <eos> <assistant>")]
        ]
    return expected


def make(tmp_path, data=None, **settings) -> Watched:
    defaults = {"generation_kwargs": scripted(), "max_completion_length": MAX_COMPLETION}
    defaults |= {"per_device_train_batch_size": 2 * len(SAID), "num_generations": 2}
    return make_trainer(tmp_path, data or conversations(list(SAID)), **{**defaults, **settings})


def check_conversations(trainer: Watched) -> None:
    """The script was followed, so that every case occurred."""
    for one in trainer.updates:
        said = sorted(tokens for tokens, _ in one.samples())
        assert said == sorted(
            tuple(ids_of(f"<user> {word} <eos> <assistant> {text}")) for word, text in SAID.items() for _ in range(2)
        )
    for step in {turn.step for turn in trainer.turns}:
        assert [len(turn.prompt_ids) for turn in trainer.turns if turn.step == step] == [12, 8, 2]


def test_turns_are_joined(tmp_path):
    trainer = make(tmp_path, tools=[look, again, deep, big])
    trainer.train()
    check_conversations(trainer)
    assert_replayed(trainer, expected_rows(trainer))
    assert_nothing_missing(trainer, steps=2)
    wrong = pairs = 0
    for one in trainer.updates:  # one update a rollout: the weights are those of the rollout
        for tokens, rows in one.samples():
            wrong += wrong_rows(rows, trainer.live_rows(tokens, one.weights))
            pairs += rows[..., 0].numel()
    assert wrong == 0, f"{wrong} of {pairs} pairs differ from a forward over the whole conversation"


def test_the_earliest_turn_wins(tmp_path):
    """The routers change between two turns, so that the prefill of a later turn routes what is known otherwise."""
    changes = []

    def change() -> str:
        """Look up, while the numerics of the engine change."""
        gates = [layer.mlp.gate for layer in trainer.model.model.layers if hasattr(layer.mlp, "gate")]
        with torch.no_grad():
            for gate in gates:
                gate.weight.copy_(gate.weight.roll(1 + len(changes) % 3, 0))
        changes.append(len(gates))
        return "sun moon"

    change.__name__ = "look"
    trainer = make(tmp_path, tools=[change, again, deep, big], learning_rate=1e-4)
    trainer.train()
    check_conversations(trainer)
    assert changes and set(changes) == {3}
    turns = [turn for turn in trainer.turns if turn.step == 0]
    told_again = 0
    for sample, prompt in enumerate(turns[1].prompt_ids):
        first = next(i for i, ids in enumerate(turns[0].prompt_ids) if ids == prompt[: len(ids)])
        rows = turns[0].rows(first)
        told_again += wrong_rows(turns[1].rows(sample)[: len(rows)], rows)
    assert told_again > 20, "the second turn routed its prompt like the first, so this test shows nothing"
    assert_replayed(trainer, expected_rows(trainer))
    assert_nothing_missing(trainer, steps=2)


def test_later_updates_replay_the_joined_record(tmp_path):
    trainer = make(tmp_path, tools=[look, again, deep, big], num_iterations=2, max_steps=4, learning_rate=3e-2)
    trainer.train()
    assert len({turn.step for turn in trainer.turns}) == 2 and len(trainer.updates) == 4
    assert_replayed(trainer, expected_rows(trainer))
    last = trainer.updates[-1]
    changed = sum(wrong_rows(rows, trainer.live_rows(tokens, last.weights)) for tokens, rows in last.samples())
    assert changed > 20, "live routing still agrees with the record, so replay shows nothing"


class Sky:
    """An environment whose methods are tools."""

    resets = 0

    def reset(self, **kwargs) -> None:
        Sky.resets += 1
        self.seen = 0

    def look(self) -> str:
        """Look up."""
        self.seen += 1
        return "sun moon"

    def again(self) -> str:
        """Look again."""
        self.seen += 1
        return "wait"

    def deep(self) -> str:
        """Look down."""
        return "down"

    def big(self) -> str:
        """Look at everything."""
        return "sun " * 30

    def get_reward(self) -> float:
        return float(self.seen)


def test_environments(tmp_path):
    Sky.resets = 0
    trainer = make(tmp_path, environment_factory=Sky)
    trainer.train()
    assert Sky.resets >= 20
    check_conversations(trainer)
    assert_replayed(trainer, expected_rows(trainer))
    assert_nothing_missing(trainer, steps=2)


@pytest.mark.parametrize("make_spec", [environments.harbor, environments.openreward])
def test_environments_of_trl(tmp_path, make_spec):
    spec = make_spec(tmp_path / "suite", list(SAID))
    trainer = make(
        tmp_path,
        spec.train_dataset,
        environment_factory=spec.environment_factory,
        reward_funcs=spec.reward_funcs,
    )
    trainer.train()
    check_conversations(trainer)
    assert_replayed(trainer, expected_rows(trainer))
    assert_nothing_missing(trainer, steps=2)


def test_tools_that_nobody_calls(tmp_path):
    generation = {"generation_kwargs": {"sequence_bias": [[[VOCAB[name]], -1e4] for name in TOOLS]}}
    trainer = make(tmp_path, tools=[look, again, deep, big], **generation)
    trainer.train()
    assert len(trainer.turns) == 2
    expected = {
        turn.step: [
            (prompt + completion, turn.rows(i))
            for i, (prompt, completion) in enumerate(zip(turn.prompt_ids, turn.completion_ids, strict=True))
        ]
        for turn in trainer.turns
    }
    assert_replayed(trainer, expected)


def test_turns_that_were_tokenized_again_are_refused(tmp_path):
    """A tool loop that edits what was said would give rows to tokens they do not belong to."""

    class Retokenizing(WatchedGRPO):
        def _tool_call_loop(self, prompts, prompt_ids, completion_ids, *args, **kwargs):
            output = list(super()._tool_call_loop(prompts, prompt_ids, completion_ids, *args, **kwargs))
            output[2] = [[ids[0], VOCAB["t60"], *ids[2:]] for ids in output[2]]
            return tuple(output)

    trainer = make(tmp_path, trainer_class=Retokenizing, tools=[look, again, deep, big])
    with pytest.raises(ValueError, match="a turn was given a prompt of .* Do not re-tokenize between turns"):
        trainer.train()


@pytest.mark.parametrize("routes", [False, True])
def test_tool_loop(tmp_path, routes):
    """Every sampled token has its row, from the turn that sampled it, and what tools said has none."""
    seen = []

    trainer = make_trainer(
        tmp_path,
        conversations(["stop", "once", "twice", "full"]),
        tools=[look, again, deep],
        max_completion_length=16,
        top_p=0.9,
        generation_kwargs=scripted(),
        use_routing_replay=routes,
        use_sampling_mask_replay=True,
    )
    own = trainer._generate_and_score_completions

    def note(inputs):
        output = own(inputs)
        seen.append((output, trainer.rollout_samples))
        return output

    trainer._generate_and_score_completions = note
    trainer.train()
    output, samples = seen[0]
    sampled = said = 0
    for i, sample in enumerate(samples):
        completion = sample.tokens[sample.prompt_length :].tolist()
        assert len(sample.mask) == len(completion)
        tool_mask = output["tool_mask"][i][: len(completion)].tolist()
        for token, row, drawn in zip(completion, kept_rows(sample.mask), tool_mask, strict=True):
            assert (token in row) == bool(drawn)
            sampled, said = sampled + drawn, said + (not drawn)
            assert row or not drawn
    assert sampled
    assert said
