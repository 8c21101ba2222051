"""What a trainer that scores over kept tokens has to return, by full logits of a model that nothing was attached to.

The oracle cuts the distribution by itself, at the weights of the rollout; it asks the package nothing.

Legend: B batch, T tokens, C completion tokens, V vocabulary.
"""

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

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
