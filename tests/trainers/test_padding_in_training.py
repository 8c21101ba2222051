"""Trainings whose layers see real tokens only: the numbers of padded ones, with fewer rows."""

import copy

import pytest
import torch
from peft import LoraConfig
from trainers.runs import CHECKPOINTING

from trl_r3.cli.experts import watched_experts

RUN = {"max_steps": 3, "learning_rate": 1e-2, "max_completion_length": 12, "per_device_train_batch_size": 8}
ON_EXPERTS = {
    "r": 4,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "lora_dropout": 0.0,
}
SETTINGS = {
    "new": {},
    "old policy": {"num_iterations": 2},
    "R2": {"num_iterations": 2, "routing_replay_mode": "R2"},
    "compared": {"routing_replay_compare_every": 1},
    "masks": {"use_sampling_mask_replay": True, "top_p": 0.8},
    "truncated": {"mask_truncated_completions": True},
    "op": {"routing_replay_gating": "op"},
    "experts' adapters": {"peft_config": ON_EXPERTS},
    **{f"{name} checkpoints": kwargs for name, kwargs in CHECKPOINTING.items()},
}
REPLAYED = "routing_replay/replayed_frac"
NOT_COMPARED = ("runtime", "per_second", "step_time", "epoch")


def trained(build, model, padding, **changes):
    """A trainer, and how many rows its experts saw in each call of the updates."""
    if "peft_config" in changes:
        changes["peft_config"] = LoraConfig(**changes["peft_config"])
    trainer = build(model, routing_replay_padding=padding, **RUN, **changes)
    rows = []
    compute_loss = trainer._compute_loss

    def watched(*args, **kwargs):
        with watched_experts(trainer.model, lambda layer, ids: rows.append(len(ids))):
            return compute_loss(*args, **kwargs)

    trainer._compute_loss = watched
    torch.manual_seed(0)
    trainer.train()
    return trainer, rows


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_the_numbers_are_those_of_the_padded_run(qwen3, build, gap, changes):
    model, changes = qwen3(), {"while_generating": gap["scrambled"], **changes}
    padded, all_rows = trained(build, copy.deepcopy(model), "keep", **changes)
    packed, real_rows = trained(build, model, "auto", **changes)
    assert len(real_rows) == len(all_rows) and sum(real_rows) < 0.9 * sum(all_rows), "there was no padding to skip"
    assert packed.losses == pytest.approx(padded.losses, abs=1e-5)
    for one, other in zip(packed.state.log_history, padded.state.log_history, strict=True):
        names = [n for n in other if other[n] is not None and not any(part in n for part in NOT_COMPARED)]
        assert {name: one[name] for name in names} == pytest.approx(
            {name: other[name] for name in names}, rel=1e-4, abs=1e-5, nan_ok=True
        )
    weights = padded.model.state_dict()
    for name, value in packed.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-4)  # Adam divides by small gradients
    log = [entry[REPLAYED] for entry in packed.state.log_history if REPLAYED in entry]
    assert set(log) <= ({1, None} if "mask_truncated_completions" in changes else {1})


def test_padding_is_kept_while_traces_are_written(qwen3, build, tmp_path):
    """A trace is replayed bit for bit, by padded forwards."""
    from transformers import TrainerCallback

    seen = []

    class Why(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(str(trainer.routing_replay.padding))

    for folder in (None, str(tmp_path / "traces")):
        trainer = build(
            qwen3(), routing_replay_padding="auto", routing_replay_trace_dir=folder, callbacks=[Why()], max_steps=1
        )
        trainer.train()
    assert seen == ["skipped", "None"]
