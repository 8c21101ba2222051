"""Trainings whose layers see real tokens only: the numbers of padded ones, with fewer rows."""

import copy
import logging

import pytest
import torch
from counted_reads import CountedReads
from peft import LoraConfig
from trainers.runs import CHECKPOINTING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_r3.cli.experts import watched_experts
from trl_r3.records.real_tokens import RealTokens

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


READING = {
    "updates and an old policy in two parts": {"num_iterations": 2, "per_device_train_batch_size": 4},
    "recomputed": CHECKPOINTING["non_reentrant"],
    "truncated": {"mask_truncated_completions": True},
}


def reads_of(build, model, padding, monkeypatch, **changes):
    """How often each pass asked for values of the mask on the host, and of what follows from it."""
    trainer, reads = build(model, routing_replay_padding=padding, **{**RUN, "max_steps": 2, **changes}), []
    score = type(trainer)._get_per_token_logps_and_entropies

    def counted(self, model, ids, mask, *args, **kwargs):
        with CountedReads.counted() as noted:
            scored = score(self, model, ids, mask.as_subclass(CountedReads), *args, **kwargs)
        reads.append(len(noted))
        return tuple(None if each is None else each.as_subclass(torch.Tensor) for each in scored)

    monkeypatch.setattr(type(trainer), "_get_per_token_logps_and_entropies", counted)
    torch.manual_seed(0)
    trainer.train()
    return reads


@pytest.mark.parametrize("changes", READING.values(), ids=READING)
def test_skipping_padding_waits_no_more_often(qwen3, build, gap, monkeypatch, changes):
    changes = {"while_generating": gap["scrambled"], **changes}
    reads = {padding: reads_of(build, qwen3(), padding, monkeypatch, **changes) for padding in ("keep", "auto")}
    assert len(reads["auto"]) == len(reads["keep"]) >= 2
    # Transformers reads a mask to see whether it can do without
    assert all(one <= other for one, other in zip(reads["auto"], reads["keep"], strict=True)), reads
    monkeypatch.setattr(RealTokens, "_first_row", lambda self, mask: None)  # the wrong variant
    assert sum(reads_of(build, qwen3(), "auto", monkeypatch, **changes)) > sum(reads["auto"])


TRIMMED = "(columns behind all sequences are trimmed)"
SAID = {
    "sdpa": (logging.INFO, "skipped"),
    "eager": (
        logging.WARNING,
        f"skipped by experts only: its attention is 'eager', and only 'sdpa' is packed {TRIMMED}",
    ),
    "flash_attention_2": (
        logging.WARNING,
        f"skipped by experts only: its attention is 'flash_attention_2', and only 'sdpa' is packed {TRIMMED}",
    ),
}


@pytest.mark.parametrize("attention", SAID)
def test_the_log_says_once_what_is_done_and_why_not_more(qwen3, build, caplog, monkeypatch, attention):
    if attention == "flash_attention_2":  # whose kernels need a GPU: the model runs another function by its name
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            monkeypatch.setitem(registry._global_mapping, attention, registry["sdpa"])
    model = qwen3()
    model.config._attn_implementation = attention
    level, text = SAID[attention]
    with caplog.at_level(logging.INFO, "trl_r3"):
        build(model, routing_replay_padding="auto", **RUN).train()
    said = [(record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("trl_r3")]
    assert said == [(level, f"in routing replay, padding is {text}")]


def test_whoever_watches_experts_sees_the_rows_of_the_batch(qwen3, build, gap):
    """By default. The update through other experts than live ones is that of the padded run, bit for bit."""
    found = {}
    for padding in ("keep", "auto"):
        changes = {"while_generating": gap["scrambled"], "max_steps": 2}
        trainer = build(qwen3(), **RUN | changes, **({"routing_replay_padding": padding} if padding == "keep" else {}))
        rows = []
        experts = trainer.model.model.layers[-1].mlp.experts
        experts.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        torch.manual_seed(0)
        trainer.train()
        found[padding] = trainer.losses, rows, trainer.model.state_dict()
    assert trainer.args.routing_replay_padding == "auto"
    whole = found["keep"][1][2:]  # without what attaching tries
    assert found["auto"][1][-len(whole) :] == whole
    assert found["auto"][0] == found["keep"][0]
    torch.testing.assert_close(found["auto"][2], found["keep"][2], rtol=0, atol=0)
