"""When the trainer attaches: after whatever `train()` does to the model, and once for each `train()`."""

from __future__ import annotations

import types

import pytest


def test_attached_to_what_prepare_has_made(qwen3, build, check):
    """Kernels may replace the forward of a router inside `train()`, as Liger's do for whole layers."""
    trainer = build(qwen3(), num_iterations=2)
    replaced = []
    create_optimizer = trainer.create_optimizer

    def create_with_kernels(*args, **kwargs):
        for layer in trainer.model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.forward = types.MethodType(type(layer.mlp.gate).forward, layer.mlp.gate)
                replaced.append(layer.mlp.gate)
        return create_optimizer(*args, **kwargs)

    trainer.create_optimizer = create_with_kernels
    trainer.train()
    assert replaced
    for one in trainer.of("update"):
        check.replayed(one)
    check.drifted(trainer, trainer.of("update")[-1])
    assert all(isinstance(gate.forward, types.MethodType) for gate in replaced)  # given back as it was


def test_each_training_attaches_again(qwen3, build, check):
    trainer = build(qwen3(), num_iterations=2)
    for _ in range(2):
        trainer.train()
        with pytest.raises(RuntimeError, match="attached to the policy only while `train"):
            _ = trainer._r3.attachment.replay
        assert not any("forward" in vars(layer) for layer in trainer.model.model.layers)
    for one in trainer.of("update"):
        check.replayed(one)


def test_attached_before_callbacks_hear_of_the_training(qwen3, build):
    from transformers import TrainerCallback

    heard = []

    class Listener(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            heard.append(trainer.routing_replay.num_experts)

    trainer = build(qwen3())
    trainer.add_callback(Listener())
    trainer.train()
    assert heard == [trainer.model.config.num_experts]
