"""R3GMPOTrainer replays like R3GRPOTrainer: every update goes through the experts of its rollout."""

from __future__ import annotations

from datasets import Dataset
from engines.tiny_chat import make_trainer
from engines.watch import Watched, assert_two_rollouts_are_replayed

from trl_r3 import R3GMPOConfig, R3GMPOTrainer


class WatchedGMPO(Watched, R3GMPOTrainer):
    pass


def test_updates_replay_their_rollout(tmp_path):
    trainer = make_trainer(
        tmp_path,
        Dataset.from_dict({"prompt": ["t30 t31 t32", "t40", "t50 t51 t52 t53", "t60 t61"]}),
        trainer_class=WatchedGMPO,
        config_class=R3GMPOConfig,
        per_device_train_batch_size=8,
        num_iterations=2,
        max_steps=4,
        learning_rate=3e-2,
    )
    assert_two_rollouts_are_replayed(trainer)
