"""The weight of tokens whose routers have moved, against one from hooks on the routers, and against wrong ones."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from model_zoo import build_tiny
from oracles import bend_gate

from trl_r3 import R3GMPOTrainer, R3GRPOTrainer, UnsupportedRouterError

LEARNING_RATE = 3e-3  # moves routers, and few of them to the floor
MOVING = {
    "num_iterations": 3,
    "max_steps": 6,
    "learning_rate": LEARNING_RATE,
    "routing_replay_shift_weight": True,
    "routing_replay_gating": "op",
}


class Seen(R3GRPOTrainer):
    """Notes the router inputs and weights of each pass over a rollout, and what TRL was given as the old policy."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.old, self.updates = {}, []

    def routers(self):
        model = self.accelerator.unwrap_model(self.model)
        return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        inputs = {}

        def note(module, args, i):
            inputs[i] = args[0].detach().clone()

        hooks = [gate.register_forward_pre_hook(partial(note, i=i)) for i, gate in enumerate(self.routers())]
        try:
            result = super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        scores = [
            F.softmax(F.linear(inputs[i].flatten(0, -2), gate.weight).float(), -1).detach().view(*input_ids.shape, -1)
            for i, gate in enumerate(self.routers())
        ]
        self.passed = torch.stack(scores, 2)  # (B, T, L, E)
        return result

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.old = dict(zip(output["rollout_samples"].tolist(), self.passed, strict=True))
        return output

    def _compute_loss(self, model, inputs, *args):
        loss = super()._compute_loss(model, inputs, *args)
        by_identity = {sample.identity: sample for sample in self.rollout_samples}
        identities = inputs["rollout_samples"].tolist()
        self.updates.append(
            (
                [by_identity[identity] for identity in identities],
                torch.stack([self.old[identity] for identity in identities]),
                self.passed,
                inputs["prompt_ids"].shape[1],
                inputs["completion_mask"],
            )
        )
        return loss


def weights(update, row_of_token=-1, floor=0.8, live=False):
    """(B, C) by the formula of the paper: of the recorded experts, or of those that are selected live."""
    samples, old, new, width, mask = update
    expected = torch.ones(mask.shape)
    for b, sample in enumerate(samples):
        for c in range(sample.completion_length):
            row = width + c + row_of_token
            own = sample.prompt_length + c + row_of_token
            if own >= len(sample.record):
                continue
            ids = new[b, row].topk(2).indices if live else sample.record[own].long()  # (L, K)
            moved = (new[b, row].gather(1, ids).log() - old[b, row].gather(1, ids).log()).abs().mean()
            expected[b, c] = max(math.exp(-moved), floor)
    return expected


def mean_weights(trainer):
    return [each["routing_replay/shift_weight"] for each in trainer.state.log_history if "loss" in each]


@pytest.fixture
def seen(train, qwen):
    return train(qwen, trainer_class=Seen, **MOVING)


def test_the_logged_weight_is_that_of_the_paper(seen):
    logged = mean_weights(seen)
    assert len(logged) == len(seen.updates) == 6

    def means(**wrong):
        return [float((weights(each, **wrong) * each[4]).sum() / each[4].sum()) for each in seen.updates]

    assert logged == pytest.approx(means(), abs=2e-5)
    assert logged[0] == logged[3] == 1.0  # the first of a rollout
    assert min(logged) < 0.99 and all(0.799999 < each <= 1.0 for each in logged)
    for wrong in ({"row_of_token": 0}, {"floor": 0.0}, {"live": True}):
        assert logged != pytest.approx(means(**wrong), abs=2e-4), wrong


@pytest.mark.parametrize("trainer_class", [R3GRPOTrainer, R3GMPOTrainer])
def test_ratios_are_scaled_and_nothing_else(train, trainer_class, monkeypatch):
    """With weights of 1 the run is that without, bit for bit; else it differs from the second update on."""

    def run(**changes):
        torch.manual_seed(0)
        model = build_tiny("qwen3_moe", num_hidden_layers=2, norm_topk_prob=True)
        settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": LEARNING_RATE, "routing_replay_gating": "op"}
        trainer = train(model, trainer_class=trainer_class, **settings, **changes)
        return [each["loss"] for each in trainer.state.log_history if "loss" in each], trainer

    plain, _ = run()
    weighed, trainer = run(routing_replay_shift_weight=True)
    assert weighed[0] == plain[0] and weighed[1] != plain[1]
    assert mean_weights(trainer)[1] < 1.0
    monkeypatch.setattr("trl_r3.trainers.router_shift._FLOOR", 1.0)
    assert run(routing_replay_shift_weight=True)[0] == plain


def test_the_off_policy_mask_measures_the_policies_alone(train, qwen):
    """TRL drops samples by the distance between two policies, of which the weight is no part."""
    old, given = [], []

    class Masking(R3GRPOTrainer):
        def _compute_loss(self, model, inputs, *args):
            old.append(inputs["old_per_token_logps"].clone())
            return super()._compute_loss(model, inputs, *args)

        @staticmethod
        def get_off_policy_mask(sampling_per_token_logps, **kwargs):
            given.append(sampling_per_token_logps)
            return R3GRPOTrainer.get_off_policy_mask(sampling_per_token_logps=sampling_per_token_logps, **kwargs)

    trainer = train(qwen, trainer_class=Masking, off_policy_mask_threshold=0.5, **MOVING)
    assert min(mean_weights(trainer)) < 0.99
    assert len(given) == 6 and all(map(torch.equal, old, given))


def test_skipped_padding_changes_no_weight(train):
    def run(padding):
        torch.manual_seed(0)
        model = build_tiny("qwen3_moe", num_hidden_layers=2, norm_topk_prob=True)
        trainer = train(model, trainer_class=R3GRPOTrainer, routing_replay_padding=padding, **MOVING)
        return mean_weights(trainer), trainer.routing_replay.padding

    (kept, _), (skipped, how) = run("keep"), run("auto")
    assert how.mode == "all"
    assert skipped == pytest.approx(kept, abs=1e-3) and kept[0] == skipped[0] == 1.0 and min(kept) < 0.99


def test_rows_without_a_record_weigh_1(seen):
    """Of a sample whose record is gone, all rows; the scores of both passes are there, and differ."""
    from trl_r3.trainers.router_shift import RouterShift

    samples, _, new, width, _ = seen.updates[2]
    sample = samples[0]
    layout = seen.routing_replay.layout
    shift = RouterShift(layout)
    rows = torch.stack([new[0, width - 1 + c].topk(2).values.log() for c in range(sample.completion_length)])
    assert (shift._log_weights(sample, rows) < 0).any()
    sample.record = torch.full_like(sample.record, layout.missing)
    assert torch.equal(shift._log_weights(sample, rows), torch.zeros(len(rows)))


def test_scores_are_given_back(seen):
    assert seen.rollout_samples == []


def test_a_gate_that_the_op_does_not_cover_is_refused(build, monkeypatch):
    mixtral = build_tiny("mixtral")
    bend_gate(monkeypatch, type(mixtral.model.layers[0].mlp.gate))
    build(mixtral, num_iterations=2)
    with pytest.raises(UnsupportedRouterError, match="does not cover its gate.*and no `routing_replay_shift_weight`"):
        build(mixtral, routing_replay_shift_weight=True, num_iterations=2)
