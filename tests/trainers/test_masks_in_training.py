"""Every pass of a trainer is over what truncated sampling kept, and TRL's own where nothing was cut."""

import types
import warnings

import pytest
import torch
from datasets import Dataset
from trainers.masking import EOS, TOP_P, check_passes, logits_of
from transformers import ContinuousBatchingConfig
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

from trl_r3 import R3GMPOConfig, R3GMPOTrainer, R3GRPOConfig, R3GRPOTrainer, R3RLOOConfig, R3RLOOTrainer, k3_kl

CUTS = {
    "top_p": {"top_p": TOP_P},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "all": {"top_p": 0.9, "top_k": 12, "min_p": 0.02},
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_pass_is_over_what_was_kept(make_masked, cut):
    trainer = make_masked(saved=True, beta=0.1, num_iterations=2, temperature=0.7, **{"top_p": 1.0, **CUTS[cut]})
    trainer.train()
    assert check_passes(trainer, CUTS[cut]) == {"old policy": 1, "reference": 1, "update": 2}


SETTINGS = {
    "plain": {},
    "one sample a forward": {"per_device_train_batch_size": 1, "steps_per_generation": 4, "max_steps": 4},
    "shuffled and split": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4},
    "accumulated": {"gradient_accumulation_steps": 2},
    "padded to sevens": {"pad_to_multiple_of": 7},
    "no checkpointing": {"gradient_checkpointing": False},
    "head in float32": {"cast_lm_head_to_fp32": True},
    "ends early": {"generation_kwargs": {"sequence_bias": [[[EOS], 3.0]]}},
    "entropy": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_trl(make_masked, setting):
    trainer = make_masked(**SETTINGS[setting])
    trainer.train()
    if setting == "ends early":  # a bias moves what is kept, and the oracle knows none
        assert all(float(entry["sampling/k3_kl"]) < 1e-10 for entry in trainer.state.log_history[:-1])
    else:
        assert check_passes(trainer, {"top_p": TOP_P})["update"] >= 2


def test_loss_of_ones_own_is_over_what_was_kept(make_masked):
    """At the weights of the rollout its scores are those that the rollout drew with."""
    mismatch = []

    class OwnLoss(R3GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            scored = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]
            mismatch.append((scored.detach() - inputs["old_per_token_logps"])[inputs["completion_mask"].bool()])
            return -(scored * inputs["advantages"][:, None] * inputs["completion_mask"]).sum()

    make_masked(kind=(R3GRPOConfig, OwnLoss, GRPOTrainer), num_iterations=2, max_steps=1).train()
    assert mismatch[0].abs().max() < 1e-4


def test_the_check_sees_a_trainer_without_masks(make_masked):
    """Or the tests above could not fail."""
    with pytest.warns(RuntimeWarning, match="Set `use_sampling_mask_replay=True`"):
        trainer = make_masked(use_sampling_mask_replay=False)
    trainer.train()
    assert check_passes(trainer, {"top_p": TOP_P}, restricted=False) == {"update": 2}
    with pytest.raises(AssertionError):
        check_passes(trainer, {"top_p": TOP_P})


@pytest.mark.parametrize("batching", [False, True])
def test_k3(make_masked, batching):
    """The numbers of masks: at most 1e-10 with them, at least 1e-3 without, in float32 at top_p 0.8."""
    page_size = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    engine = {"use_transformers_continuous_batching": True}
    engine["transformers_continuous_batching_config"] = {"num_blocks": 64, "max_batch_tokens": 64, page_size: 16}
    trainer = make_masked(max_completion_length=24, num_iterations=2, **(engine if batching else {}))
    outputs, samples = [], []
    own = trainer._generate_and_score_completions

    def keep(inputs):
        outputs.append(own(inputs))
        samples.extend(trainer.rollout_samples)
        return outputs[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    assert float(trainer.state.log_history[0]["sampling/k3_kl"]) <= 1e-10
    (batch,) = outputs
    _, weights, input_ids, attention_mask, width, logps, _ = trainer.passes[0]
    mask = batch["completion_mask"]
    sampled = torch.zeros_like(logps)
    for row, sample in zip(sampled, samples, strict=True):
        row[: len(sample.logprobs)] = sample.logprobs
    assert k3_kl(logps, sampled, mask) <= 1e-10
    whole = torch.zeros_like(logps)
    for row in range(len(input_ids)):
        tokens = input_ids[row][attention_mask[row].bool()]
        count = int(mask[row].sum())
        scores = logits_of(trainer, weights, tokens.tolist()).log_softmax(1)[:-1].gather(1, tokens[1:, None])[:, 0]
        whole[row, :count] = scores[-count:]
    assert k3_kl(whole, sampled, mask) >= 1e-3
    if not batching:
        masks = [sample.mask for sample in samples]
        assert sum(each.nbytes for each in masks) <= sum(4 * len(each.ids) + 8 * len(each) for each in masks)


@pytest.mark.parametrize(
    "kind",
    [(R3GMPOConfig, R3GMPOTrainer, GMPOTrainer), (R3RLOOConfig, R3RLOOTrainer, RLOOTrainer)],
    ids=["gmpo", "rloo"],
)
def test_other_trainers(make_masked, kind):
    trainer = make_masked(kind=kind, num_iterations=2, beta=0.0)
    trainer.train()
    assert check_passes(trainer, {"top_p": TOP_P}) == {"old policy": 1, "update": 2}


def test_with_routing_replay(make_masked, qwen3):
    """Both choices of the sampler: replayed experts, and what was kept. In float32 nothing else is left."""
    trainer = make_masked(
        qwen3(), use_routing_replay=True, num_iterations=2, learning_rate=0.0, routing_replay_compare_every=1
    )
    trainer.train()
    seen = check_passes(trainer, {"top_p": TOP_P})
    assert seen == {"old policy": 1, None: 1, "update": 2}  # one is scored live, over what was kept, too
    first = trainer.state.log_history[0]
    assert float(first["routing_replay/replayed_frac"]) == 1.0
    assert float(first["sampling/k3_kl"]) <= 1e-10
    assert float(first["sampling/live/k3_kl"]) <= 1e-10


def trained(trainer):
    """Trains, and keeps the masks of every rollout, which are gone afterwards."""
    trainer.masks, own = [], trainer._generate_and_score_completions

    def keep(inputs):
        output = own(inputs)
        trainer.masks.extend(sample.mask for sample in getattr(trainer, "rollout_samples", []))
        return output

    trainer._generate_and_score_completions = keep
    trainer.train()
    return trainer


def test_nothing_is_cut(make_masked):
    """Without truncated sampling the trainer is TRL's: losses, weights and gradient norms."""
    settings = {"optim": "sgd", "learning_rate": 0.5}  # AdamW makes large steps of gradients that are rounding only
    runs = [
        trained(make_masked(top_p=1.0, use_sampling_mask_replay=on, num_iterations=2, **settings))
        for on in (True, False)
    ]
    assert runs[0].masks and all(not len(mask.ids) for mask in runs[0].masks)
    for one, other in zip(*(run.state.log_history[:2] for run in runs), strict=True):
        for metric in ("loss", "grad_norm"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-5, abs=1e-6), metric
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, runs[1].model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_off_is_trl_to_the_bit(make_masked):
    runs = [
        trained(make_masked(kind=(R3GRPOConfig, each, GRPOTrainer), use_sampling_mask_replay=False))
        for each in (R3GRPOTrainer, Plain)
    ]
    weights = runs[1].model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in runs[0].model.state_dict().items())


class Plain:
    pass


def test_evaluation_is_over_the_whole_vocabulary(make_masked):
    prompts = Dataset.from_dict({"prompt": ["1+2=", "abcdefg"] * 2})
    trainer = make_masked(eval_dataset=prompts, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.train()
    trainer.passes.clear()
    trainer.model.eval()
    trainer.evaluate()
    assert {name for name, *_ in trainer.passes} == {"evaluation"}
    _, weights, input_ids, attention_mask, width, logps, _ = trainer.passes[0]
    tokens = input_ids[0][attention_mask[0].bool()].tolist()
    scores = logits_of(trainer, weights, tokens).log_softmax(1)
    before = len(tokens) - int(attention_mask[0, -width:].sum()) - 1
    assert float(logps[0, 0]) == pytest.approx(float(scores[before, tokens[before + 1]]), abs=2e-5)


VLLM = {"use_vllm": True, "vllm_mode": "colocate", "top_k": 20}
REFUSED = {
    "Set `top_k=512`": {**VLLM, "top_k": 0},
    "only where it samples": {**VLLM, "generation_kwargs": {"temperature": 0.0}},
    "`torch_compile=True` runs past sampling masks": {"torch_compile": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_at_construction(make_masked, message):
    with pytest.raises(ValueError, match=message):
        make_masked(**REFUSED[message])


def test_the_warning_names_what_cuts(make_masked):
    with pytest.warns(RuntimeWarning, match=r"top_p=0.8, min_p=0.1 cuts the distribution") as seen:
        make_masked(use_sampling_mask_replay=False, generation_kwargs={"min_p": 0.1})
    assert sum("cuts the distribution" in str(each.message) for each in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        make_masked()
        warnings.filterwarnings("ignore", message=".*nothing is replayed")
        make_masked(use_sampling_mask_replay=False, top_p=1.0)


def test_everything_is_given_back(make_masked):
    """After a step nothing is left on the model, in TRL or in Transformers."""
    from trl.trainer import utils

    own = utils._ChunkedLogProbFunction
    trainer = make_masked()
    trainer.train()
    assert utils._ChunkedLogProbFunction is own
    assert not {"generate", "_get_logits_processor"} & set(vars(trainer.model))
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks
    assert isinstance(trainer.model.forward, types.MethodType)
