"""`trl-r3 plan`. Nothing is imported here: its arguments are judged before PyTorch is there."""
