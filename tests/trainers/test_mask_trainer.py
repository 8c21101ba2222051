"""
Trainers that score over what truncated sampling kept, against full logits of a model that nothing was attached to.

The oracle cuts the distribution by itself, at the weights of the rollout; it asks the package nothing.

Legend: B batch, T tokens, C completion tokens, V vocabulary.
"""

import copy
import types
import warnings

import pytest
import torch
from datasets import Dataset
from trainers.watching import make_tokenizer
from transformers import ContinuousBatchingConfig, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

from trl_r3 import (
    R3GMPOConfig,
    R3GMPOTrainer,
    R3GRPOConfig,
    R3GRPOTrainer,
    R3RLOOConfig,
    R3RLOOTrainer,
    SamplingMask,
    k3_kl,
    stitch,
)

PAD, EOS, VOCAB = 0, 1, 96
TOP_P = 0.8


def dense(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            initializer_range=0.2,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def kept_by(logits, top_p=1.0, top_k=0, min_p=0.0):
    """Which ids of `(V,)` logits can be drawn, sorted down from the likeliest."""
    p, ids = logits.double().softmax(0).sort(descending=True)
    among = p.cumsum(0) / p[: top_k or None].sum()  # top_p is a share of what top_k leaves
    keep = (among - among[0] * p / p[0] < top_p) & (p >= min_p * p[0])
    return ids[keep][: top_k or None]


class Noting:
    """Below the code under test and above TRL: what was generated, and what each pass got back."""

    def __init__(self, *args, **kwargs):
        self.passes, self.rollouts, self._inside = [], [], None
        super().__init__(*args, **kwargs)
        self.pristine = copy.deepcopy(self.model)
        for module in self.pristine.modules():
            vars(module).pop("forward", None)  # TRL's heads, bound to the other model

    def weights(self, model):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        output = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        completion_ids = output[0] if isinstance(output, tuple) else output
        if self.model.training:
            self.rollouts.append((self.weights(self.model), prompt_ids, [list(ids) for ids in completion_ids]))
        return output

    def _generate_and_score_completions(self, inputs):
        self._inside = "old policy"
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._inside = None

    def _compute_loss(self, model, inputs):
        self._inside = "update"
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._inside = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        name = "reference" if model is self.ref_model else self._inside
        name = name if self.model.training else "evaluation"
        self.passes.append(
            (name, self.weights(model), input_ids, attention_mask, logits_to_keep, *(self.detached(result[:2])))
        )
        return result

    @staticmethod
    def detached(result):
        return [None if each is None else each.detach().clone() for each in result]


def logits_of(trainer, weights, tokens):
    trainer.pristine.load_state_dict(weights)
    with torch.no_grad():
        return trainer.pristine(input_ids=torch.tensor([tokens])).logits[0].double() / trainer.temperature


def check_passes(trainer, cut, restricted=True):
    """Every value of every pass is over what the oracle keeps; returns how often each pass was seen."""
    seen, different = {}, 0
    for name, weights, input_ids, attention_mask, width, logps, entropies in trainer.passes:
        for row in range(len(input_ids)):
            tokens = input_ids[row][attention_mask[row].bool()].tolist()
            count = int(attention_mask[row, -width:].sum())
            at_rollout = next(
                logits_of(trainer, then, tokens)
                for then, prompts, completions in reversed(trainer.rollouts)
                if any([*p, *c] == tokens for p, c in zip(prompts, completions, strict=True))
            )
            logits = logits_of(trainer, weights, tokens)
            for c in range(count):
                position = len(tokens) - count + c - 1
                kept = kept_by(at_rollout[position], **cut) if restricted else torch.arange(VOCAB)
                p = logits[position][kept].log_softmax(0)
                (of_token,) = (kept == tokens[position + 1]).nonzero()[:, 0].tolist()
                assert float(logps[row, c]) == pytest.approx(float(p[of_token]), abs=2e-5)
                if entropies is not None:
                    assert float(entropies[row, c]) == pytest.approx(float(-(p.exp() * p).sum()), abs=2e-5)
                different += abs(float(logits[position].log_softmax(0)[tokens[position + 1]] - p[of_token])) > 1e-3
        seen[name] = seen.get(name, 0) + 1
    assert bool(different) == restricted
    return seen


@pytest.fixture
def make(tmp_path, distinct):
    def build(model=None, kind=(R3GRPOConfig, R3GRPOTrainer, GRPOTrainer), saved=False, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "log_level": "error",
            "top_p": TOP_P,
            "use_sampling_mask_replay": True,
        }
        config, trainer, parent = kind
        passed = {name: changes.pop(name) for name in ("rollout_func", "eval_dataset") if name in changes}
        model = model or dense()
        if saved:  # TRL loads the reference policy from there
            model.save_pretrained(tmp_path / "model")
            model = type(model).from_pretrained(tmp_path / "model")
        noting = type("Noted", (Noting, parent), {})
        return type("Watched", (trainer, noting), {})(
            model=model,
            args=config(**{**settings, **changes}),
            reward_funcs=distinct,
            train_dataset=Dataset.from_dict({"prompt": ["1+2=", "abcdefg", "x", "hello you"] * 4}),
            processing_class=make_tokenizer(),
            **passed,
        )

    return build


@pytest.fixture
def distinct():
    return lambda completions, **kwargs: [len(set(text)) + 0.1 * i for i, text in enumerate(completions)]


CUTS = {
    "top_p": {"top_p": TOP_P},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "all": {"top_p": 0.9, "top_k": 12, "min_p": 0.02},
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_pass_is_over_what_was_kept(make, cut):
    trainer = make(saved=True, beta=0.1, num_iterations=2, temperature=0.7, **{"top_p": 1.0, **CUTS[cut]})
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
def test_settings_of_trl(make, setting):
    trainer = make(**SETTINGS[setting])
    trainer.train()
    if setting == "ends early":  # a bias moves what is kept, and the oracle knows none
        assert all(float(entry["sampling/k3_kl"]) < 1e-10 for entry in trainer.state.log_history[:-1])
    else:
        assert check_passes(trainer, {"top_p": TOP_P})["update"] >= 2


def test_the_check_sees_a_trainer_without_masks(make):
    """Or the tests above could not fail."""
    with pytest.warns(RuntimeWarning, match="Set `use_sampling_mask_replay=True`"):
        trainer = make(use_sampling_mask_replay=False)
    trainer.train()
    assert check_passes(trainer, {"top_p": TOP_P}, restricted=False) == {"update": 2}
    with pytest.raises(AssertionError):
        check_passes(trainer, {"top_p": TOP_P})


@pytest.mark.parametrize("batching", [False, True])
def test_k3(make, batching):
    """The numbers of masks: at most 1e-10 with them, at least 1e-3 without, in float32 at top_p 0.8."""
    page_size = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    engine = {"use_transformers_continuous_batching": True}
    engine["transformers_continuous_batching_config"] = {"num_blocks": 64, page_size: 16}
    trainer = make(max_completion_length=24, num_iterations=2, **(engine if batching else {}))
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
def test_other_trainers(make, kind):
    trainer = make(kind=kind, num_iterations=2, beta=0.0)
    trainer.train()
    assert check_passes(trainer, {"top_p": TOP_P}) == {"old policy": 1, "update": 2}


def test_with_routing_replay(make, qwen3):
    """Both choices of the sampler: replayed experts, and what was kept. In float32 nothing else is left."""
    trainer = make(
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


def test_nothing_is_cut(make):
    """Without truncated sampling the trainer is TRL's: losses, weights and gradient norms."""
    settings = {"optim": "sgd", "learning_rate": 0.5}  # AdamW makes large steps of gradients that are rounding only
    runs = [
        trained(make(top_p=1.0, use_sampling_mask_replay=on, num_iterations=2, **settings)) for on in (True, False)
    ]
    assert runs[0].masks and all(not len(mask.ids) for mask in runs[0].masks)
    for one, other in zip(*(run.state.log_history[:2] for run in runs), strict=True):
        for metric in ("loss", "grad_norm"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-5, abs=1e-6), metric
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, runs[1].model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_off_is_trl_to_the_bit(make):
    runs = [
        trained(make(kind=(R3GRPOConfig, each, GRPOTrainer), use_sampling_mask_replay=False))
        for each in (R3GRPOTrainer, Plain)
    ]
    weights = runs[1].model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in runs[0].model.state_dict().items())


class Plain:
    pass


def test_evaluation_is_over_the_whole_vocabulary(make):
    prompts = Dataset.from_dict({"prompt": ["1+2=", "abcdefg"] * 2})
    trainer = make(eval_dataset=prompts, per_device_eval_batch_size=4, num_generations_eval=2)
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


@pytest.fixture
def rollout_func():
    """A rollout of two turns, between which a tool says one token; `change` edits what it returns."""

    def make(change=lambda result: result):
        def rollout(prompts, trainer):
            prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
            first, one = trainer.rollout_turn(prompt_ids)
            heard = [[*p, *c, 7] for p, c in zip(prompt_ids, first.completion_ids, strict=True)]
            second, two = trainer.rollout_turn(heard)
            completions = [[*a, 7, *b] for a, b in zip(first.completion_ids, second.completion_ids, strict=True)]
            record = stitch([first, second], prompt_ids, completions, None)
            return change(
                {
                    "prompt_ids": prompt_ids,
                    "completion_ids": completions,
                    "logprobs": [[*a, 0.0, *b] for a, b in zip(one, two, strict=True)],
                    "env_mask": [
                        [1] * len(a) + [0] + [1] * len(b)
                        for a, b in zip(first.completion_ids, second.completion_ids, strict=True)
                    ],
                    "sampling_masks": record.masks,
                }
            )

        return rollout

    return make


def test_turns_of_a_rollout_func(make, rollout_func):
    """Sampled tokens are over what was kept, and what the tool said over the whole vocabulary."""
    trainer = make(rollout_func=rollout_func(), max_completion_length=4)
    trainer.train()
    by_tokens = {(*p, *c): then for then, ps, cs in trainer.rollouts for p, c in zip(ps, cs, strict=True)}
    heard = 0
    for _, weights, input_ids, attention_mask, width, logps, _ in trainer.passes:
        for row in range(len(input_ids)):
            tokens = input_ids[row][attention_mask[row].bool()].tolist()
            count = int(attention_mask[row, -width:].sum())
            logits = logits_of(trainer, weights, tokens)
            at_rollout = logits_of(trainer, by_tokens[tuple(tokens)], tokens)
            ends = {len(key) for key in by_tokens if list(key) == tokens[: len(key)]}
            for c in range(count):
                position = len(tokens) - count + c - 1
                said = position + 1 in ends  # the token after a turn
                kept = torch.arange(VOCAB) if said else kept_by(at_rollout[position], top_p=TOP_P)
                p = logits[position][kept].log_softmax(0)[(kept == tokens[position + 1]).nonzero()[0, 0]]
                assert float(logps[row, c]) == pytest.approx(float(p), abs=2e-5)
                heard += said
    assert heard


def wrong_token(result):
    mask = result["sampling_masks"][1]
    token = result["completion_ids"][1][2]
    rows = [mask.ids[a:b] for a, b in zip(mask.offsets[:-1], mask.offsets[1:], strict=True)]
    rows[2] = [v for v in range(VOCAB) if v != token][:9]
    result["sampling_masks"][1] = SamplingMask.of(rows)
    return result


WRONG = {
    "returned no `sampling_masks`": lambda result: {k: v for k, v in result.items() if k != "sampling_masks"},
    "`sampling_masks` of 3 samples for 4 prompts": lambda r: {**r, "sampling_masks": r["sampling_masks"][1:]},
    "sample 0: its entry of `sampling_masks` is a list": lambda r: {**r, "sampling_masks": [[]] * 4},
    r"sample 0: its sampling mask has \d+ rows, but": lambda r: {
        **r,
        "sampling_masks": [SamplingMask.unrestricted(99)] * 4,
    },
    r"sample 1: token \d+ was sampled at position 2 of the completion, but is not among the 9 ids": wrong_token,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_masks_of_a_rollout_func(make, rollout_func, message):
    trainer = make(rollout_func=rollout_func(WRONG[message]), max_completion_length=4)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_batch_that_lost_its_identities(make):
    trainer = make()
    own = trainer._generate_and_score_completions

    def lose(inputs):
        output = own(inputs)
        del output["rollout_samples"]
        return output

    trainer._generate_and_score_completions = lose
    with pytest.raises(RuntimeError, match="no `rollout_samples` among"):
        trainer.train()


def test_a_batch_that_was_shuffled_without_its_identities(make):
    """The wrong mask of another sample is no number: the tokens tell."""
    trainer = make()
    own = trainer._generate_and_score_completions

    def swap(inputs):
        output = own(inputs)
        output["rollout_samples"] = output["rollout_samples"].flip(0)
        return output

    trainer._generate_and_score_completions = swap
    with pytest.raises(RuntimeError, match="tokens of the batch differ from those that its record was made for"):
        trainer.train()


VLLM = {"use_vllm": True, "vllm_mode": "colocate", "top_k": 20}
REFUSED = {
    "Set `top_k=512`": {**VLLM, "top_k": 0},
    "only where it samples": {**VLLM, "generation_kwargs": {"temperature": 0.0}},
    "`torch_compile=True` runs past sampling masks": {"torch_compile": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make(**REFUSED[message])


def test_the_warning_names_what_cuts(make):
    with pytest.warns(RuntimeWarning, match=r"top_p=0.8, min_p=0.1 cuts the distribution") as seen:
        make(use_sampling_mask_replay=False, generation_kwargs={"min_p": 0.1})
    assert sum("cuts the distribution" in str(each.message) for each in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        make()
        make(use_sampling_mask_replay=False, top_p=1.0)


def test_everything_is_given_back(make):
    """After a step nothing is left on the model, in TRL or in Transformers."""
    from trl.trainer import utils

    own = utils._ChunkedLogProbFunction
    trainer = make()
    trainer.train()
    assert utils._ChunkedLogProbFunction is own
    assert not {"generate", "_get_logits_processor"} & set(vars(trainer.model))
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks
    assert isinstance(trainer.model.forward, types.MethodType)
