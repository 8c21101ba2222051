"""Rollouts on disk: what is in them, their file, their replay, their picture."""
