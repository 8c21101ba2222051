"""Runs whose traces a command reads."""

from trainers.runs import build, qwen3, settings, train

__all__ = ["build", "qwen3", "settings", "train"]  # fixtures
