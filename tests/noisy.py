"""Routers whose selection differs from call to call: what gradient checkpointing recomputes is not what ran."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NOISE = 1e-4


def noisy_forward(self, hidden):
    """
    Logits with noise in training, as kernels whose sums depend on the order of threads have it: no state of a random
    number generator that a checkpoint restores.
    """
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    if self.training:
        logits = logits + NOISE * torch.randn(logits.shape, generator=self.draws)
    weights, ids = logits.softmax(-1).topk(self.top_k)
    return logits, weights / weights.sum(-1, keepdim=True), ids


def noisy_gates(model):
    """The gates that have noise, by layer."""
    return {i: layer.mlp.gate for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}


def add_noise(model):
    """Every other expert is equal but for the noise, which decides between them; the same draws in every model."""
    for gate in noisy_gates(model).values():
        with torch.no_grad():
            gate.weight[2:] = gate.weight[:2].repeat(len(gate.weight) // 2 - 1, 1)
        gate.draws = torch.Generator()
        # Transformers finds the logits of its auxiliary loss by the class
        gate.__class__ = type("NoisyRouter", (type(gate),), {"forward": noisy_forward})
    same_draws(model)


def same_draws(model):
    """Begin again with the first draw."""
    for layer, gate in noisy_gates(model).items():
        gate.draws.manual_seed(layer)
