"""Replay under every setting of TRL's GRPO, and no trace of it where it is off."""

import math
import re

import pytest
import torch
from trainers.watching import same_sets
from trl import GRPOConfig, GRPOTrainer

from trl_r3 import R3GRPOTrainer

PAD, EOS = 0, 1
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]  # in the order of their documentation
SETTINGS = {
    **{f"{loss}, token": {"loss_type": loss} for loss in LOSSES if loss != "luspo"},
    **{
        f"{loss}, sequence": {"loss_type": loss, "importance_sampling_level": "sequence"}
        for loss in LOSSES
        if loss != "vespo"
    },
    "two iterations": {"num_iterations": 2},
    "two steps a rollout": {"steps_per_generation": 2},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated, iterated": {"gradient_accumulation_steps": 2, "num_iterations": 2},
    "accumulated across rollouts": {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "max_steps": 4},
    "one sample a forward": {"per_device_train_batch_size": 1, "steps_per_generation": 4},
    "padded to eights": {"pad_to_multiple_of": 8},
    "padded to sevens, iterated": {"pad_to_multiple_of": 7, "num_iterations": 2},
    "truncated completions masked": {"mask_truncated_completions": True},
    "truncated completions masked, iterated": {"mask_truncated_completions": True, "num_iterations": 2},
    "one token": {"max_completion_length": 1},
    "auxiliary loss": {"router_aux_loss_coef": 0.1},
    "no auxiliary loss": {"router_aux_loss_coef": 0.0},
    "bf16": {"bf16": True},
    "compared": {"routing_replay_compare_every": 1},
    "entropy": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "lm head in float32": {"cast_lm_head_to_fp32": True},
    "sampling": {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
    "greedy": {"generation_kwargs": {"do_sample": False, "suppress_tokens": [PAD]}},
    "static cache": {"generation_kwargs": {"cache_implementation": "static", "suppress_tokens": [PAD]}},
    "chunked prefill": {"generation_kwargs": {"prefill_chunk_size": 2, "suppress_tokens": [PAD]}},
    "padding is sampled": {"generation_kwargs": {"sequence_bias": {(PAD,): 4.0}}},
    "ends at once": {"generation_kwargs": {"sequence_bias": [[[EOS], 30.0]], "suppress_tokens": [PAD]}},
    "no shuffling": {"shuffle_dataset": False},
}


def assert_replayed(trainer, check, mode):
    updates = trainer.of("update")
    for one in updates:
        assert one.executed.shape[:2] == one.input_ids.shape
        if mode == "R3":
            check.replayed(one)
    entries = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    assert entries
    for entry in entries:
        assert entry["routing_replay/replayed_frac"] == 1.0
        assert entry["routing_replay/missing_frac"] == 0.0
        assert math.isfinite(entry["loss"])
        assert math.isfinite(entry["grad_norm"])
    assert len(entries) == trainer.state.global_step


@pytest.mark.parametrize("setting", SETTINGS)
def test_r3(qwen3, train, check, gap, setting):
    trainer = train(qwen3(), **{"while_generating": gap["scrambled"], **SETTINGS[setting]})
    assert_replayed(trainer, check, "R3")
    if setting != "bf16":  # a model of its own has no autocast
        for one in trainer.of("update"):
            check.drifted(trainer, one)


@pytest.mark.parametrize(
    "setting", [name for name in SETTINGS if "," not in name or not name.startswith(tuple(LOSSES[1:]))]
)
def test_r2(qwen3, train, check, gap, setting):
    changes = {"num_iterations": 2, **SETTINGS[setting]}
    if changes.get("gradient_accumulation_steps") == 2 and changes["num_iterations"] == 2:
        changes["num_iterations"] = 3  # or TRL has no old policy
    trainer = train(qwen3(), routing_replay_mode="R2", while_generating=gap["scrambled"], **changes)
    assert_replayed(trainer, check, "R2")
    olds, recorded = 0, {}
    for one in trainer.passes:
        if one.name == "old policy":
            olds, recorded = olds + 1, dict(zip(map(tuple, one.input_ids.tolist()), one.executed, strict=True))
        elif one.name == "update":
            expected = torch.stack([recorded[tuple(tokens)] for tokens in one.input_ids.tolist()])
            assert same_sets(one.executed[one.fed], expected[one.fed])
    assert olds


OFF = [
    "dapo, token",
    "grpo, sequence",
    "accumulated, iterated",
    "accumulated across rollouts",
    "padded to sevens, iterated",
    "truncated completions masked",
    "bf16",
    "entropy",
]


@pytest.mark.parametrize("setting", OFF)
def test_off_is_trl(qwen3, train, setting):
    """Losses and final weights to the last bit, gradient norms and whatever else TRL logs."""
    runs = [
        train(qwen3(), trainer_class=trainer_class, use_routing_replay=False, **{"max_steps": 3, **SETTINGS[setting]})
        for trainer_class in (R3GRPOTrainer, GRPOTrainer)
    ]
    ours, trls = runs
    assert ours.losses == trls.losses
    assert numbers(ours) == numbers(trls)
    weights = trls.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ours.model.state_dict().items())


def numbers(trainer):
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{name: value for name, value in entry.items() if name not in timed} for entry in trainer.state.log_history]


def test_replay_is_what_differs(qwen3, train, gap):
    """The test above compares equal runs. With a gap and replay on, the same comparison sees the difference."""
    runs = [
        train(qwen3(), trainer_class=trainer_class, while_generating=gap["scrambled"], use_routing_replay=replay)
        for trainer_class, replay in ((R3GRPOTrainer, True), (GRPOTrainer, False))
    ]
    assert runs[0].losses != runs[1].losses
    weights = runs[1].model.state_dict()
    assert not all(torch.equal(value, weights[name]) for name, value in runs[0].model.state_dict().items())


def test_replay_leaves_the_rollout_alone(qwen3, train):
    """Recording consumes no randomness and changes no token: the first rollout is that of TRL."""
    rollouts = [
        sorted(train(qwen3(), trainer_class=trainer_class, use_routing_replay=replay, max_steps=1).rollouts[True])
        for trainer_class, replay in ((R3GRPOTrainer, True), (GRPOTrainer, False))
    ]
    assert rollouts[0] == rollouts[1]


def test_on_policy_steps_without_a_gap_are_those_of_trl(qwen3, train):
    """Own routes replayed in the first update: the loss and the gradient are those of live routing, bit for bit."""
    runs = [
        train(
            qwen3(), trainer_class=trainer_class, max_steps=1, use_routing_replay=replay, routing_replay_padding="keep"
        )
        for trainer_class, replay in ((R3GRPOTrainer, True), (GRPOTrainer, False))
    ]
    assert runs[0].losses == runs[1].losses
    norms = [run.state.log_history[0]["grad_norm"] for run in runs]
    assert norms[0] == norms[1]
    weights = runs[1].model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in runs[0].model.state_dict().items())


def test_every_loss_of_trl_is_in_the_matrix():
    described = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    supported = re.search(r"Supported values are ([^.]*)\.", described).group(1)
    assert re.findall(r"'(\w+)'", supported) == LOSSES
