"""A trainer that was made without `__init__`, as TRL's own tests make them, does what TRL's does."""

import pytest
from trl import DistillationTrainer, GRPOTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdpo import SDPOTrainer

from trl_r3 import R3DistillationTrainer, R3GRPOTrainer, R3IWOPDTrainer, R3SDPOTrainer

OURS = {R3GRPOTrainer: GRPOTrainer}
OURS |= {R3DistillationTrainer: DistillationTrainer, R3SDPOTrainer: SDPOTrainer, R3IWOPDTrainer: IWOPDTrainer}
OVERRIDDEN = [
    (trainer, name)
    for trainer, parent in OURS.items()
    for name in sorted({name for each in trainer.__mro__ if "trl_r3" in each.__module__ for name in vars(each)})
    if callable(getattr(parent, name, None)) and not name.startswith("__")
]
ARGUMENTS = {
    "log": ({"loss": 1.0},),
    "_get_per_token_logps_and_entropies": ("model", "ids", "mask", 3),
    "_compute_loss": ("model", {"input_ids": 0}),
    "_generate": (["prompt"],),
    "_load_from_checkpoint": ("folder",),
    "_prepare_inputs": ([{"prompt": "p"}],),
    "_generate_single_turn": ([[5]], None, {}, 2),
    "_generate_and_score_completions": ([{"prompt": "p"}],),
    "_get_last_hidden_state": ("model", "ids", "mask", 3),
    "_forward_logits": ("model", "ids", "mask", 3),
    "_prepare_training_batch": ([{"prompt": "p"}],),
    "_generate_student_completions": ([{}], [0]),
    "compute_loss": ("model", {"input_ids": 0}),
}


@pytest.mark.parametrize(("trainer", "name"), OVERRIDDEN)
def test_each_method_is_the_parents(monkeypatch, trainer, name):
    seen = []
    monkeypatch.setattr(OURS[trainer], name, lambda self, *args, **kwargs: seen.append(args) or ("told", name))
    given = ARGUMENTS.get(name, ())
    result = getattr(object.__new__(trainer), name)(*given)
    assert [args[: len(given)] for args in seen] == [given]
    assert result == (None if name == "log" else ("told", name))


def test_all_methods_that_are_overridden_are_looked_at():
    of = {trainer: {name for each, name in OVERRIDDEN if each is trainer} for trainer in OURS}
    assert len(of[R3GRPOTrainer]) == 14
    assert all(
        {"train", "training_step", "prediction_step", "log", "_prepare_inputs"} <= names for names in of.values()
    )
    assert {"_get_last_hidden_state", "_compute_loss"} <= of[R3DistillationTrainer]
    assert {"_forward_logits", "_generate", "compute_loss", "_prepare_training_batch"} <= of[R3SDPOTrainer]
    assert {"_generate_student_completions", "compute_loss"} <= of[R3IWOPDTrainer]


def test_what_it_holds_is_nothing():
    trainer = object.__new__(R3GRPOTrainer)
    assert trainer.rollout_samples == []
    with pytest.raises(RuntimeError, match="does not replay routes. Set `use_routing_replay=True`"):
        trainer.routing_replay  # noqa: B018
