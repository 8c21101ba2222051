"""A trainer that was made without `__init__`, as TRL's own tests make them, does what TRL's does."""

import pytest
from trl import GRPOTrainer

from trl_r3 import R3GRPOTrainer
from trl_r3.trainers.mixin import RoutingReplayMixin

OVERRIDDEN = sorted(
    name for name in vars(RoutingReplayMixin) if callable(getattr(GRPOTrainer, name, None)) and name != "__init__"
)
ARGUMENTS = {
    "log": ({"loss": 1.0},),
    "_get_per_token_logps_and_entropies": ("model", "ids", "mask", 3),
    "_compute_loss": ("model", {"input_ids": 0}),
    "_generate": (["prompt"],),
    "_load_from_checkpoint": ("folder",),
    "_prepare_inputs": ([{"prompt": "p"}],),
    "_generate_single_turn": ([[5]], None, {}, 2),
    "_generate_and_score_completions": ([{"prompt": "p"}],),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_each_method_is_the_parents(monkeypatch, name):
    seen = []
    monkeypatch.setattr(GRPOTrainer, name, lambda self, *args, **kwargs: seen.append(args) or ("told", name))
    trainer = object.__new__(R3GRPOTrainer)
    given = ARGUMENTS.get(name, ())
    result = getattr(trainer, name)(*given)
    assert [args[: len(given)] for args in seen] == [given]
    assert result == (None if name == "log" else ("told", name))


def test_all_methods_that_are_overridden_are_looked_at():
    assert len(OVERRIDDEN) == 13 and {"train", "training_step", "prediction_step", "log"} <= set(OVERRIDDEN)


def test_what_it_holds_is_nothing():
    trainer = object.__new__(R3GRPOTrainer)
    assert trainer.rollout_samples == []
    with pytest.raises(RuntimeError, match="does not replay routes. Set `use_routing_replay=True`"):
        trainer.routing_replay  # noqa: B018
