"""Ordinary things that users' code does around a trainer: none switches replay off, or moves a record, in silence."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from model_zoo import build_tiny
from peft import LoraConfig, TrainableTokensConfig
from torch import nn
from trainers.watching import PROMPTS, make_tokenizer, same_sets
from transformers import ProcessorMixin

from trl_r3 import MisalignedRecordError, R3GRPOTrainer


def assert_updates_replay(trainer, check):
    # the watch names them by the mode that the model is in
    updates = [one for one in trainer.passes if one.name.endswith("update")]
    assert updates
    for one in updates:
        check.replayed(one)
        check.drifted(trainer, one)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# The mode that somebody leaves the policy in


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
def test_reward_that_leaves_the_policy_in_evaluation_mode(qwen3, train, check, gap, changes):
    policy = qwen3()

    def judged(completions, **kwargs):
        policy.eval()
        with torch.no_grad():
            policy(input_ids=torch.tensor([[5, 6, 7]]))
        return [float(len(set(text))) for text in completions]

    trainer = train(policy, reward=judged, while_generating=gap["scrambled"], **changes)
    assert_updates_replay(trainer, check)
    assert set(logged(trainer, "routing_replay/replayed_frac")) == {1.0}


class Calm(R3GRPOTrainer):
    """No dropout while sampling."""

    def _generate_single_turn(self, *args, **kwargs):
        self.model.eval()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train()


def test_subclass_that_samples_in_evaluation_mode(qwen3, train, check, gap):
    assert_updates_replay(train(qwen3(), trainer_class=Calm, while_generating=gap["scrambled"]), check)


# Batches that a subclass indexes


def indexed(batch, order, leave=()):
    size = len(batch["completion_ids"])
    return {
        name: value[order]
        if torch.is_tensor(value) and value.ndim and len(value) == size and name not in leave
        else value
        for name, value in batch.items()
    }


ORDERS = {"reversed": [3, 2, 1, 0], "repeated": [0, 0, 2, 2], "dropped": [1, 3]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}])
def test_records_follow_the_tensors_of_a_batch(qwen3, train, check, gap, order, changes):
    class Indexing(R3GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return indexed(super()._generate_and_score_completions(inputs), order)

    trainer = train(qwen3(), trainer_class=Indexing, while_generating=gap["scrambled"], **changes)
    assert all(len(one.input_ids) == len(order) for one in trainer.of("update"))
    assert_updates_replay(trainer, check)


def test_identities_that_stay_behind_are_an_error(qwen3, build, gap):
    class Indexing(R3GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return indexed(super()._generate_and_score_completions(inputs), [3, 2, 1, 0], leave=["rollout_samples"])

    trainer = build(qwen3(), trainer_class=Indexing)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        MisalignedRecordError, match="tokens of the batch differ from those that its record was made for"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("change", ["edited", "stale", "lost"])
def test_batches_of_unknown_records_are_an_error(qwen3, build, change):
    class Changing(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            inputs = dict(inputs)
            if change == "edited":
                inputs["completion_ids"] = inputs["completion_ids"].roll(1, 1)
            elif change == "stale":
                inputs["rollout_samples"] = inputs["rollout_samples"] - 4
            else:
                del inputs["rollout_samples"]
            return super()._compute_loss(model, inputs)

    words = {"edited": "tokens of the batch differ", "stale": "names sample", "lost": "has no `rollout_samples`"}
    with pytest.raises(RuntimeError, match=words[change]):
        build(qwen3(), trainer_class=Changing).train()


# Losses of one's own


class OwnLoss(R3GRPOTrainer):
    """Scores the policy itself, as TRL's documentation invites."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().logsumexp(-1).mean()


def test_loss_of_ones_own_that_routes_live_is_an_error(qwen3, build):
    with pytest.raises(RuntimeError, match=r"builds a graph in a training step, but replays nothing.*live_routing"):
        build(qwen3(), trainer_class=OwnLoss).train()


class OwnScores(R3GRPOTrainer):
    """Asks the trainer for scores and nothing else of it, whichever of its two methods is overridden."""

    override = "_compute_loss"

    def own_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        scored = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        return -(scored[0] * inputs["advantages"][:, None] * inputs["completion_mask"]).sum()

    def _compute_loss(self, model, inputs):
        own = self.override == "_compute_loss" or not self.model.training
        return self.own_loss(model, inputs) if own else super()._compute_loss(model, inputs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        own = self.override == "compute_loss"
        return self.own_loss(model, inputs) if own else super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("override", ["_compute_loss", "compute_loss"])
def test_loss_of_ones_own_that_scores_through_the_trainer(qwen3, train, check, gap, override):
    own = type("Own", (OwnScores,), {"override": override})
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Dataset.from_dict({"prompt": PROMPTS})}
    trainer = train(qwen3(), trainer_class=own, while_generating=gap["scrambled"], num_iterations=2, **evaluates)
    updates = trainer.of("comparison")  # a pass outside of what the watch knows
    assert len(updates) == 2
    for one in updates:
        check.replayed(one)
        check.drifted(trainer, one)
    for one in trainer.of("evaluation comparison"):
        check.live(trainer, one)
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]


def test_scores_before_the_step_has_its_batch_are_live(qwen3, train, check, gap):
    class Looking(R3GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].size(1))
            return batch

    trainer = train(qwen3(), trainer_class=Looking, while_generating=gap["scrambled"])
    for one in trainer.of("comparison"):
        check.live(trainer, one)
    assert_updates_replay(trainer, check)


def test_slice_of_the_batch_in_a_loss_of_ones_own(qwen3, build):
    class Sliced(OwnScores):
        def own_loss(self, model, inputs):
            parts = {name: value[:2] for name, value in inputs.items() if torch.is_tensor(value) and value.ndim}
            return super().own_loss(model, parts)

    with pytest.raises(MisalignedRecordError, match="2 sequences .* of 4 samples. Score the whole batch in one call"):
        build(qwen3(), trainer_class=Sliced).train()


def test_reference_in_a_loss_of_ones_own_is_live(qwen3, train, check, gap):
    class Reference(OwnScores):
        def own_loss(self, model, inputs):
            with torch.no_grad(), self.model.disable_adapter():
                super().own_loss(model, inputs)
            return super().own_loss(model, inputs)

    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = train(qwen3(), trainer_class=Reference, while_generating=gap["scrambled"], peft_config=adapter)
    reference, update = trainer.of("comparison")[:2]
    assert not same_sets(reference.executed[reference.fed], reference.recorded[reference.fed])
    check.replayed(update)


@pytest.mark.parametrize("replays", [True, False])
def test_live_on_purpose_needs_no_replay(qwen3, train, replays):
    """A run that is compared with keeps its subclass."""

    class OnPurpose(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            with self.live_routing():
                return loss + 0 * model(input_ids=inputs["prompt_ids"]).logits.mean()

    assert train(qwen3(), trainer_class=OnPurpose, use_routing_replay=replays).state.global_step == 2


def test_live_on_purpose_is_logged(qwen3, train):
    class OnPurpose(OwnLoss):
        def _compute_loss(self, model, inputs):
            with self.live_routing():
                return super()._compute_loss(model, inputs)

    trainer = train(qwen3(), trainer_class=OnPurpose)
    assert set(logged(trainer, "routing_replay/replayed_frac")) == {0.0}
    assert set(logged(trainer, "routing_replay/missing_frac")) == {1.0}


def test_some_live_beside_the_replayed(qwen3, train, check, gap):
    class Both(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            with self.live_routing():
                return loss + 0 * model(input_ids=inputs["prompt_ids"]).logits.mean()

    trainer = train(qwen3(), trainer_class=Both, while_generating=gap["scrambled"])
    assert all(0 < share < 1 for share in logged(trainer, "routing_replay/replayed_frac"))


def test_step_that_replays_nothing_is_an_error(qwen3, build):
    class Elsewhere(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return next(model.parameters()).sum()

    with pytest.raises(RuntimeError, match="no forward of the policy replayed its record"):
        build(qwen3(), trainer_class=Elsewhere).train()


def test_reward_may_use_the_policy_as_it_likes(qwen3, train, check, gap):
    policy = qwen3()

    def graded(completions, **kwargs):
        policy(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()  # builds a graph, which nobody uses
        return [float(len(set(text))) for text in completions]

    assert_updates_replay(train(policy, reward=graded, while_generating=gap["scrambled"]), check)


# Adapters


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=[5, 6], task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["tokens beside LoRA", "tokens", "LoRA on the embedding"],
)
def test_trained_vocabulary_rows(qwen3, train, check, gap, adapter):
    assert_updates_replay(train(qwen3(), peft_config=adapter, while_generating=gap["scrambled"]), check)


# Checkpoints that ship a processor


class TextProcessor(ProcessorMixin):
    """As much of a processor as text needs."""

    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer, **kwargs)

    def __call__(self, images=None, text=None, **kwargs):
        return self.tokenizer(text)


def test_text_through_a_processor(qwen3, train, check, gap):
    """TRL takes a model for a vision model by its processor; what counts is the data."""
    processor = TextProcessor(make_tokenizer())
    policy = qwen3()
    policy.config.image_token_id = 95  # which TRL looks for beside a processor
    trainer = train(policy, while_generating=gap["scrambled"], processing_class=processor)
    assert trainer._is_vlm
    assert_updates_replay(trainer, check)


def test_text_through_a_vision_language_model(train):
    """Its decoder is fed embeddings, so the whole batch is held against the tokens of the records."""
    policy = build_tiny("qwen3_vl_moe")
    trainer = train(policy, processing_class=TextProcessor(make_tokenizer()), max_steps=1)
    (entry,) = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    assert entry["routing_replay/replayed_frac"] == 1.0 and entry["routing_replay/changed_router_frac"] == 0.0


def test_edited_tokens_of_a_vision_language_model_are_an_error(build):
    class Editing(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "completion_ids": inputs["completion_ids"].roll(1, 1)})

    processor = TextProcessor(make_tokenizer())
    with pytest.raises(MisalignedRecordError, match="tokens of the batch differ"):
        build(build_tiny("qwen3_vl_moe"), trainer_class=Editing, processing_class=processor).train()


# Collapsed routers


def collapse(policy):
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Module) and type(module).__name__.endswith("TopKRouter"):
                module.weight.zero_()
    return policy


@pytest.mark.parametrize("top_k", [1, 2])
def test_collapsed_routers_train(qwen3, train, check, top_k):
    """With one expert a token, all of them may go to expert 0."""
    trainer = train(collapse(qwen3(num_experts_per_tok=top_k)))
    for one in trainer.of("update")[:1]:
        check.replayed(one)
        assert len(one.executed[one.fed].flatten(0, 1).unique(dim=0)) == 1, "the case itself: one selection for all"
