"""Adapters on attention, on experts and on the router itself, and a policy that comes prepared."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trainers.watching import instance_forwards
from trl import GRPOTrainer

from trl_r3 import R3GRPOTrainer

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "all": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
    },
    "whole_router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}
CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "learning_rate": 3e-2}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_every_pass_executes_the_record(qwen3, train, check, adapters, checkpointing):
    trainer = train(
        qwen3(),
        peft_config=LoraConfig(r=4, **ADAPTERS[adapters]),
        **OFF_POLICY,
        **CHECKPOINTING[checkpointing],
    )
    assert isinstance(trainer.model, PeftModel)
    recomputed = [one for one in trainer.of("recompute") if one.calls]
    assert len(recomputed) == (0 if checkpointing == "none" else 4)
    for one in trainer.of("old policy") + trainer.of("update") + recomputed:
        check.replayed(one)
    check.drifted(trainer, trainer.of("update")[-1])


@pytest.mark.parametrize("adapters", ["attention", "experts"])
def test_mixtral(mixtral, train, check, adapters):
    trainer = train(mixtral(), peft_config=LoraConfig(r=4, **ADAPTERS[adapters]), **OFF_POLICY)
    for one in trainer.of("old policy") + trainer.of("update") + trainer.of("recompute"):
        check.replayed(one)
    check.drifted(trainer, trainer.of("update")[-1])


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters_learn_and_nothing_else(qwen3, train, adapters):
    torch.manual_seed(0)
    policy = get_peft_model(qwen3(), LoraConfig(r=4, **ADAPTERS[adapters]))
    before = copy.deepcopy(policy.state_dict())
    train(policy, max_steps=2)
    moved = {name for name, weight in policy.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    for place in {"attention": ["q_proj"], "experts": ["experts"], "router": ["gate"], "all": ["q_proj", "gate"]}.get(
        adapters, ["modules_to_save"]
    ):
        assert any(place in name for name in moved)


@pytest.mark.parametrize("adapters", ["router", "whole_router"])
def test_router_learns(qwen3, train, adapters):
    torch.manual_seed(0)
    policy = get_peft_model(qwen3(), LoraConfig(r=4, **ADAPTERS[adapters]))
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}
    train(policy, num_iterations=2, router_aux_loss_coef=0.0)
    routers = [name for name in before if ".gate." in name]
    assert routers
    after = dict(policy.named_parameters())
    for name in routers:
        if "lora_A" not in name:  # its gradient is zero while B is zero
            assert (after[name] - before[name]).abs().max() > 1e-5, name


@pytest.mark.parametrize("adapters", ["attention", "experts", "router", "all"])
def test_nothing_is_left(qwen3, build, adapters):
    trainer = build(qwen3(), peft_config=LoraConfig(r=4, **ADAPTERS[adapters]))
    before = instance_forwards(trainer.model)
    trainer.train()
    assert instance_forwards(trainer.model) == before
    pristine, ids = trainer.pristine, torch.arange(2, 34).reshape(2, 16)
    pristine.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, pristine.eval()(input_ids=ids).logits)


def test_off_is_trl(qwen3, train):
    runs = []
    for trainer_class in (R3GRPOTrainer, GRPOTrainer):
        torch.manual_seed(0)
        policy = get_peft_model(qwen3(), LoraConfig(r=4, **ADAPTERS["all"]))
        runs.append(train(policy, trainer_class=trainer_class, use_routing_replay=False, beta=0.1, max_steps=3))
    assert runs[0].losses == runs[1].losses
    weights = runs[1].model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in runs[0].model.state_dict().items())


@pytest.mark.parametrize("adapters", [None, "all"])
def test_policy_that_accelerate_has_prepared(qwen3, build, check, adapters):
    """As a user does who evaluates or moves the model with the trainer's own accelerator before training."""
    peft_config = LoraConfig(r=4, **ADAPTERS[adapters]) if adapters else None
    trainer = build(qwen3(), peft_config=peft_config, **OFF_POLICY)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.train()
    for one in trainer.of("old policy") + trainer.of("update") + trainer.of("recompute"):
        check.replayed(one)
