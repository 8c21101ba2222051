"""After training, evaluation or an exception the model is bit for bit one that never met a trainer."""

import pytest
import torch
from datasets import Dataset
from trainers.runs import CHECKPOINTING
from trainers.watching import instance_forwards


class Stop(Exception):
    pass


def fails_in_reward(train, model):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise Stop
        return [float(len(text)) for text in completions]

    train(model, reward=reward, max_steps=3)


def fails_in_backward(train, model):
    calls = []

    def stop(grad):
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    model.model.layers[2].mlp.gate.weight.register_hook(stop)
    train(model, max_steps=3)


def fails_in_forward(train, model):
    def stop(module, args):
        if torch.is_grad_enabled():
            raise Stop

    handle = model.model.layers[3].mlp.register_forward_pre_hook(stop)
    try:
        train(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("fails", [None, fails_in_reward, fails_in_backward, fails_in_forward])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_no_state_survives_training(qwen3, build, fails, checkpointing):
    model, trainers = qwen3(), []

    def train(model, **kwargs):
        trainers.append(build(model, **kwargs, **CHECKPOINTING[checkpointing]))
        trainers[0].forwards = instance_forwards(trainers[0].model)
        trainers[0].checkpoint_functions = checkpoint_functions(model)
        trainers[0].train()

    if fails is None:
        train(model)
    else:
        with pytest.raises(Stop):
            fails(train, model)
    (trainer,) = trainers
    assert instance_forwards(model) == trainer.forwards
    assert list(trainer.forwards) == [""]  # the scoring head of TRL, on the model itself
    assert all("trl_r3" not in repr(function) for function in checkpoint_functions(model))
    with pytest.raises(RuntimeError, match="on a handle that was removed"), trainer.routing_replay.record():
        pass
    assert same_bits_as_untouched(model, qwen3())


def checkpoint_functions(model):
    return [
        m.__dict__["_gradient_checkpointing_func"]
        for m in model.modules()
        if "_gradient_checkpointing_func" in vars(m)
    ]


def same_bits_as_untouched(model, untouched):
    """Whether logits and gradients are those of a model that never met a trainer."""
    untouched.load_state_dict(model.state_dict())
    ids = torch.arange(2, 34).reshape(2, 16)
    results = []
    for one in (model, untouched):
        one.zero_grad()
        one.eval()
        output = one(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in one.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_state_survives_evaluation(qwen3, build):
    model = qwen3()
    trainer = build(model, eval_dataset=Dataset.from_dict({"prompt": ["abc", "d"]}), per_device_eval_batch_size=2)
    forwards = instance_forwards(model)
    trainer.evaluate()
    assert instance_forwards(model) == forwards
    trainer.train()
    trainer.evaluate()
    assert instance_forwards(model) == forwards
    assert same_bits_as_untouched(model, qwen3())


def test_construction_leaves_the_model_alone(qwen3, build):
    model = qwen3()
    build(model)
    assert list(instance_forwards(model)) == [""]
    assert same_bits_as_untouched(model, qwen3())


def test_training_twice(qwen3, build, check):
    trainer = build(qwen3(), num_iterations=2)
    trainer.train()
    trainer.train()
    assert len(trainer.of("update")) == 4
    for one in trainer.of("update"):
        check.replayed(one)
