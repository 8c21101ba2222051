"""Traces of real runs, replayed offline at the weights of their step, bit for bit."""

from dataclasses import replace

import pytest
import torch
from model_zoo import build_tiny
from peft import LoraConfig
from trainers.runs import OLD_POLICY
from trainers.watching import VOCAB
from transformers import AutoModelForCausalLM

from trl_r3 import load_trace
from trl_r3.routers.router import Router
from trl_r3.traces import trace_replay
from trl_r3.traces.trace_replay import verify_trace

MICRO_BATCHES = {"gradient_accumulation_steps": 2, "max_steps": 2}  # the first update gives its log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("updates", [OLD_POLICY, MICRO_BATCHES, {**OLD_POLICY, "routing_replay_mode": "R2"}])
def test_every_step_is_reproduced_bit_for_bit(qwen3, traced, gap, updates, dtype):
    model = qwen3().to(dtype)
    trainer, paths, weights = traced(
        model, while_generating=gap["rounded"], learning_rate=1e-2, routing_replay_compare_every=1, **updates
    )
    assert [load_trace(path).facts.step for path in paths] == sorted({one.step for one in trainer.of("update")})[
        :: updates.get("num_iterations", 1)
    ]
    other = qwen3(seed=1).to(dtype)
    for path in paths:
        trace = load_trace(path)
        other.load_state_dict(weights[trace.facts.step])
        before = {name: module.__dict__.copy() for name, module in other.named_modules()}
        found = verify_trace(other, trace)
        assert found.matches, str(found)
        assert found.tokens == len(trace.train_logprobs) > 0
        assert {name: module.__dict__ for name, module in other.named_modules()} == before
    # the same numbers must be out of reach without the records, and at other weights
    live = trace.live_logprobs
    assert updates.get("routing_replay_mode") == "R2" or not torch.equal(live, trace.train_logprobs)
    other.load_state_dict(weights[0])
    assert not verify_trace(other, trace).matches


def test_autocast_temperature_and_head_are_those_of_the_trace(qwen3, traced, gap):
    _, paths, weights = traced(
        qwen3(), while_generating=gap["rounded"], bf16=True, temperature=0.7, cast_lm_head_to_fp32=True, **OLD_POLICY
    )
    trace, other = load_trace(paths[-1]), qwen3(seed=1)
    assert (trace.facts.autocast, trace.facts.temperature, trace.facts.float32_head) == ("bfloat16", 0.7, True)
    other.load_state_dict(weights[trace.facts.step])
    found = verify_trace(other, trace)
    assert found.matches, str(found)


def test_the_op_gates_as_in_the_run(qwen3, traced, gap):
    """Its forward tells only whether selections differ, so live ids are asked for beside it."""
    _, paths, weights = traced(qwen3(), while_generating=gap["rounded"], routing_replay_gating="op", **MICRO_BATCHES)
    trace, other = load_trace(paths[-1]), qwen3(seed=1)
    assert trace.facts.gating == "op" and trace.load_live.sum() == trace.load_recorded.sum() > 0
    other.load_state_dict(weights[trace.facts.step])
    assert verify_trace(other, trace).matches


EAGER = {"attn_implementation": "eager"}
OF_R2 = {**OLD_POLICY, "routing_replay_mode": "R2"}


@pytest.mark.parametrize(
    ("updates", "attention", "mode"),
    [
        (OLD_POLICY, {}, "all"),
        (MICRO_BATCHES, {}, "all"),
        ({**OLD_POLICY, "mask_truncated_completions": True}, {}, "all"),
        (OLD_POLICY, EAGER, "experts, columns"),
        (OF_R2, {}, "none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_skipped_as_in_the_run(qwen3, traced, gap, updates, attention, mode, dtype):
    run = {"while_generating": gap["rounded"], "learning_rate": 1e-2, "max_completion_length": 12, **updates}
    _, paths, weights = traced(qwen3(**attention).to(dtype), routing_replay_padding="auto", **run)
    trace, other = load_trace(paths[-1]), qwen3(seed=1, **attention).to(dtype)
    assert trace.facts.padding == mode and (trace.lengths[:, 1] < trace.lengths[:, 1].max()).any()
    other.load_state_dict(weights[trace.facts.step])
    found = verify_trace(other, trace)
    assert found.matches, str(found)
    if dtype == torch.float32 and mode == "all":  # other bits, or nothing would have been held
        assert not verify_trace(other, replace(trace, facts=replace(trace.facts, padding="none"))).matches


def test_a_model_that_skips_padding_otherwise_is_refused(qwen3, traced):
    _, paths, weights = traced(qwen3(), routing_replay_padding="auto", max_steps=1)
    trace, model = load_trace(paths[0]), qwen3()
    text = "padding was skipped by 'experts' of the layers, in this model it is by 'all' \\(skipped\\)"
    with pytest.raises(ValueError, match=text):
        verify_trace(model, replace(trace, facts=replace(trace.facts, padding="experts")))


def test_a_saved_checkpoint_is_the_model_of_its_step(qwen3, traced, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    _, paths, _ = traced(qwen3(), **run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert verify_trace(model, load_trace(paths[1])).matches
    assert not verify_trace(model, load_trace(paths[0])).matches


def test_the_op_gates_under_autocast(qwen3, traced, gap, monkeypatch):
    """In the dtypes of the run: attached before autocast is entered, routers would gate by their own code."""
    run = {"routing_replay_gating": "op", "bf16": True, **MICRO_BATCHES}
    _, paths, weights = traced(qwen3(), while_generating=gap["rounded"], **run)
    trace, model = load_trace(paths[0]), qwen3()
    model.load_state_dict(weights[trace.facts.step])
    assert (trace.facts.gating, trace.facts.autocast) == ("op", "bfloat16")
    intercepted, intercept, scored = [], Router.replay, trace_replay._scored

    def note(self, *args):
        intercepted.append(self.name)
        return intercept(self, *args)

    def score(*args):
        intercepted.clear()  # what attaching has compared
        return scored(*args)

    monkeypatch.setattr(Router, "replay", note)
    monkeypatch.setattr(trace_replay, "_scored", score)
    assert verify_trace(model, trace).matches
    assert not intercepted


def test_adapters(qwen3, traced):
    adapters = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer, paths, weights = traced(qwen3(), peft_config=adapters, **OLD_POLICY)
    trace = load_trace(paths[-1])
    trainer.model.load_state_dict(weights[trace.facts.step])
    assert verify_trace(trainer.model, trace).matches


REMEDIES = {"lora_dropout": "in .*lora_dropout.*`disable_dropout=True`", "attention_dropout": "`attention_dropout=0"}


@pytest.mark.parametrize("where", REMEDIES)
def test_dropout_is_named(qwen3, traced, where):
    """Or verification would ask for other weights."""
    rates = {"lora_dropout": 0.0, "attention_dropout": 0.0, where: 0.1}
    adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=rates["lora_dropout"])
    trainer, (path, *_), _ = traced(qwen3(attention_dropout=rates["attention_dropout"]), peft_config=adapter)
    with pytest.raises(ValueError, match="dropped values out at random.*" + REMEDIES[where]):
        verify_trace(trainer.model, load_trace(path))


NOISES = {
    "neftune_noise_alpha": "embed_tokens.*`neftune_noise_alpha=None`",
    "router_jitter_noise": "mlp.*`router_jitter",
}


@pytest.mark.parametrize("where", NOISES)
def test_noise_is_named(qwen3, traced, where):
    if where == "neftune_noise_alpha":
        trainer, (path, *_), _ = traced(qwen3(), neftune_noise_alpha=5.0)
    else:
        trainer, (path, *_), _ = traced(build_tiny("mixtral", vocab_size=VOCAB, router_jitter_noise=0.1))
    with pytest.raises(ValueError, match="added noise at random, in .*" + NOISES[where]):
        verify_trace(trainer.model, load_trace(path))


def test_threads_are_those_of_the_trace(qwen3, traced, monkeypatch):
    _, paths, weights = traced(qwen3(), max_steps=1)
    trace, asked = load_trace(paths[0]), []
    model = qwen3()
    model.load_state_dict(weights[0])
    own = torch.get_num_threads()
    model.register_forward_pre_hook(lambda *call: asked.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    assert trace.facts.threads == own == 1
    assert verify_trace(model, trace).matches
    assert asked and set(asked) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(own)


def test_log_probabilities_over_kept_tokens_are_reproduced(qwen3, traced):
    _, paths, weights = traced(qwen3(), use_sampling_mask_replay=True, top_p=0.9, max_steps=1)
    trace, model = load_trace(paths[0]), qwen3()
    model.load_state_dict(weights[0])
    assert int((trace.kept_counts > 0).sum()) > 10
    assert verify_trace(model, trace).matches
    assert not verify_trace(model, replace(trace, kept_ids=None, kept_counts=None)).matches, "nothing was cut"
    assert load_trace(paths[0], with_records=False).kept_ids is None
