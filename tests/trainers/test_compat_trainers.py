"""Quirks of what trainers train with: what is changed is given back, also after an error."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from model_zoo import build_tiny
from torch import nn
from trainers.watching import EOS, PAD
from trl import GRPOTrainer
from trl.experimental.async_grpo import async_grpo_trainer

from trl_r3.trainers._compat_trainers import attending_plainly, refuse_second_training, stopping_if_alive


def test_attention_is_plain_inside_and_what_it_was_behind():
    """Parts of a model have configs of their own, which may name another attention."""
    text, whole = build_tiny("qwen3_moe"), build_tiny("mixtral")
    text.config._attn_implementation, whole.config._attn_implementation = "flex_attention", "sdpa"
    model = nn.ModuleList([whole, text])
    with pytest.raises(KeyError), attending_plainly(model):
        assert (text.config._attn_implementation, whole.config._attn_implementation) == ("eager", "eager")
        assert text(torch.arange(2, 8)[None]).logits.isfinite().all()
        raise KeyError
    assert (text.config._attn_implementation, whole.config._attn_implementation) == ("flex_attention", "sdpa")


@pytest.mark.parametrize("process", [None, True, False])
def test_a_dead_process_is_not_waited_for(process):
    class Worker:
        _process = None if process is None else SimpleNamespace(is_alive=lambda: process)

        def stop(self):
            self.waited = self._process is not None

    worker = Worker()
    with stopping_if_alive(worker):
        worker.stop()
    assert worker.waited is (process is True) and "stop" not in vars(worker)
    worker.stop()
    assert worker.waited is (process is True)


def test_trl_starts_its_rollouts_once():
    """Where it starts them in each training, the refusal can go."""
    started = []
    worker = SimpleNamespace(start=lambda: started.append(worker))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True), weight_transfer=None, rollout_worker=worker
    )
    trainer._sync_weight = lambda: None
    callback = async_grpo_trainer._TrainBeginCallback(trainer)
    for _ in range(2):
        callback.on_train_begin(None, None, None)
    assert len(started) == 1
    refuse_second_training(False)
    with pytest.raises(RuntimeError, match="Construct another trainer"):
        refuse_second_training(True)


@pytest.mark.parametrize(("given", "unknown"), [(40, "[40]"), ([EOS, 40, 41], "[40, 41]")])
@pytest.mark.parametrize("masks", [False, True])
def test_ends_that_trl_does_not_cut_at_are_told(qwen3, build, given, unknown, masks):
    changes = {"use_routing_replay": not masks, "use_sampling_mask_replay": masks}
    with pytest.warns(match=re.escape(f"at tokens {unknown}, but TRL cuts them at [{EOS}], and")):
        build(qwen3(), generation_kwargs={"eos_token_id": given}, **changes)
    model = qwen3()
    model.generation_config.eos_token_id = given
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*TRL cuts them at")
        build(model, generation_kwargs={"eos_token_id": given}, **changes)


def test_padding_behind_such_an_end_is_trained_on_by_trl(qwen3, train):
    """What is told of above: rows behind the end, which TRL counts."""
    ends = [*range(40, 70)]
    trainer = train(
        qwen3(), trainer_class=GRPOTrainer, use_routing_replay=False, generation_kwargs={"eos_token_id": ends}
    )
    rollouts = [list(tokens)[sample.prompt_length :] for tokens, sample in trainer.rollouts[True].items()]
    assert any(first in ends and second == PAD for tokens in rollouts for first, second in pairwise(tokens))
