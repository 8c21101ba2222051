"""The command `trl-r3`."""
