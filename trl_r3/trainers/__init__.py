"""TRL's trainers, as a delta: config, mixin, metrics and log."""
