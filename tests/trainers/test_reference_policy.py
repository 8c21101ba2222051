"""Reference policies, reward models and evaluation route live, and no other model is ever touched."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers.watching import distinct_characters, instance_forwards, make_tokenizer, same_sets
from transformers import Qwen3MoeForSequenceClassification

from trl_r3 import R3GRPOTrainer
from trl_r3.cli.experts import executed_ids

OFF_POLICY = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}


@pytest.fixture
def saved(qwen3, tmp_path):
    """A folder with a model: TRL loads the reference policy from where the policy came from."""
    qwen3().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def live_routes(model, one):
    """(B, T, L, K) that a model of its own executes."""
    with torch.no_grad(), executed_ids(model) as calls:
        model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False)
    return torch.stack([torch.cat(calls[n]).unflatten(0, (len(one.input_ids), -1)) for n in sorted(calls)], dim=2)


def assert_routed_as(model, one):
    real = one.attention_mask.bool()
    assert same_sets(one.executed[real], live_routes(model, one)[real])


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_reference_model_is_live_and_untouched(saved, qwen3, build, check, gap, mode):
    seen = []

    def reward(completions, **kwargs):
        seen.append(instance_forwards(trainer.ref_model))
        return [float(len(set(text))) for text in completions]

    run = {**OFF_POLICY, "beta": 0.1, "reward": reward, "while_generating": gap["scrambled"]}
    trainer = build(saved, routing_replay_mode=mode, **run)
    before = instance_forwards(trainer.ref_model)
    hooks = {name: list(m._forward_hooks) for name, m in trainer.ref_model.named_modules()}
    trainer.train()
    assert list(before) == [""]  # the scoring head of TRL
    assert seen == [before] * 2  # while the policy is attached
    assert {name: list(m._forward_hooks) for name, m in trainer.ref_model.named_modules()} == hooks
    for one in trainer.of("reference"):
        assert_routed_as(qwen3(), one)
        assert not same_sets(one.executed[one.fed], one.recorded[one.fed])
    if mode == "R3":
        for one in trainer.of("old policy") + trainer.of("update"):
            check.replayed(one)
    assert trainer.state.log_history[1]["kl"] > 0


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    "whole_router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_reference_with_adapters_off_is_live(qwen3, train, check, gap, adapters):
    peft_config = LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[adapters])
    run = {**OFF_POLICY, "beta": 0.1, "while_generating": gap["scrambled"]}
    trainer = train(qwen3(), peft_config=peft_config, **run)
    base = qwen3()
    assert len(trainer.of("reference")) == 2
    for one in trainer.of("reference"):
        assert_routed_as(base, one)
        assert not same_sets(one.executed[one.fed], one.recorded[one.fed])
    for one in trainer.of("old policy") + trainer.of("update") + trainer.of("recompute"):
        check.replayed(one)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_reference_adapter_is_live(qwen3, train, check, gap, adapters):
    policy = get_peft_model(qwen3(), LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[adapters]))
    start = copy.deepcopy(policy)
    run = {**OFF_POLICY, "beta": 0.1, "while_generating": gap["scrambled"]}
    trainer = train(policy, **run)
    assert "ref" in policy.peft_config
    for one in trainer.of("reference"):
        assert_routed_as(start, one)
        assert not same_sets(one.executed[one.fed], one.recorded[one.fed])
    for one in trainer.of("old policy") + trainer.of("update") + trainer.of("recompute"):
        check.replayed(one)


def test_adapters_alone_change_the_routes(qwen3, train):
    """Or the two tests above could not tell the reference from the policy."""
    trainer = train(qwen3(), peft_config=LoraConfig(r=4, init_lora_weights=False, **ADAPTERS["attention"]))
    one = trainer.of("update")[0]
    assert not same_sets(trainer.live_routes(one)[one.fed], live_routes(qwen3(), one)[one.fed])


def test_reward_model_is_live_and_untouched(qwen3, train, check, gap):
    config = copy.deepcopy(qwen3().config)
    config.num_labels = 1
    torch.manual_seed(7)
    judge = Qwen3MoeForSequenceClassification(config).eval()
    twin, inputs, forwards = copy.deepcopy(judge), [], []

    def note(module, args, kwargs):
        inputs.append(kwargs)
        forwards.append(instance_forwards(module))

    handle = judge.register_forward_pre_hook(note, with_kwargs=True)
    with executed_ids(judge) as executed:
        run = {**OFF_POLICY, "while_generating": gap["scrambled"]}
        trainer = train(qwen3(), reward=judge, reward_processing_classes=make_tokenizer(), **run)
    handle.remove()
    assert forwards == [{}] * 2
    with torch.no_grad(), executed_ids(twin) as expected:
        for kwargs in inputs:
            twin(**kwargs)
    assert sorted(executed) == [0, 2, 3]
    for layer in executed:
        assert len(executed[layer]) == 2
        assert all(map(torch.equal, executed[layer], expected[layer]))
    for one in trainer.of("update"):
        check.replayed(one)


def test_evaluation_is_live(qwen3, train, check, gap):
    trainer = train(
        qwen3(),
        eval_dataset=Dataset.from_dict({"prompt": ["abc", "d", "ef", "(1+1)"]}),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        while_generating=gap["scrambled"],
        **OFF_POLICY,
    )
    evaluated = trainer.of("evaluation update")
    assert len(evaluated) == 4 * 2  # two batches, after each of four steps
    for one in evaluated:
        check.live(trainer, one)
        check.drifted(trainer, one)
    for one in trainer.of("update"):
        check.replayed(one)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4
    assert not any(key.startswith("eval_routing_replay") for entry in trainer.state.log_history for key in entry)


def test_evaluation_does_not_touch_the_buffered_record(qwen3, train, check):
    """Evaluation between two updates of one rollout: the second still replays that rollout."""
    run = {"num_iterations": 4, "max_steps": 4, "learning_rate": 1e-2, "per_device_eval_batch_size": 4}
    data = Dataset.from_dict({"prompt": ["abc", "d", "ef", "(1+1)"]})
    trainer = train(qwen3(), eval_dataset=data, eval_strategy="steps", eval_steps=1, **run)
    assert [one.name for one in trainer.passes].count("rollout") == 1
    updates = trainer.of("update")
    assert len(updates) == 4
    for one in updates[1:]:
        check.drifted(trainer, one)
    for one in updates:
        check.replayed(one)


def test_evaluation_inside_a_rollout(qwen3, build, check):
    """A reward function may look how the policy does on other prompts: what it scores is not the rollout."""

    def reward(completions, **kwargs):
        if trainer.model.training:
            trainer.evaluate()
            trainer.model.train()
        return distinct_characters(completions)

    data = Dataset.from_dict({"prompt": ["abc", "d"]})
    trainer = build(qwen3(), reward=reward, eval_dataset=data, per_device_eval_batch_size=4, num_iterations=2)
    trainer.train()
    scored = trainer.of("evaluation old policy") + trainer.of("evaluation update")
    assert scored
    for one in scored:
        check.live(trainer, one)
    for one in trainer.of("update"):
        check.replayed(one)


def test_untrained_copy_of_the_policy_stays_live(qwen3, build):
    """A model that shares the policy's class, as in a judge, has no way into the registry: there is none."""
    judge, seen = qwen3(1), []

    def reward(completions, **kwargs):
        seen.append(instance_forwards(judge))
        ids = torch.arange(2, 20)[None]
        with torch.no_grad():
            seen.append(torch.equal(judge(input_ids=ids).logits, expected))
        return [float(len(text)) for text in completions]

    with torch.no_grad():
        expected = judge(input_ids=torch.arange(2, 20)[None]).logits
    build(qwen3(), reward=reward, trainer_class=R3GRPOTrainer).train()
    assert seen == [{}, True, {}, True]
