"""The record as data: which experts served each token. Pure tensors."""
