"""Runs that leave traces."""

from trainers.runs import build, gap, qwen3, settings, traced, train

__all__ = ["build", "gap", "qwen3", "settings", "traced", "train"]  # fixtures
