"""What sampling masks cost: training steps over the kept tokens, by turns with steps over the whole vocabulary.

Legend: B batch, T tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from trl_r3.masks.masked_batch import MaskedBatch
from trl_r3.masks.restricted_head import restricted_head
from trl_r3.records.samples import Sample
from trl_r3.records.sampling_mask import SamplingMask, kept_rows

from .costs import cost, paired
from .setup import BenchSettings, Finding, random_ids


def mask_cost(settings: BenchSettings) -> list[Finding]:
    """
    Forward, backward and update with TRL's head, with masks of few and of many ids a token and without.

    Kept are the likeliest tokens of each position and the sampled one, as top-k leaves them.
    """
    model = dense_model(settings, vocab_size=settings.vocabulary).train()
    ids, prompt = random_ids(model, settings.batch, settings.length), settings.length // 4
    findings: list[Finding] = []
    with torch.no_grad():
        scores_BTV = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for count in settings.kept:
        samples = [
            Sample(i, ids[i], prompt, torch.empty(0), mask=_likeliest(scores_BTV[i], ids[i, prompt:], count))
            for i in range(settings.batch)
        ]
        masks = [sample.mask for sample in samples if sample.mask is not None]
        tokens = sum(map(len, masks))

        @contextmanager
        def prepare(masked: bool, samples: list[Sample] = samples) -> Iterator[Callable[[], None]]:
            def step() -> None:
                labels = ids.clone()
                labels[:, :prompt] = -100
                with restricted_head(model, MaskedBatch(samples, prompt)) if masked else nullcontext():
                    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
                (-output.log_probs.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()

            yield step

        vocabulary = model.config.vocab_size
        findings += cost(
            f"step with masks, {count} of {vocabulary:,} ids", 1.03, *paired(prepare, settings.mask_pairs)
        )
        nbytes = sum(mask.nbytes for mask in masks)
        bound = sum(4 * len(mask.ids) for mask in masks) + 8 * tokens
        findings.append(Finding(f"bytes of masks over bound, {count} ids a token", nbytes / bound, 1.0))
    return findings


def _likeliest(scores_CV: Tensor, tokens: Tensor, count: int) -> SamplingMask:
    kept_CV = torch.zeros(scores_CV.shape, dtype=torch.bool)
    kept_CV.scatter_(1, scores_CV.topk(count - 1).indices, True).scatter_(1, tokens[:, None], True)
    return SamplingMask.of(kept_rows(torch.where(kept_CV, 0.0, -torch.inf)))


def dense_model(settings: BenchSettings, **changes: Any) -> Any:
    """A Qwen3 with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": settings.hidden_size,
        "intermediate_size": 2 * settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": settings.hidden_size // 4,
        "max_position_embeddings": 512,
    }
    config = Qwen3Config(**{**sizes, **changes}, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config)
