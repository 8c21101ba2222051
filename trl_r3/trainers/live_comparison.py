"""A rollout that is scored once more, with live routing, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ._compat_trainers import beside_tokens
from .log import counted_tokens, warn_if_worse
from .session import ReplaySession, Scoring


def compare_with_live(
    trainer: Any, session: ReplaySession, output: dict[str, Any], old_logprobs: Tensor | None
) -> Tensor:
    """
    Score a rollout with live routing, log how far that is from the rollout, and warn if replay is further.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Whose pass scores.
        session ([`ReplaySession`]):
            Its state, with the rollout.
        output (dict of `str`):
            What TRL made of the rollout.
        old_logprobs (`torch.Tensor` of shape `(B, C)`, *optional*):
            Of the pass that replayed.

    Returns:
        `torch.Tensor` of shape `(B, C)`: The log-probabilities, in nats.
    """
    assert session.rollout is not None  # there is something to compare
    samples = session.rollout.samples
    input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        session.scores(Scoring(samples, goes_live=True)),
    ):
        live = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            input_ids,
            attention_mask,
            output["completion_ids"].size(1),
            batch_size=trainer.args.per_device_train_batch_size,
            **beside_tokens(output),
        )[0]
    session.log_mismatch(output, samples, live, prefix="sampling/live")
    rollout_logprobs = session.rollout_logprobs(output, samples)
    if old_logprobs is not None and rollout_logprobs is not None:
        warn_if_worse(old_logprobs, live, rollout_logprobs, counted_tokens(output))
    return live
