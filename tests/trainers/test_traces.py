"""Traces of real runs, replayed offline at the weights of their step (property 21), and what they cost a run."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_r3 import R3GRPOConfig, load_trace
from trl_r3.traces.trace_file import find_traces
from trl_r3.traces.trace_replay import verify_trace

OLD_POLICY = {"num_iterations": 2, "max_steps": 3}  # TRL scores the old policy itself
MICRO_BATCHES = {"gradient_accumulation_steps": 2, "max_steps": 2}  # the first update gives its log-probabilities


class Weights(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self):
        self.at = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = copy.deepcopy(model.state_dict())


@pytest.fixture
def traced(train, tmp_path):
    """Trains with traces: the trainer, its traces and the weights of each step."""

    def run(model, **changes):
        weights = Weights()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "tracing ends")
            trainer = train(model, callbacks=[weights], routing_replay_trace_dir=str(tmp_path / "traces"), **changes)
        return trainer, find_traces(tmp_path / "traces"), weights.at

    return run


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


@pytest.mark.parametrize("rollout", ["rounded", "scrambled"])
def test_a_trace_holds_what_the_run_did(qwen3, traced, gap, rollout):
    """Against what was watched from outside: tokens, log-probabilities, routes and load."""
    trainer, paths, _ = traced(
        qwen3(), while_generating=gap[rollout], routing_replay_compare_every=1, max_steps=1, num_iterations=2
    )
    (path,), old = paths, trainer.of("old policy")[0]
    trace, live = load_trace(path), trainer.of("comparison")[0]
    assert trace.facts.mode == "R3" and trace.facts.step == 0 and trace.facts.missing == 0
    routes = trainer.live_routes(old)  # (B, T, L, K)
    load = torch.zeros_like(trace.load_live)
    seen = iter(
        zip(
            trace.samples(),
            *(
                each.split(trace.lengths[:, 1].tolist())
                for each in (trace.train_logprobs, trace.live_logprobs, trace.rollout_logprobs, trace.masks)
            ),
            strict=True,
        )
    )
    for row, (sample, train, compared, rollout, masks) in enumerate(seen):
        watched = trainer.sample_of(old, row)
        start, width = old.prompt_width - sample.prompt_length, len(train)
        assert torch.equal(sample.tokens, old.input_ids[row, start : start + len(sample.tokens)])
        assert torch.equal(train, old.logps[row, :width]) and torch.equal(compared, live.logps[row, :width])
        assert torch.equal(sample.record.long(), watched.rows)
        assert torch.allclose(rollout.double(), watched.logps, atol=1e-5)
        assert masks.eq(3).all()
        for layer in range(load.shape[0]):
            ids = routes[row, start : start + len(sample.record), layer]
            load[layer] += torch.bincount(ids.flatten(), minlength=load.shape[1]).int()
    # a live router behind replayed layers sees other hidden states, so only the first one is that of a live model
    assert torch.equal(trace.load_live[0], load[0])
    assert torch.equal(trace.load_live.sum(1), trace.load_recorded.sum(1))
    recorded = torch.stack(
        [torch.bincount(ids.flatten().long(), minlength=load.shape[1]) for ids in trace.records.unbind(1)]
    )
    assert torch.equal(trace.load_recorded.long(), recorded)
    assert 0 < trace.changed.sum() <= trace.changed.numel() * trace.facts.compared_rows
    changed = float(trace.changed.sum()) / trace.changed.numel() / trace.facts.compared_rows
    assert changed == pytest.approx(trainer.state.log_history[0]["routing_replay/changed_router_frac"], abs=1e-6)


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


def test_a_saved_checkpoint_is_the_model_of_its_step(qwen3, traced, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    _, paths, _ = traced(qwen3(), **run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert verify_trace(model, load_trace(paths[1])).matches
    assert not verify_trace(model, load_trace(paths[0])).matches


def test_adapters(qwen3, traced):
    adapters = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer, paths, weights = traced(qwen3(), peft_config=adapters, **OLD_POLICY)
    trace = load_trace(paths[-1])
    trainer.model.load_state_dict(weights[trace.facts.step])
    assert verify_trace(trainer.model, trace).matches


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "the trace is of a qwen3_moe with config"),
        ({"num_experts": 8}, "Pass the model that was trained, with the weights of step 0"),
    ],
)
def test_another_model_is_refused(qwen3, traced, change, says):
    _, paths, _ = traced(qwen3(), max_steps=1)
    with pytest.raises(ValueError, match=says):
        verify_trace(qwen3(**change), load_trace(paths[0]))


def test_another_dtype_or_attention_is_refused(qwen3, traced):
    _, paths, _ = traced(qwen3(), max_steps=1)
    trace = load_trace(paths[0])
    with pytest.raises(ValueError, match=r"dtype float32, this model has float64. Load the model in this dtype"):
        verify_trace(qwen3().double(), trace)
    model = qwen3()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attention sdpa, this model has eager\. Load the model with `attn_impl"):
        verify_trace(model, trace)


def test_log_probabilities_over_kept_tokens_are_reproduced(qwen3, traced):
    _, paths, weights = traced(qwen3(), use_sampling_mask_replay=True, top_p=0.9, max_steps=1)
    trace, model = load_trace(paths[0]), qwen3()
    model.load_state_dict(weights[0])
    assert int((trace.kept_counts > 0).sum()) > 10
    assert verify_trace(model, trace).matches
    assert not verify_trace(model, replace(trace, kept_ids=None, kept_counts=None)).matches, "nothing was cut"
    assert load_trace(paths[0], with_records=False).kept_ids is None


def test_only_so_many_steps_are_traced(qwen3, traced):
    _, paths, _ = traced(qwen3(), max_steps=5, routing_replay_trace_every=2)
    assert [path.name for path in paths] == [f"step-0000000{step}-rank-00000.safetensors" for step in (0, 2, 4)]


def test_a_full_disk_ends_tracing_and_not_the_run(qwen3, train, tmp_path, gap):
    run = {"while_generating": gap["rounded"], "max_steps": 3}
    traces = tmp_path / "traces"
    traces.mkdir()
    full = traces / "step-00000001-rank-00000.part"
    full.symlink_to("/dev/full")  # a device of Linux whose writes fail as a full disk does
    with pytest.warns(RuntimeWarning, match=r"tracing ends at step 1, the run goes on: .*No space left on device"):
        traced = train(qwen3(), routing_replay_trace_dir=str(traces), **run)
    assert [path.name for path in traces.iterdir()] == ["step-00000000-rank-00000.safetensors"]
    assert traced.losses == train(qwen3(), **run).losses and len(traced.losses) == 3


def test_tracing_changes_no_bit_of_training(qwen3, train, tmp_path, gap):
    plain, traced = qwen3(), qwen3()
    run = {"while_generating": gap["rounded"], "learning_rate": 1e-2, **OLD_POLICY}
    one = train(plain, **run)
    other = train(traced, routing_replay_trace_dir=str(tmp_path / "traces"), **run)
    assert one.losses == other.losses and find_traces(tmp_path / "traces")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"routing_replay_trace_every": 0}, "`routing_replay_trace_every` is 0, but it counts steps"),
        ({"routing_replay_trace_dir": "x", "use_routing_replay": False}, "without replay there are no records"),
    ],
)
def test_bad_settings(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        R3GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{"use_routing_replay": True, **settings})


def test_a_folder_that_cannot_be_made(qwen3, train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`routing_replay_trace_dir` cannot be used: .* Set it to a folder"):
        train(qwen3(), routing_replay_trace_dir=str(tmp_path / "file" / "traces"))
