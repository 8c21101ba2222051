"""Rows that an engine lost: an error by default, and live routing in every pass where they are allowed."""

import pytest
import torch
from trainers.forcing import forced, logged
from trainers.watching import same_sets

from trl_r3 import R3GRPOTrainer


class DropsRows(R3GRPOTrainer):
    """An engine that lost rows of one sample of every rollout."""

    lost = {1: slice(2, 4)}

    def _generate_single_turn(self, *args, **kwargs):
        generated = super()._generate_single_turn(*args, **kwargs)
        for sample, rows in self.lost.items():
            self._r3.turns.made[-1].records[sample][rows] = self.routing_replay.layout.missing
        return generated


def test_missing_rows_raise_by_default(qwen3, train):
    with pytest.raises(RuntimeError, match=r"routing_replay_max_missing") as raised:
        train(qwen3(), trainer_class=DropsRows)
    message = str(raised.value)
    assert "sample 1" in message
    assert "0.00%" in message  # what is allowed
    assert "%" in message.replace("0.00%", "")  # what was found


def test_missing_rows_above_the_limit_raise(qwen3, train):
    with pytest.raises(RuntimeError, match="1.00%"):
        train(qwen3(), trainer_class=DropsRows, routing_replay_max_missing=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_missing_rows_route_live_in_every_pass(qwen3, train, gap, checkpointing):
    trainer = train(
        qwen3(),
        trainer_class=DropsRows,
        routing_replay_max_missing=0.5,
        while_generating=gap["scrambled"],
        gradient_checkpointing=checkpointing,
        num_iterations=3,
        max_steps=3,
    )
    old_policy, updates = trainer.of("old policy"), trainer.of("update")
    recomputes = [one for one in trainer.of("recompute") if one.calls]
    assert len(recomputes) == (3 if checkpointing else 0)
    expected, lost_rows = {}, []
    one = old_policy[0]
    for row, tokens in enumerate(one.input_ids.tolist()):
        expected[tuple(tokens)] = one.recorded[row].clone()
        if row in DropsRows.lost:
            start = one.prompt_width - trainer.sample_of(one, row).prompt_length
            lost = slice(start + DropsRows.lost[row].start, start + DropsRows.lost[row].stop)
            expected[tuple(tokens)][lost] = -1
            lost_rows.append((tuple(tokens), lost))
    assert lost_rows
    for one in old_policy + updates + recomputes:
        recorded = torch.stack([expected[tuple(tokens)] for tokens in one.input_ids.tolist()])
        assert int((one.fed & (recorded[:, :, 0, 0] == -1)).sum()) == 2
        known = recorded[:, :, 0, 0] != -1
        assert same_sets(one.executed[known], recorded[known])
        _, live = forced(trainer.pristine, one, recorded)  # missing rows route live, all others as recorded
        missing = one.fed & ~known
        assert same_sets(one.executed[missing], live[missing])
        assert not same_sets(one.executed[missing], one.recorded[missing])
    rows = int(updates[0].fed.sum())
    for name, value in (("missing", 2 / rows), ("replayed", 1 - 2 / rows)):
        for step in (1, 2, 3):
            assert logged(trainer, f"routing_replay/{name}_frac")[step] == pytest.approx(value)


def test_missing_rows_do_not_count_as_changed(qwen3, train):
    run = {"routing_replay_max_missing": 1.0, "max_steps": 1}
    trainer = train(qwen3(), trainer_class=DropsRows, **run)
    assert logged(trainer, "routing_replay/changed_router_frac") == {1: 0.0}


def test_rollout_without_any_record_routes_live_if_allowed(qwen3, train, check, gap):
    class DropsAll(DropsRows):
        lost = {sample: slice(None) for sample in range(4)}

    run = {"routing_replay_max_missing": 1.0, "while_generating": gap["scrambled"], "num_iterations": 2}
    trainer = train(qwen3(), trainer_class=DropsAll, **run)
    for one in trainer.of("update"):
        check.live(trainer, one)
        check.drifted(trainer, one)
    assert set(logged(trainer, "routing_replay/missing_frac").values()) == {1.0}
    assert set(logged(trainer, "routing_replay/replayed_frac").values()) == {0.0}
    assert set(logged(trainer, "routing_replay/changed_router_frac").values()) == {None}
