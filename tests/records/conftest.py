"""Models that route by token, in their rollout and in training."""

from token_oracle import rollout, training

__all__ = ["rollout", "training"]  # fixtures
