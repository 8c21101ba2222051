"""What is logged, against the same numbers computed here from logits and routers."""

import math

import pytest
import torch
from datasets import Dataset
from trainers.forcing import forced, logged
from transformers import TrainerCallback

from trl_r3.records.metrics import AGES, SHARES, agreement_at
from trl_r3.trainers.log import ReplayLog

REPLAY = [f"routing_replay/{name}_frac" for name in ("replayed", "missing", "changed_router", "changed_token")]
MISMATCH = ["sampling/k3_kl", "sampling/extreme_token_frac"]
LIVE = ["sampling/live/k3_kl", "sampling/live/extreme_token_frac"]


def test_all_names_are_in_the_log(qwen3, train):
    trainer = train(qwen3(), routing_replay_compare_every=1)
    for name in REPLAY + MISMATCH + LIVE:
        values = logged(trainer, name)
        assert sorted(values) == [1, 2], name
        assert all(math.isfinite(value) for value in values.values()), name


def test_nothing_is_logged_without_replay(qwen3, train):
    trainer = train(qwen3(), use_routing_replay=False, routing_replay_compare_every=1)
    names = {name for entry in trainer.state.log_history for name in entry}
    assert not [name for name in names if name.startswith(("routing_replay/", "sampling/"))]


@pytest.mark.parametrize("prefix", ["eval", "held_out"])
def test_evaluation_in_a_step_takes_nothing_from_its_log(qwen3, build, prefix):
    class Evaluating(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            trainer.evaluate(metric_key_prefix=prefix)

    data = {"eval_dataset": Dataset.from_dict({"prompt": ["abc", "d"]}), "per_device_eval_batch_size": 2}
    run = {"gradient_accumulation_steps": 2, "routing_replay_compare_every": 1, "callbacks": [Evaluating()]}
    trainer = build(qwen3(), **data, **run)
    trainer.train()
    entries = [each for each in trainer.state.log_history if f"{prefix}_loss" in each]
    assert len(entries) == 2
    assert not any("routing_replay/" in name or "sampling/" in name for each in entries for name in each)
    assert all(sorted(logged(trainer, name)) == [1, 2] for name in REPLAY + MISMATCH + LIVE)


def log_ratios(trainer, one, routes):
    """(tokens,) log pi_train - log pi_rollout of the sampled tokens."""
    logits, _ = forced(trainer.pristine, one, routes)
    completion = one.input_ids[:, one.prompt_width :]
    scored = (logits / trainer.temperature).log_softmax(-1).gather(2, completion[:, :, None])[:, :, 0]
    samples = [trainer.sample_of(one, row).logps for row in range(len(completion))]
    return torch.cat([scored[row, : len(sampled)] - sampled for row, sampled in enumerate(samples)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("updates", [{"num_iterations": 2}, {"gradient_accumulation_steps": 1}])
@pytest.mark.parametrize("rollout", ["rounded", "scrambled"])
def test_mismatch_is_that_of_the_logits(qwen3, train, gap, rollout, updates, temperature):
    trainer = train(
        qwen3(),
        max_steps=1,
        temperature=temperature,
        while_generating=gap[rollout],
        routing_replay_compare_every=1,
        **updates,
    )
    one = trainer.passes[1]
    for routes, prefix in ((one.recorded, "sampling"), (torch.full_like(one.recorded, -1), "sampling/live")):
        log_ratio = log_ratios(trainer, one, routes)
        k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
        extreme = (log_ratio.abs() > math.log(2)).double().mean().item()
        assert k3 > 1e-7
        assert logged(trainer, f"{prefix}/k3_kl")[1] == pytest.approx(k3, rel=1e-3)
        assert logged(trainer, f"{prefix}/extreme_token_frac")[1] == pytest.approx(extreme, abs=1e-6)
        if rollout == "scrambled" and prefix == "sampling/live":
            assert 0 < extreme < 1


def test_mismatch_is_of_the_weights_that_rolled_out(qwen3, train):
    """Two updates of one rollout: the second one's weights have moved, which is no mismatch of routing."""
    trainer = train(qwen3(), num_iterations=2, max_steps=4, learning_rate=1e-2)
    assert sorted(logged(trainer, "sampling/k3_kl")) == [1, 3]
    assert max(logged(trainer, "sampling/k3_kl").values()) < 1e-9


def test_mismatch_with_accumulated_gradients(qwen3, train):
    trainer = train(qwen3(), gradient_accumulation_steps=2, max_steps=2)
    assert not [one for one in trainer.passes if one.name == "old policy"]
    assert sorted(logged(trainer, "sampling/k3_kl")) == [1, 2]
    assert max(logged(trainer, "sampling/k3_kl").values()) < 1e-9


def test_mismatch_of_a_batch_without_loss_is_not_a_number(qwen3, train):
    no_end = {"suppress_tokens": [0, 1]}
    trainer = train(qwen3(), mask_truncated_completions=True, generation_kwargs=no_end, max_steps=1)
    assert logged(trainer, "sampling/k3_kl") == {1: None}
    assert logged(trainer, "routing_replay/replayed_frac") == {1: None}, "no row matters to the loss"


@pytest.mark.parametrize("mode", ["R3", "R2"])
@pytest.mark.parametrize("rollout", [None, "scrambled"])
def test_changed_fractions_are_those_of_the_routers(qwen3, train, gap, mode, rollout):
    run = {"num_iterations": 3, "max_steps": 3, "learning_rate": 3e-3, "routing_replay_mode": mode}
    trainer = train(qwen3(), while_generating=gap[rollout] if rollout else None, **run)
    old = trainer.of("old policy")[0]
    old_rows = dict(zip(map(tuple, old.input_ids.tolist()), old.executed, strict=True))
    seen = []
    for one in trainer.of("update"):
        recorded = one.recorded
        if mode == "R2":
            recorded = torch.stack([old_rows[tuple(tokens)] for tokens in one.input_ids.tolist()])
            recorded = recorded.masked_fill(~one.fed[:, :, None, None], -1)
        _, live = forced(trainer.pristine, one, recorded)
        changed = (live.sort(-1).values != recorded.sort(-1).values).any(-1)[one.fed]  # (rows, L)
        routers, tokens = changed.double().mean().item(), changed.any(-1).double().mean().item()
        assert logged(trainer, "routing_replay/changed_router_frac")[one.step + 1] == pytest.approx(routers, abs=1e-6)
        assert logged(trainer, "routing_replay/changed_token_frac")[one.step + 1] == pytest.approx(tokens, abs=1e-6)
        seen.append(routers)
    assert (seen[0] == 0) == (rollout is None or mode == "R2")
    assert 0 < seen[1] < seen[2] or rollout  # the further the weights have moved, the more would change


@pytest.mark.parametrize("every", [1, 2])
def test_metrics_of_one_process_meet_nobody(qwen3, build, every):
    always = {"routing_replay_compare_every": 1, "routing_replay_load_every": 1}
    trainer = build(qwen3(), max_steps=4, logging_steps=every, gradient_accumulation_steps=2, **always)
    sizes, own = [], trainer.accelerator.reduce

    def reduce(tensor, *args, **kwargs):
        sizes.append(tuple(tensor.shape))
        return own(tensor, *args, **kwargs)

    trainer.accelerator.reduce = reduce
    trainer.train()
    assert [size for size in sizes if len(size) == 2] == []
    logged_steps = [entry for entry in trainer.state.log_history if "sampling/live/k3_kl" in entry]
    assert len(logged_steps) == 4 // every
    absent = {*map(agreement_at, AGES[1:]), "routing_replay/shift_weight"}  # no record here is older; not asked for
    assert all(set(SHARES) - absent <= entry.keys() for entry in logged_steps)


class Twin:
    """An accelerator of two processes, of which the other has added the same."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self):
        self.sizes = []

    def reduce(self, tensor, reduction):
        self.sizes.append(tuple(tensor.shape))
        return 2 * tensor


def test_processes_meet_once_a_step_and_never_in_a_log():
    """TRL's `log` may be called on one process only: what it takes has been added up before."""
    twin = Twin()
    log = ReplayLog(twin)
    for _ in range(3):
        log.add("sampling/k3_kl", 1.0, 4.0)
        log.add("routing_replay/agreement", torch.tensor(0.5), 1.0)
    assert log.collect() == {} and twin.sizes == []  # nobody has met yet
    log.meet()
    log.add("sampling/k3_kl", 5.0, 0.0)
    assert log._shared["sampling/k3_kl"].tolist() == [6.0, 24.0]
    assert log.collect() == {"routing_replay/agreement": 0.5, "sampling/k3_kl": 0.25}
    assert log.collect() == {}
    log.meet()
    assert log.collect() == {"sampling/k3_kl": None}
    assert twin.sizes == [(len(SHARES), 2)] * 2
