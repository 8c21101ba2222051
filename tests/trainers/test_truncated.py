"""`mask_truncated_completions`: TRL hides completions that were cut from the attention, so their rows see other tokens
than the rollout did. They are not in the loss, and nothing is judged or reported by them."""

import pytest
import torch
from trainers.watching import EOS, PAD

from trl_r3 import load_trace, stitch
from trl_r3.trainers import lifecycle, session

LONG = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 48,
    "mask_truncated_completions": True,
}


def own_records(prompts, trainer):
    """Records of a `rollout_func`, which the alarm judges."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    turn, logprobs = trainer.rollout_turn(prompt_ids)
    routes = stitch([turn], prompt_ids, turn.completion_ids, trainer.routing_replay.layout).records
    logprobs = logprobs or [[0.0] * len(ids) for ids in turn.completion_ids]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": turn.completion_ids,
        "logprobs": logprobs,
        "routed_experts": routes,
    }


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("rollout_func", [None, own_records], ids=["generate", "rollout_func"])
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["update first", "old policy first"])
def test_agreement_is_that_of_right_records(qwen3, build, changes, rollout_func, tmp_path):
    trainer = build(
        qwen3(), rollout_func=rollout_func, routing_replay_trace_dir=tmp_path / "traces", **LONG, **changes
    )
    trainer.train()
    cut = logged(trainer, "completions/clipped_ratio")
    assert min(cut) > 0 and max(cut) < 1
    assert logged(trainer, "routing_replay/agreement")[0] > 0.99  # at the first rollout's own weights
    assert logged(trainer, "routing_replay/missing_frac")[0] == 0
    trace = load_trace(min((tmp_path / "traces").iterdir()))
    assert torch.equal(trace.load_live, trace.load_recorded) and not trace.changed.any()


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["update first", "old policy first"])
def test_the_rows_that_were_cut_would_be_judged_wrong(qwen3, build, monkeypatch, changes):
    for module in (lifecycle, session):
        monkeypatch.setattr(module, "note_rows_that_matter", lambda samples, mask: None)
    trainer = build(qwen3(), **LONG, **changes)
    trainer.train()
    assert logged(trainer, "routing_replay/agreement")[0] < 0.9


def test_a_rollout_of_cut_completions_only_says_nothing(qwen3, build):
    never = {"generation_kwargs": {"suppress_tokens": [PAD, EOS]}}
    trainer = build(qwen3(), rollout_func=own_records, **LONG, **never)
    trainer.train()
    assert set(logged(trainer, "completions/clipped_ratio")) == {1.0}
    assert not logged(trainer, "routing_replay/agreement")
    assert trainer.state.global_step == 2
