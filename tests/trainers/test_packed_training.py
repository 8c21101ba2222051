"""Training without padding, as TRL is about to: samples in one row, positions that begin again, a block mask."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from oracles import as_sets
from trainers.runs import CHECKPOINTING
from trainers.students import ForwardWatch, assert_updates_replay, scramble_rollouts
from trainers.watching import scrambled_routers
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_r3 import MisalignedRecordError, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.trainers.mixin import RoutingReplayMixin

ITERATED = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "router_aux_loss_coef": 0.0}


class PlainHead(GRPOTrainer):
    """Scores by logits: TRL's fused head computes in float32 whatever the model."""

    packs = False
    order = staticmethod(lambda count: list(range(count)))

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, keep, batch_size=None, **_):
        size = batch_size or len(input_ids)
        parts = [
            self._score(model, ids, mask.bool(), keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        logps = torch.cat(parts)
        return logps, torch.zeros_like(logps), None

    def _score(self, model, ids, real, keep):
        if self.packs:
            logits = self._packed_logits(model, ids, real)
        else:
            logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        logps = (logits[:, :-1] / self.temperature).log_softmax(-1)
        return logps.gather(-1, ids[:, 1:, None])[..., 0][:, -keep:] * real[:, -keep:]

    def _packed_logits(self, model, ids, real):
        """(B, T, V), zero at padding: the model sees (1, N), and positions that begin again with each sample."""
        order = self.order(len(ids))
        row = torch.cat([ids[i][real[i]] for i in order])[None]
        positions = torch.cat([torch.arange(int(real[i].sum())) for i in order])[None]
        flat = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]
        logits = flat.new_zeros(*ids.shape, flat.shape[-1])
        for i, part in zip(order, flat.split([int(real[i].sum()) for i in order]), strict=True):
            logits[i, real[i]] = part
        return logits


class Padded(RoutingReplayMixin, PlainHead):
    pass


class Packed(RoutingReplayMixin, PlainHead):
    packs = True


class Gradients(TrainerCallback):
    """Those of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def in_double(model):
    model.set_experts_implementation("eager")
    return model.double()


def run(build, model, trainer_class, scrambles=True, **changes):
    """A training, its gradients and the watch on its forwards."""
    gradients = Gradients()
    trainer = build(model, trainer_class=trainer_class, callbacks=[gradients], **changes)
    if scrambles:
        scramble_rollouts(trainer.model)
    watch = ForwardWatch(trainer.model)
    trainer.train()
    return trainer, gradients.steps, watch


def assert_equal_runs(one, other):
    assert one[0].losses == pytest.approx(other[0].losses, abs=1e-6)
    assert len(one[1]) == len(other[1]) > 0
    for packed, padded in zip(one[1], other[1], strict=True):
        assert packed.keys() == padded.keys()
        assert all(torch.allclose(packed[name], padded[name], rtol=1e-6, atol=1e-6) for name in packed)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_packed_run_is_the_padded_one(qwen3, build, checkpointing):
    changes = {**ITERATED, **CHECKPOINTING[checkpointing]}
    padded = run(build, in_double(qwen3()), Padded, **changes)
    packed = run(build, in_double(qwen3()), Packed, **changes)
    assert_equal_runs(packed, padded)
    trainer, _, watch = packed
    assert [len(one.input_ids) for one in watch.updates] == [1, 1], "nothing was packed"
    assert len(watch.updates[0].samples(watch.updates[0].calls)) == 4
    assert_updates_replay(watch, recomputes=checkpointing != "none")
    logged = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    assert [entry["routing_replay/replayed_frac"] for entry in logged] == [1.0, 1.0]
    assert logged[0]["routing_replay/agreement"] == pytest.approx(
        padded[0].state.log_history[0]["routing_replay/agreement"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"routing_replay_mode": "R2"},
        {"routing_replay_padding": "auto"},
        {"routing_replay_load_every": 1},
        {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_with_other_settings(qwen3, build, changes):
    packed = run(build, in_double(qwen3()), Packed, **{**ITERATED, **changes})
    assert_equal_runs(packed, run(build, in_double(qwen3()), Padded, **{**ITERATED, **changes}))


def test_samples_in_another_order_than_their_records_are_refused(qwen3, build):
    class Turned(Packed):
        order = staticmethod(lambda count: list(reversed(range(count))))

    with pytest.raises(MisalignedRecordError, match="tokens of a forward without padding differ|has .* tokens, but"):
        run(build, qwen3(), Turned, **ITERATED)


def test_a_traced_run_is_refused(qwen3, build, tmp_path):
    with pytest.raises(RuntimeError, match="without padding, cannot be traced"):
        run(build, qwen3(), Packed, **ITERATED, routing_replay_trace_dir=str(tmp_path))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_plain_loop(qwen3, checkpointing):
    """`enable_routing_replay`: a packed batch is a batch of one row, with the records one after the other."""
    model = in_double(qwen3())
    replay = enable_routing_replay(model)
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]]), torch.tensor([[5, 6, 7]])]
    rolled = []
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        scrambled = scrambled_routers(model) if seed else nullcontext()
        with scrambled:
            rolled.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=True,
                    return_dict_in_generate=True,
                    output_routed_experts=True,
                )
            )
    kind = CHECKPOINTING[checkpointing]
    if kind["gradient_checkpointing"]:
        model.train().gradient_checkpointing_enable(kind["gradient_checkpointing_kwargs"])
    ids = torch.cat([each.sequences for each in rolled], 1)
    routes = torch.cat([each.routed_experts for each in rolled], 1)
    positions = torch.cat([torch.arange(each.sequences.size(1)) for each in rolled])[None]
    with executed_ids(model) as seen:
        logits = model(input_ids=ids, position_ids=positions, routed_experts=routes, use_cache=False).logits
        (logits.logsumexp(-1).sum() / 10).backward()
    there = routes[0, :, 0, 0] >= 0
    for call in range(1 if checkpointing == "none" else 2):
        executed = torch.stack([seen[layer][call] for layer in replay.moe_layers], 1)
        assert torch.equal(as_sets(executed[there]), as_sets(routes[0][there]))
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for each in rolled:
        alone = model(input_ids=each.sequences, routed_experts=each.routed_experts, use_cache=False).logits
        (alone.logsumexp(-1).sum() / 10).backward()
    for name, parameter in model.named_parameters():
        if name in packed:
            assert torch.allclose(packed[name], parameter.grad, rtol=1e-6, atol=1e-6), name
