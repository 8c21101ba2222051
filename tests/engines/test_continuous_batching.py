"""Continuous batching: packed steps of many requests, taken apart again, against plain forwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from engines.tiny_chat import make_trainer
from engines.watch import assert_nothing_missing, assert_replayed, wrong_rows
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState

from trl_r3.engines.continuous_batching import RecordedSteps

# which Transformers 5.17 calls `block_size`
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
SMALL = {
    "num_blocks": 64,
    "max_batch_tokens": 256,
    PAGE_SIZE: 16,
}  # what is left out follows from the memory that is there
PROMPTS = ["t30 t31 t32", "t40", "t50 t51 t52 t53 t54 t55 t56", " ".join(f"t{i}" for i in range(60, 100))]


@pytest.fixture
def steps(monkeypatch):
    """What each step fed: by step, (request, first position, tokens)."""
    seen = []
    own = ContinuousBatchProcessor._generation_step

    def note(processor, model):
        batch = processor.inputs_and_outputs.requests_in_batch
        states = [(each.state, each.query_length) for each in batch]
        seen.append([(s.request_id, s.position_offset - count, count) for s, count in states])
        return own(processor, model)

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", note)
    return seen


def make(tmp_path, prompts=PROMPTS, config=None, **settings):
    defaults = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": config or SMALL,
        "per_device_train_batch_size": 2 * len(prompts),
        "num_generations": 2,
    }
    return make_trainer(tmp_path, Dataset.from_dict({"prompt": prompts}), **{**defaults, **settings})


def assert_rows_are_those_of_a_forward(trainer, updates=2):
    """What was trained on was sampled, and executes what a model without any hooks selects at the same weights."""
    assert len(trainer.updates) == updates
    wrong = pairs = 0
    for one in trainer.updates:
        turn = next(turn for turn in trainer.turns if turn.step == one.step)
        sampled = [(*p, *c) for p, c in zip(turn.prompt_ids, turn.completion_ids, strict=True)]
        assert sorted(sampled) == sorted(tokens for tokens, _ in one.samples())
        for tokens, rows in one.samples():
            wrong += wrong_rows(rows, trainer.live_rows(tokens, turn.weights))
            pairs += rows[..., 0].numel()
    assert wrong == 0, f"{wrong} of {pairs} pairs of row and layer differ"


def test_duplicates_of_a_prompt(tmp_path, steps):
    trainer = make(tmp_path, num_generations=4, per_device_train_batch_size=16)
    trainer.train()
    prompts = [fed for step in steps for fed in step if fed[1] == 0]
    assert len(prompts) == 32, "not every duplicate fed its prompt itself"
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)
    assert all(log["sampling/k3_kl"] < 1e-9 for log in trainer.state.log_history if "sampling/k3_kl" in log)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05, "temperature": 1.3}]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_log_probabilities_are_over_the_whole_vocabulary(tmp_path, sampling, chunked):
    """Those of the engine are over what top-k and its like have kept: at the same weights they look like mismatch."""
    config = {**SMALL, "max_batch_tokens": 16} if chunked else SMALL
    trainer = make(tmp_path, config=config, generation_kwargs=None, **sampling)
    trainer.train()
    logged = [log["sampling/k3_kl"] for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(logged) == 2 and max(logged) < 1e-9


def test_chunked_prefill(tmp_path, steps):
    trainer = make(tmp_path, config={**SMALL, "max_batch_tokens": 16})
    trainer.train()
    assert max(sum(count for _, _, count in step) for step in steps) <= 16
    assert any(start > 0 and count > 1 for step in steps for _, start, count in step), "no prompt was split"
    assert any(len(step) < 8 for step in steps), "all requests fit into every step"
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)


@pytest.fixture
def evicted(monkeypatch):
    """Requests that were evicted."""
    seen = []
    own = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: seen.append(state.request_id) or own(state)
    )
    return seen


NARROW = {"num_blocks": 8, PAGE_SIZE: 8, "max_batch_tokens": 16, "cpu_offload_space": 0.0}
LONG = {"max_completion_length": 24, "generation_kwargs": {"min_new_tokens": 24}}


def test_eviction(tmp_path, evicted):
    trainer = make(
        tmp_path,
        prompts=["t30 t31 t32 t33 t34 t35", "t40 t41 t42 t43", "t50 t51 t52 t53 t54 t55 t56", "t60 t61 t62 t63 t64"],
        config=NARROW,
        **LONG,
    )
    trainer.train()
    assert evicted, "no request was evicted, so this test shows nothing"
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)


SAMPLING = {
    "plain": ({}, 0.0),
    "temperature": ({"temperature": 0.7}, 0.0),
    "top_k": ({"top_k": 5}, 0.2),
    "top_p and temperature": ({"top_p": 0.7, "temperature": 1.3}, 0.2),
    "min_p": ({"min_p": 0.1}, 0.2),
    "top_k with evictions": ({"top_k": 5, "config": NARROW, **LONG}, 0.2),
}


@pytest.mark.parametrize("settings, least_gap", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("slices_logits", [True, False])
def test_log_probabilities_are_those_of_a_forward(tmp_path, monkeypatch, evicted, settings, least_gap, slices_logits):
    """Those of the engine lack the mass of the tokens that truncated sampling drops; it may process in place."""
    process = ContinuousBatchingLogitsProcessorList.__call__

    def in_place(processors, input_ids, scores, *args):
        processed = process(processors, input_ids, scores, *args).clone()
        scores.zero_()
        return processed

    monkeypatch.setattr(ContinuousBatchingLogitsProcessorList, "__call__", in_place)
    monkeypatch.setattr(ModelRunner, "supports_logits_to_keep", lambda *args: slices_logits)
    turns, outputs = [], []

    def one_turn(prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        turn, logprobs = trainer.rollout_turn(prompt_ids)
        turns.append((turn, trainer._weights()))
        tokens = {"prompt_ids": prompt_ids, "completion_ids": turn.completion_ids}
        return {**tokens, "logprobs": logprobs, "routed_experts": turn.records}

    trainer = make(tmp_path, rollout_func=one_turn, **settings)
    trainer.continuous_batching_config.return_logprobs = True
    own = trainer.model.generate_batch
    trainer.model.generate_batch = lambda *args, **kwargs: outputs.append(own(*args, **kwargs)) or outputs[-1]
    trainer.train()
    assert len(turns) == len(outputs) == 2
    assert bool(evicted) == ("config" in settings), "the case itself"
    of_engine, ours, expected = [], [], []
    for (turn, weights), output in zip(turns, outputs, strict=True):
        of_engine += [torch.tensor(each.logprobs) for each in output.values()]
        ours += turn.logprobs
        trainer.pristine.load_state_dict(weights)
        for prompt, completion in zip(turn.prompt_ids, turn.completion_ids, strict=True):
            with torch.no_grad():
                logits = trainer.pristine(torch.tensor([[*prompt, *completion]]), use_cache=False).logits
            logprobs = (logits[0, len(prompt) - 1 : -1] / settings.get("temperature", 1.0)).log_softmax(-1)
            expected.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    assert [len(each) for each in ours] == [len(each) for each in expected]
    torch.testing.assert_close(torch.cat(ours), torch.cat(expected), atol=1e-4, rtol=0)
    gap = (torch.cat(of_engine) - torch.cat(expected)).mean()
    assert gap > least_gap if least_gap else abs(gap) < 1e-4, "the case itself"


def test_the_first_draw_of_a_position_counts():
    batches = RecordedSteps(None)
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 5.0]])
    batches.add_draws([("a", 2), ("b", 1)], torch.tensor([2, 0], dtype=torch.int32), logits)
    batches.add_draws([("a", 2), ("a", 3)], torch.tensor([2, 1], dtype=torch.int32), logits.flip(0))
    output = SimpleNamespace(prompt_ids=[7, 8], generated_tokens=[2, 1])
    torch.testing.assert_close(batches.logprobs("a", output), logits.log_softmax(1)[[0, 0], [2, 1]])
    output.generated_tokens = [2, 0]
    with pytest.raises(RuntimeError, match="a returned token 0 at position 3, but its steps drew 1"):
        batches.logprobs("a", output)
    output.generated_tokens = [2, 1, 1]
    with pytest.raises(RuntimeError, match="a returned token 1 at position 4, but its steps drew None"):
        batches.logprobs("a", output)


def test_records_survive_an_update(tmp_path):
    trainer = make(tmp_path, num_iterations=2, max_steps=4, learning_rate=3e-2)
    trainer.train()
    expected = {
        turn.step: [
            ((*p, *c), trainer.live_rows([*p, *c], turn.weights))
            for p, c in zip(turn.prompt_ids, turn.completion_ids, strict=True)
        ]
        for turn in trainer.turns
    }
    assert list(expected) == [0, 2]
    assert_replayed(trainer, expected)
    last = trainer.updates[-1]
    changed = sum(wrong_rows(rows, trainer.live_rows(tokens, last.weights)) for tokens, rows in last.samples())
    assert changed > 20, "live routing still agrees with the record, so replay shows nothing"


def test_a_dropped_request_is_an_error(tmp_path, monkeypatch):
    own, batches = ContinuousBatchProcessor.prepare_next_batch, []

    def fail_one(processor):
        batches.append(1)
        if len(batches) == 4:
            state = next(iter(processor.scheduler.active_requests.values()))
            processor._handle_request_error(MemoryError("out of blocks"), state)
            processor.scheduler.finish_request(state.request_id)
        return own(processor)

    monkeypatch.setattr(ContinuousBatchProcessor, "prepare_next_batch", fail_one)
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match=r"returned 7 of 8 requests; req_\d+ failed with: out of blocks"):
        trainer.train()


def test_a_crash_of_the_batch_is_an_error(tmp_path, monkeypatch):
    def crash(processor, model):
        raise MemoryError("out of blocks")

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", crash)
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match="returned 0 of 8 requests"):
        trainer.train()


def test_the_trainer_sets_what_recording_needs(tmp_path):
    trainer = make(tmp_path, config={"use_async_batching": True, "use_cuda_graph": True, "allow_block_sharing": True})
    config = trainer.continuous_batching_config
    assert not (config.allow_block_sharing or config.use_async_batching or config.use_cuda_graph)
    assert config.varlen_compile_config is None and config.decode_compile_config is None
    untouched = make(tmp_path, config={"allow_block_sharing": True}, use_routing_replay=False)
    assert untouched.continuous_batching_config.allow_block_sharing


def test_block_sharing_is_noticed(tmp_path):
    """Were a prompt served from the cache, its rows would be absent: an error, not a shift."""
    config = {**SMALL, "max_batch_tokens": 48}  # one prompt a step
    trainer = make(tmp_path, prompts=[PROMPTS[3]], config=config, per_device_train_batch_size=4, num_generations=4)
    trainer.continuous_batching_config.allow_block_sharing = True
    with pytest.raises(RuntimeError, match="only .* tokens of it were routed: it shares cache blocks"):
        trainer.train()
