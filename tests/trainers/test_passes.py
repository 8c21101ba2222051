"""Which pass goes through which experts, and that nothing of it stays behind (properties 5 and 7 to 11)."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from trainers.watching import instance_forwards, same_sets

from trl_r3 import R3GRPOTrainer

CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8, "learning_rate": 1e-2}  # two rollouts


@pytest.fixture(params=["qwen3", "mixtral"])
def model(request):
    return request.getfixturevalue(request.param)()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_every_pass_executes_the_record(model, train, check, checkpointing):
    trainer = train(model, **OFF_POLICY, **CHECKPOINTING[checkpointing])
    old_policy, updates, recomputes = (trainer.of(name) for name in ("old policy", "update", "recompute"))
    assert (len(old_policy), len(updates)) == (2, 8)
    for one in old_policy + updates:
        check.replayed(one)
    for one in recomputes:
        if checkpointing == "none":
            assert not one.calls
        else:
            check.replayed(one)
    for first in (0, 4):
        for moved in updates[first + 1 : first + 4]:
            check.drifted(trainer, moved)  # the weights have moved far enough to choose others


def test_every_recorded_row_is_replayed(qwen3, train, check):
    trainer = train(qwen3(), **OFF_POLICY)
    for one in trainer.of("update"):
        check.replayed(one)
        assert torch.equal(one.fed.sum(1), one.attention_mask.sum(1) - 1)
    lengths = {tuple(one.attention_mask.sum(1).tolist()) for one in trainer.of("update")}
    assert len(set().union(*lengths)) > 2  # or padding would go untested


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_checkpointing_leaves_the_weights_that_none_leaves(qwen3, train, gap, checkpointing):
    # without auxiliary loss: Transformers collects router logits by hooks, where the reentrant kind has no gradient
    run = {"max_steps": 3, "num_iterations": 3, "while_generating": gap["scrambled"], "router_aux_loss_coef": 0.0}
    plain = train(qwen3(), **run, **CHECKPOINTING["none"]).model.state_dict()
    trained = train(qwen3(), **run, **CHECKPOINTING[checkpointing])
    for name, weight in trained.model.state_dict().items():
        assert torch.allclose(weight, plain[name], atol=1e-5, rtol=1e-4), name


def test_record_lost_before_backward_is_refused(qwen3, train, monkeypatch):
    monkeypatch.setattr("trl_r3.routers.router_replay.bound_checkpoints", lambda *args: nullcontext())
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        train(qwen3(), **CHECKPOINTING["reentrant"])


def test_record_lost_before_backward_is_seen_by_these_tests(qwen3, train, gap, check, monkeypatch):
    monkeypatch.setattr("trl_r3.routers.router_replay.bound_checkpoints", lambda *args: nullcontext())
    monkeypatch.setattr("trl_r3.routers.router_replay.in_backward", lambda: False)
    run = {"max_steps": 3, "num_iterations": 3, "while_generating": gap["scrambled"], "router_aux_loss_coef": 0.0}
    plain = train(qwen3(), **run, **CHECKPOINTING["none"]).model.state_dict()
    wrong = train(qwen3(), **run, **CHECKPOINTING["reentrant"])
    for one in wrong.of("recompute"):
        with pytest.raises(AssertionError):
            check.replayed(one)
    weights = wrong.model.state_dict()
    assert not all(torch.allclose(weights[name], plain[name], atol=1e-5, rtol=1e-4) for name in plain)


def rows_by_tokens(one):
    """{tokens of a padded sample: its executed rows}."""
    return {tuple(tokens): rows for tokens, rows in zip(one.input_ids.tolist(), one.executed, strict=True)}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_r2_replays_the_old_policy(model, train, check, gap, checkpointing):
    run = {**OFF_POLICY, "max_steps": 4, "while_generating": gap["scrambled"], **CHECKPOINTING[checkpointing]}
    trainer = train(model, routing_replay_mode="R2", **run)
    (old_policy,) = trainer.of("old policy")
    check.live(trainer, old_policy)
    recorded = rows_by_tokens(old_policy)
    replaying = trainer.of("update") + [one for one in trainer.of("recompute") if one.calls]
    assert len(replaying) == (4 if checkpointing == "none" else 8)
    for one in replaying:
        expected = torch.stack([recorded[tuple(tokens)] for tokens in one.input_ids.tolist()])
        assert same_sets(one.executed[one.fed], expected[one.fed])
        check.drifted(trainer, one)
        assert not same_sets(one.executed[one.fed], one.recorded[one.fed])  # which is what R3 replays


def test_r3_replays_the_rollout_and_not_the_old_policy(model, train, check, gap):
    trainer = train(model, **OFF_POLICY, while_generating=gap["scrambled"])
    for one in trainer.of("old policy") + trainer.of("update"):
        check.drifted(trainer, one)
        check.replayed(one)


def in_double(model):
    model.set_experts_implementation("eager")  # PyTorch has no grouped matrix product for float64
    return model.double()


@pytest.mark.parametrize("rollout", ["rounded", "scrambled"])
def test_ratio_is_one_at_unchanged_weights(qwen3, train, check, gap, rollout):
    trainer = train(in_double(qwen3()), num_iterations=2, max_steps=2, while_generating=gap[rollout])
    (old_policy,), update = trainer.of("old policy"), trainer.of("update")[0]
    check.drifted(trainer, update)
    assert ratios(old_policy, update).eq(1.0).all()


@pytest.mark.parametrize("live", ["old policy", "update"])
def test_ratio_is_not_one_when_only_one_pass_replays(qwen3, train, gap, live):
    class OnePassOnly(R3GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            if self._inside == {"old policy": "scoring", "update": "update"}[live]:
                with self.live_routing():
                    return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    run = {"num_iterations": 2, "max_steps": 1, "while_generating": gap["rounded"]}
    trainer = train(in_double(qwen3()), trainer_class=OnePassOnly, **run)
    (old_policy,), (update,) = trainer.of("old policy"), trainer.of("update")
    assert (ratios(old_policy, update) - 1).abs().max() > 1e-6


def ratios(old_policy, update):
    """(tokens,): of the policy's updates to the old policy, on the completions, sample by sample."""
    old = {tuple(t): logps for t, logps in zip(old_policy.input_ids.tolist(), old_policy.logps, strict=True)}
    matched = torch.stack([old[tuple(tokens)] for tokens in update.input_ids.tolist()])
    completion = update.attention_mask[:, update.prompt_width :].bool()
    return (update.logps - matched)[completion].exp()


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_router_learns(qwen3, train, mode):
    model = qwen3()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, num_iterations=2, routing_replay_mode=mode, router_aux_loss_coef=0.0, max_steps=2)
    routers = [name for name in before if name.endswith("gate.weight")]
    assert len(routers) == 3
    for name in routers:
        assert (model.state_dict()[name] - before[name]).abs().max() > 1e-4


class Stop(Exception):
    pass


def fails_in_reward(train, model):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise Stop
        return [float(len(text)) for text in completions]

    train(model, reward=reward, max_steps=3)


def fails_in_backward(train, model):
    calls = []

    def stop(grad):
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    model.model.layers[2].mlp.gate.weight.register_hook(stop)
    train(model, max_steps=3)


def fails_in_forward(train, model):
    def stop(module, args):
        if torch.is_grad_enabled():
            raise Stop

    handle = model.model.layers[3].mlp.register_forward_pre_hook(stop)
    try:
        train(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("fails", [None, fails_in_reward, fails_in_backward, fails_in_forward])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_no_state_survives_training(qwen3, build, fails, checkpointing):
    model, trainers = qwen3(), []

    def train(model, **kwargs):
        trainers.append(build(model, **kwargs, **CHECKPOINTING[checkpointing]))
        trainers[0].forwards = instance_forwards(trainers[0].model)
        trainers[0].checkpoint_functions = checkpoint_functions(model)
        trainers[0].train()

    if fails is None:
        train(model)
    else:
        with pytest.raises(Stop):
            fails(train, model)
    (trainer,) = trainers
    assert instance_forwards(model) == trainer.forwards
    assert list(trainer.forwards) == [""]  # the scoring head of TRL, on the model itself
    assert all("trl_r3" not in repr(function) for function in checkpoint_functions(model))
    with pytest.raises(RuntimeError, match="only while `train\\(\\)` runs"):
        _ = trainer.routing_replay
    assert same_bits_as_untouched(model, qwen3())


def checkpoint_functions(model):
    return [
        m.__dict__["_gradient_checkpointing_func"]
        for m in model.modules()
        if "_gradient_checkpointing_func" in vars(m)
    ]


def same_bits_as_untouched(model, untouched):
    """Whether logits and gradients are those of a model that never met a trainer."""
    untouched.load_state_dict(model.state_dict())
    ids = torch.arange(2, 34).reshape(2, 16)
    results = []
    for one in (model, untouched):
        one.zero_grad()
        one.eval()
        output = one(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in one.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_state_survives_evaluation(qwen3, build):
    model = qwen3()
    trainer = build(model, eval_dataset=Dataset.from_dict({"prompt": ["abc", "d"]}), per_device_eval_batch_size=2)
    forwards = instance_forwards(model)
    trainer.evaluate()
    assert instance_forwards(model) == forwards
    trainer.train()
    trainer.evaluate()
    assert instance_forwards(model) == forwards
    assert same_bits_as_untouched(model, qwen3())


def test_construction_leaves_the_model_alone(qwen3, build):
    model = qwen3()
    build(model)
    assert list(instance_forwards(model)) == [""]
    assert same_bits_as_untouched(model, qwen3())


def test_training_twice(qwen3, build, check):
    trainer = build(qwen3(), num_iterations=2)
    trainer.train()
    trainer.train()
    assert len(trainer.of("update")) == 4
    for one in trainer.of("update"):
        check.replayed(one)


def oracle(model):
    """
    Lets the routers of a rollout spell its tokens: token t is routed to experts t % 8 and 8 + t // 8 of layer 0, and
    to three further back with every layer. Those that train choose three further back still.
    """
    with torch.no_grad():
        codes = torch.arange(96)
        embedding = model.model.embed_tokens.weight.normal_()
        embedding[:, :16] = 0
        embedding[codes, codes % 8] = 8.0
        embedding[codes, 8 + codes // 8 % 8] = 8.0
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()  # so that nothing but the token reaches a router
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.down_proj.zero_()
                router = torch.zeros_like(layer.mlp.gate.weight)
                router[torch.arange(16), (torch.arange(16) + 3 * number) % 16] = 1.0
                layer.mlp.gate.weight.copy_(router.roll(-3, 0))
            else:
                layer.mlp.down_proj.weight.zero_()
    return model


def spelt(input_ids):
    """(B, T, L, K) of what an oracle routes tokens to."""
    codes = torch.stack([input_ids % 8, 8 + input_ids // 8 % 8], dim=-1)
    return torch.stack([(codes - 3 * layer) % 16 for layer in (0, 2, 3)], dim=2)


ORACLE = {
    "learning_rate": 0.0,  # or the embedding would unlearn its code
    "num_iterations": 2,
    "steps_per_generation": 3,
    "max_steps": 12,
}
LETTERS = {"suppress_tokens": [0, *range(64, 96)]}  # that the code can tell apart
UNEQUAL = ["1+2=", "*#A", "X", "HELLO YOU", "Q?", "(1,2)", "4", "7*8"]
EQUAL = ["1+2=", "*#AB", "X-YZ", "HI U", "WHY?", "(12)", "4&56", "7*8="]  # whose records fit each other's places


def spells_its_tokens(one, same_sets):
    """Whether every row that was fed went through the experts that spell its own token."""
    return same_sets(one.executed[one.fed], spelt(one.input_ids)[one.fed])


@pytest.mark.parametrize(
    "setting", [{}, {"pad_to_multiple_of": 8}, {"per_device_train_batch_size": 2}, {"shuffle_dataset": False}]
)
@pytest.mark.parametrize("end", [0.0, 3.0])
def test_every_row_is_that_of_its_token(qwen3, train, gap, setting, end):
    """Through padding left and right, chunks, shuffling and splitting."""
    trainer = train(
        oracle(qwen3(num_experts_per_tok=2)),
        prompts=UNEQUAL,
        while_generating=gap["scrambled"],
        generation_kwargs={**LETTERS, "sequence_bias": [[[1], end]]},
        **{**ORACLE, **setting},
    )
    updates = trainer.of("update")
    assert len(updates) == 12
    for one in trainer.of("old policy") + updates + trainer.of("recompute"):
        assert spells_its_tokens(one, same_sets)
    for one in updates:
        live, spelling = trainer.live_routes(one)[one.fed], spelt(one.input_ids)[one.fed]
        assert (live.sort(-1).values != spelling.sort(-1).values).any(-1).all()  # in every row and layer


class Misaligned(R3GRPOTrainer):
    """Wrong variants: they change the records that travel with a batch."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.generated, self.served = [sample.record for sample in self.rollout_samples], 0
        return batch

    def _compute_loss(self, model, inputs):
        own = self._r3.rollout
        chosen = own.get_samples(inputs["rollout_samples"].tolist())
        others = self.instead([sample.record for sample in chosen])
        by_identity = {sample.identity: other for sample, other in zip(chosen, others, strict=True)}
        samples = [replace(each, record=by_identity.get(each.identity, each.record)) for each in own.samples]
        self._r3.rollout = replace(own, samples=samples)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._r3.rollout = own


class OneLate(Misaligned):
    def instead(self, own):
        return [record.roll(1, 0) for record in own]


class OneEarly(Misaligned):
    def instead(self, own):
        return [record.roll(-1, 0) for record in own]


class OfTheNeighbour(Misaligned):
    def instead(self, own):
        return own[1:] + own[:1]


class InOrderOfGeneration(Misaligned):
    def instead(self, own):
        start = self.served % len(self.generated)
        self.served += len(own)
        return self.generated[start : start + len(own)]


class NextLayer(Misaligned):
    def instead(self, own):
        return [record.roll(1, 1) for record in own]


class LastRowOfZeros(Misaligned):
    def instead(self, own):
        return [torch.cat([record[:-1], torch.zeros_like(record[-1:])]) for record in own]


@pytest.mark.parametrize(
    "variant", [OneLate, OneEarly, OfTheNeighbour, InOrderOfGeneration, NextLayer, LastRowOfZeros]
)
def test_misaligned_rows_are_told_apart(qwen3, train, gap, variant):
    trainer = train(
        oracle(qwen3(num_experts_per_tok=2)),
        trainer_class=variant,
        prompts=EQUAL,
        while_generating=gap["scrambled"],
        generation_kwargs={"suppress_tokens": [*LETTERS["suppress_tokens"], 1]},
        **ORACLE,
    )
    for one in trainer.of("old policy"):
        assert spells_its_tokens(one, same_sets)
    for one in trainer.of("update"):
        assert not spells_its_tokens(one, same_sets)
