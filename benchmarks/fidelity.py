"""What replay keeps: the mismatch that is left, the ids that run, the bits of a forward.

Legend: B batch, T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trl_r3._compat import set_checkpointing
from trl_r3.cli.demo.rounding import in_bfloat16
from trl_r3.cli.experts import executed_ids
from trl_r3.engines.generate import generate_with_routes
from trl_r3.records.metrics import k3_kl
from trl_r3.records.record import unpack
from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, random_ids, record_of, small_model

CHECKPOINTING: dict[str, dict[str, bool] | None] = {
    "no checkpointing": None,
    "non-reentrant checkpointing": {"use_reentrant": False},
    "reentrant checkpointing": {"use_reentrant": True},
}


def mismatch(settings: BenchSettings) -> list[Finding]:
    """A rollout in bfloat16, scored in float32: live, and with its routes."""
    model = small_model().eval()
    prompts = random_ids(model, settings.scored, 8)
    with RouterReplay(model) as replay:
        with in_bfloat16(model):
            kwargs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": True}
            kwargs["max_new_tokens"] = kwargs["min_new_tokens"] = 48
            rollout = generate_with_routes(model, replay, model.generate, (), kwargs, temperature=1.0)
        recorded_BTLK = unpack(rollout.records, replay.layout)
        with torch.no_grad():
            live = _logprobs(model, rollout.sequences, prompts.shape[1])
            with replay.replay(recorded_BTLK) as stats, executed_ids(model) as executed:
                replayed = _logprobs(model, rollout.sequences, prompts.shape[1])
    assert rollout.logprobs is not None  # a temperature was given
    mask = torch.ones_like(rollout.logprobs)
    k3_live, k3_replayed = (float(k3_kl(scored, rollout.logprobs, mask)) for scored in (live, replayed))
    recorded_BTLK = recorded_BTLK[:, :-1]
    executed_BTLK = torch.stack([executed[layer][0] for layer in replay.moe_layers], dim=1).unflatten(
        0, rollout.sequences.shape
    )[:, :-1]
    other = int((executed_BTLK != recorded_BTLK).any(-1).sum())
    return [
        Finding("k3_kl with replay over without", k3_replayed / k3_live, 0.15),
        Finding("k3_kl without replay", k3_live),
        Finding("k3_kl with replay", k3_replayed),
        Finding("rows whose live selection differs, replay on", int(stats.changed_routers)),
        Finding(f"rows of {recorded_BTLK[..., 0].numel()} that execute other ids than recorded", other, 0),
    ]


def _logprobs(model: Any, sequences: Tensor, prompt_width: int) -> Tensor:
    logits = model(input_ids=sequences, use_cache=False).logits[:, prompt_width - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, sequences[:, prompt_width:, None])[..., 0]


def own_record(settings: BenchSettings) -> list[Finding]:
    """Bits by which logits and gradients change when a forward replays its own record."""
    findings = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, checkpointing in CHECKPOINTING.items():
            model = small_model().to(dtype).train()
            if checkpointing is not None:
                set_checkpointing(model, checkpointing)
            ids = random_ids(model, 4, 32)
            with RouterReplay(model) as replay:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # checkpoints without gradients
                    record = record_of(model, replay, ids)
                one = _forward_backward(model, ids, nullcontext())
                other = _forward_backward(model, ids, replay.replay(record))
            differing = sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))
            label = f"own record replayed, {str(dtype)[6:]}, {name}: differing elements"
            findings.append(Finding(label, differing, 0))
    return findings


def _forward_backward(model: Any, ids: Tensor, context: Any) -> list[Tensor]:
    """Logits and all gradients."""
    with context:
        output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    tensors = [output.logits.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return tensors
