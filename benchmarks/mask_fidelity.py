"""What sampling masks keep: the mismatch of truncated rollouts, with masks and without.

Legend: B batch, T tokens, C completion tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from trl_r3.cli.demo.rounding import in_bfloat16
from trl_r3.engines.generate import generate_with_routes
from trl_r3.masks.masked_batch import MaskedBatch
from trl_r3.masks.restricted_head import restricted_head
from trl_r3.records.metrics import mismatch_sums
from trl_r3.records.samples import Sample

from .masks import dense_model
from .setup import BenchSettings, Finding, random_ids

_PROMPT, _SEQUENCES = 8, 32


def mask_mismatch(settings: BenchSettings) -> list[Finding]:
    """Rollouts of a dense model at top_p 0.8 and 1, scored in float32 over what was kept and over everything."""
    torch.manual_seed(0)
    sizes = {"vocab_size": settings.scored_vocabulary, "num_hidden_layers": 2, "initializer_range": 0.1}
    model = dense_model(settings, **sizes).eval()
    add_fused_lm_head(model)
    exact, whole = _k3(model, settings, 0.8, low=False)
    masked, _ = _k3(model, settings, 0.8, low=True)
    _, full = _k3(model, settings, 1.0, low=True)
    return [
        Finding("k3_kl at top_p 0.8 in float32, with masks", exact, 1e-10),
        Finding("k3_kl at top_p 0.8 in float32, without", whole),
        Finding("k3_kl, bfloat16 rollouts: top_p 0.8 with masks over top_p 1", masked / full, 1.5),
        Finding("k3_kl, bfloat16 rollouts, top_p 0.8 with masks", masked),
        Finding("k3_kl, bfloat16 rollouts, top_p 1", full),
    ]


def _k3(model: Any, settings: BenchSettings, top_p: float, low: bool) -> tuple[float, float]:
    """Over what was kept, and over the whole vocabulary."""
    sums = torch.zeros(2, 2, dtype=torch.float64)  # k3 and tokens, with masks and without
    for batch in range(settings.scored_batches):
        prompts = random_ids(model, _SEQUENCES, _PROMPT).roll(batch, 0)
        kwargs: dict[str, Any] = {"do_sample": True, "top_p": top_p, "top_k": 0, "max_new_tokens": settings.new_tokens}
        kwargs |= {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
        with in_bfloat16(model) if low else nullcontext():
            generated = generate_with_routes(model, None, model.generate, (), kwargs, temperature=1.0, keeps=True)
        sequences = generated.sequences
        turn = generated.turn(prompts.tolist(), sequences[:, _PROMPT:].tolist())
        assert turn.masks is not None and turn.logprobs is not None
        samples = [Sample(i, ids, _PROMPT, torch.empty(0), mask=turn.masks[i]) for i, ids in enumerate(sequences)]
        rollout = torch.stack(list(turn.logprobs))
        for row, masked in enumerate((True, False)):
            scored = _scores(model, sequences, samples if masked else None)
            k3, _, count = mismatch_sums(scored, rollout, torch.ones_like(rollout))
            sums[row] += torch.stack([k3, count])
    with_masks, without = (sums[:, 0] / sums[:, 1]).tolist()
    return with_masks, without


def _scores(model: Any, sequences: Tensor, samples: list[Sample] | None) -> Tensor:
    labels = sequences.clone()
    labels[:, :_PROMPT] = -100
    head = nullcontext() if samples is None else restricted_head(model, MaskedBatch(samples, _PROMPT))
    with torch.no_grad(), head:
        return model(input_ids=sequences, labels=labels, fused_lm_head=True).log_probs[:, _PROMPT - 1 :]
