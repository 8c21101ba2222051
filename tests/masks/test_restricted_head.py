"""TRL's scoring head over kept tokens against the full logits of each model, cut by -inf.

Legend: N predictions, H hidden size, V vocabulary, B batch, T tokens.
"""

import pytest
import torch
from masks.kept_oracle import HIDDEN, VOCAB, oracle, random_rows
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from trl_r3.masks.masked_batch import MaskedBatch
from trl_r3.masks.restricted_head import restricted_head
from trl_r3.records.samples import Sample
from trl_r3.records.sampling_mask import SamplingMask

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "gemma2, softcapped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "qwen3_moe, auxiliary loss": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, output_router_logits=True
        )
    ),
}
TEMPERATURE, PROMPT_WIDTH = 0.7, 4


@pytest.fixture
def scored():
    """A padded batch with a mask a sample, the second token of which a tool said."""
    generator = torch.Generator().manual_seed(1)
    samples, input_ids, attention_mask = [], torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10)
    for i, (prompt, completion) in enumerate([(4, 6), (2, 3), (1, 1)]):
        tokens = torch.randint(2, VOCAB, (prompt + completion,), generator=generator)
        rows = random_rows(generator, tokens[prompt:], VOCAB)
        rows[0] = rows[0] or [int(tokens[prompt])]
        rows[1:2] = [[]] * len(rows[1:2])
        samples.append(Sample(i, tokens, prompt, torch.empty(0), mask=SamplingMask.of(rows)))
        start = PROMPT_WIDTH - prompt
        input_ids[i, start : start + len(tokens)] = tokens
        attention_mask[i, start : start + len(tokens)] = 1
    return samples, input_ids, attention_mask


def forward(model, input_ids, attention_mask):
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :PROMPT_WIDTH] = -100
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True), labels


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_each_model(scored, name):
    """Through TRL's forward, against the logits that the model itself returns."""
    samples, input_ids, attention_mask = scored
    torch.manual_seed(0)
    model = MODELS[name]()
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.double().detach() / TEMPERATURE
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    with restricted_head(model, MaskedBatch(samples, PROMPT_WIDTH)):
        output, labels = forward(model, input_ids, attention_mask)
    unrestricted, _ = forward(model, input_ids, attention_mask)
    seen = 0
    for row, sample in enumerate(samples):
        bounds = sample.mask.offsets.tolist()
        for position in (labels[row] != -100).nonzero()[:, 0].tolist():
            c = position - PROMPT_WIDTH
            kept = sample.mask.ids[bounds[c] : bounds[c + 1]].tolist()
            logprob, entropy = oracle(logits[row, position - 1], int(input_ids[row, position]), kept)
            assert float(output.log_probs[row, position - 1]) == pytest.approx(float(logprob), abs=1e-5)
            assert float(output.entropy[row, position - 1]) == pytest.approx(float(entropy), abs=1e-5)
            difference = abs(float(unrestricted.log_probs[row, position - 1] - logprob))
            assert difference < 1e-5 if not kept else difference > 1e-3  # what a tool said is as TRL scores it
            seen += 1
    assert seen == 10
    assert not output.log_probs[labels[:, 1:] == -100].any()
    if name.endswith("auxiliary loss"):
        assert torch.equal(output.aux_loss, unrestricted.aux_loss)


@pytest.mark.parametrize("name", ["qwen3", "qwen3, tied", "gemma2, softcapped"])
def test_gradients_of_all_weights(scored, name):
    """Backward through the model: as by its own full logits, cut by -inf."""
    samples, input_ids, attention_mask = scored
    torch.manual_seed(0)
    model = MODELS[name]()
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits / TEMPERATURE
    total = 0.0
    for row, sample in enumerate(samples):
        bounds = sample.mask.offsets.tolist()
        for c, token in enumerate(sample.tokens[sample.prompt_length :].tolist()):
            kept = sample.mask.ids[bounds[c] : bounds[c + 1]].tolist()
            logprob, entropy = oracle(logits[row, PROMPT_WIDTH + c - 1], token, kept)
            total = total + (c + 1) * logprob + 0.3 * entropy
    right = torch.autograd.grad(total, list(model.parameters()))
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    with restricted_head(model, MaskedBatch(samples, PROMPT_WIDTH)):
        output, labels = forward(model, input_ids, attention_mask)
    weights = torch.arange(2.0 - PROMPT_WIDTH, 2.0 - PROMPT_WIDTH + labels.shape[1] - 1)
    total = (weights * output.log_probs + 0.3 * output.entropy)[labels[:, 1:] != -100].sum()
    found = torch.autograd.grad(total, list(model.parameters()))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_everything_is_given_back(scored):
    from trl.trainer import utils

    samples, input_ids, attention_mask = scored
    model, own = MODELS["qwen3"](), utils._ChunkedLogProbFunction
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    refused = pytest.raises(RuntimeError, match="sampling masks know")
    with refused, restricted_head(model, MaskedBatch(samples, PROMPT_WIDTH)):
        forward(model, input_ids, attention_mask)
    assert utils._ChunkedLogProbFunction is own
    assert not model._forward_pre_hooks


def test_a_pass_without_the_head_is_an_error(scored):
    samples, input_ids, _ = scored
    model = MODELS["qwen3"]()
    refused = pytest.raises(RuntimeError, match="0 of 3 samples were scored over what their sampling masks keep")
    with refused, restricted_head(model, MaskedBatch(samples, PROMPT_WIDTH)):
        model(input_ids=input_ids)


def test_ids_of_another_model(scored):
    samples, input_ids, attention_mask = scored
    samples[0].mask.ids[1] = VOCAB
    model = MODELS["qwen3"]()
    add_fused_lm_head(model)
    refused = pytest.raises(ValueError, match="but the head of the model has 97 rows")
    with refused, restricted_head(model, MaskedBatch(samples, PROMPT_WIDTH)):
        forward(model, input_ids, attention_mask)


def test_only_what_is_scored_may_be_handed_over(scored):
    """Where Triton runs, TRL hands over the scored predictions alone; the rows are then their ranks."""
    samples, input_ids, attention_mask = scored
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :PROMPT_WIDTH] = -100
    mask = labels[:, 1:] != -100
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 9, HIDDEN), torch.randn(VOCAB, HIDDEN)
    results = []
    for compact in (False, True):
        with restricted_head(torch.nn.Identity(), batch := MaskedBatch(samples, PROMPT_WIDTH)):
            from trl.trainer import utils

            head = utils._ChunkedLogProbFunction
            head.see(None, (), {"fused_lm_head": True, "input_ids": input_ids, "labels": labels})
            states = hidden[mask] if compact else hidden.flatten(0, 1)
            targets = labels[:, 1:][mask] if compact else labels[:, 1:].clamp(min=0).flatten()
            result = head.apply(states, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))
            results.append([each if compact else each.view(3, 9)[mask] for each in result[:2]])
        batch.check_done()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape == (10,)
        assert one.abs().min() > 0 or compact
