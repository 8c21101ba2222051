"""Scoring over the tokens that truncated sampling kept."""
