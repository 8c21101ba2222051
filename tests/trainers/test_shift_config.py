"""The weight by router shift is refused where nothing tells how far routers have moved."""

import pytest

from trl_r3 import R3GMPOConfig, R3GRPOConfig, R3RLOOConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_routing_replay": False}, "`use_routing_replay` is False. Set `use_routing_replay=True`"),
        ({"routing_replay_mode": "R2"}, "`routing_replay_mode` is 'R2'. Set `routing_replay_mode='R3'`"),
        ({"routing_replay_gating": "intercept"}, "Set `routing_replay_gating='auto'`"),
        ({"num_iterations": 1}, "Set `num_iterations` or `steps_per_generation` higher"),
        ({"routing_replay_shift_weight": "no"}, "`routing_replay_shift_weight` is 'no', expected True or False"),
    ],
)
@pytest.mark.parametrize("config", [R3GRPOConfig, R3GMPOConfig])
def test_refused(config, changes, message, tmp_path):
    settings = {"use_routing_replay": True, "routing_replay_shift_weight": True, "num_iterations": 2, "bf16": False}
    config(str(tmp_path), **settings)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(str(tmp_path), **{**settings, **changes})


def test_a_kl_term_that_the_weight_would_scale_is_refused(tmp_path):
    """GMPO has the setting from its parent, and a KL term without ratios."""
    settings = {"use_routing_replay": True, "routing_replay_shift_weight": True, "num_iterations": 2, "bf16": False}
    with pytest.raises(ValueError, match="with beta=0.04 and `use_bias_correction_kl=True` TRL multiplies"):
        R3GRPOConfig(str(tmp_path), **settings, beta=0.04)
    R3GRPOConfig(str(tmp_path), **settings, beta=0.04, use_bias_correction_kl=False)
    R3GRPOConfig(str(tmp_path), **{**settings, "routing_replay_shift_weight": False}, beta=0.04)
    R3GMPOConfig(str(tmp_path), **settings, beta=0.04)


def test_a_product_of_ratios_is_refused(tmp_path):
    """GMPO has the setting from its parent, too, and a loss of its own."""
    settings = {"use_routing_replay": True, "routing_replay_shift_weight": True, "num_iterations": 2, "bf16": False}
    with pytest.raises(ValueError, match="`loss_type='vespo'` weighs a sequence by their product"):
        R3GRPOConfig(str(tmp_path), **settings, loss_type="vespo")
    R3GRPOConfig(str(tmp_path), **settings, loss_type="grpo", importance_sampling_level="sequence")  # of their mean
    R3GRPOConfig(str(tmp_path), **{**settings, "routing_replay_shift_weight": False}, loss_type="vespo")
    R3GMPOConfig(str(tmp_path), **settings, loss_type="vespo")


def test_trainers_without_a_ratio_a_token_do_not_have_it(tmp_path):
    with pytest.raises(TypeError, match="routing_replay_shift_weight"):
        R3RLOOConfig(str(tmp_path), routing_replay_shift_weight=True)
