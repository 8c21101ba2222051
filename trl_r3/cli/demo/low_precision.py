"""GRPO whose rollouts run in bfloat16 and whose training runs in float32, and what that does to a batch.

Legend: B batch, C completion tokens, T tokens with padding, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._compat import swapped
from ...engines.generate import Generated, generate_with_routes
from ...records.metrics import changed_router_frac, changed_token_frac, extreme_token_frac, k3_kl
from ...records.record import slice_samples, unpack
from ...records.samples import Sample, ScoredBatch
from ...routers.router_replay import RouterReplay
from ...trainers.grpo import R3GRPOTrainer
from ...trainers.log import sampled_logprobs
from .rounding import in_bfloat16

GAP = (
    "The rollout runs on a copy of the weights rounded to bfloat16 and computes in bfloat16, as inference engines do; "
    "training scores and updates the float32 weights."
)


class LowPrecisionRolloutTrainer(R3GRPOTrainer):
    """
    [`R3GRPOTrainer`] with rollouts in bfloat16, which measures some of its batches.

    A batch is measured before the update that it is for: its completions are scored once with live routing and once
    with the routes of their rollout, by a run without replay as by one with it. Neither touches the training.

    Args:
        measure_every (`int`):
            Measure every so many steps.
        kwargs:
            All other arguments are those of [`R3GRPOTrainer`].
    """

    def __init__(self, *args, measure_every: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.measure_every = measure_every
        self.measured: list[dict[str, float]] = []
        self._unused_rollout: Generated | None = None  # of a run without replay

    @property
    def _measures_now(self) -> bool:
        return self.model.training and self.state.global_step % self.measure_every == 0

    def _rollout_numerics(self, model: Any) -> AbstractContextManager[None]:
        return in_bfloat16(model)

    def _generate_single_turn(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model_wrapped)
        own_generate = model.generate

        def generate(*args, **kwargs):
            if self._measures_now and self._r3 is None:
                return self._captured(model, own_generate, args, kwargs)
            with self._rollout_numerics(model):
                return own_generate(*args, **kwargs)

        with swapped(model, "generate", generate):
            return super()._generate_single_turn(*args, **kwargs)

    def _captured(self, model: Any, own_generate: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Keep the routes of a rollout that is trained on without them."""
        with RouterReplay(model) as replay, self._rollout_numerics(model):  # which may not route alike twice
            rollout = generate_with_routes(model, replay, own_generate, args, kwargs, temperature=self.temperature)
        self._unused_rollout = rollout
        return rollout.output

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._measures_now:
            with ExitStack() as stack:
                model = self.accelerator.unwrap_model(self.model)
                replay = self.routing_replay if self._r3 is not None else stack.enter_context(RouterReplay(model))
                self.measured.append({"step": self.state.global_step, **self._measure(replay, output)})
        return output

    @torch.no_grad()
    def _measure(self, replay: RouterReplay, output: dict[str, Any]) -> dict[str, float]:
        prompt_mask, mask = output["prompt_mask"], output["completion_mask"]
        samples, logprobs = self._samples_of(output)
        batch = partial(ScoredBatch, samples, prompt_mask.shape[1], replay.layout)
        score = partial(
            self._get_per_token_logps_and_entropies,
            self.model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            mask.shape[1],
        )
        with replay.record() as recorded:
            live = score()[0]
        with replay.replay_from(batch()) as stats:
            replayed = score()[0]
        live_BTLK = recorded.routed_experts
        rollout_BTLK = unpack(batch().take(*live_BTLK.shape[:2]), replay.layout)
        tokens = float(stats.recorded_tokens)
        return {
            **mismatch(live, logprobs, mask, "live"),
            "live/changed_router_frac": float(changed_router_frac(live_BTLK, rollout_BTLK)),
            "live/changed_token_frac": float(changed_token_frac(live_BTLK, rollout_BTLK)),
            **mismatch(replayed, logprobs, mask, "replay"),
            "replay/changed_router_frac": float(stats.changed_routers) / tokens / len(replay.moe_layers),
            "replay/changed_token_frac": float(stats.changed_tokens) / tokens,
        }

    def _samples_of(self, output: dict[str, Any]) -> tuple[list[Sample], Tensor]:
        """The samples with their records, and log-probabilities of shape `(B, C)`."""
        if self._r3 is not None and self._r3.rollout is not None:
            logprobs = sampled_logprobs(output, self._r3.rollout.samples)
            assert logprobs is not None  # Transformers generates
            return self._r3.rollout.samples, logprobs
        rollout, self._unused_rollout = self._unused_rollout, None
        assert rollout is not None and rollout.logprobs is not None and rollout.records is not None  # it was captured
        prompts, completions = (output[name].sum(1).tolist() for name in ("prompt_mask", "completion_mask"))
        records = slice_samples(rollout.records, rollout.prompt_width, prompts, completions)
        tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        width = output["prompt_ids"].shape[1]
        samples = [
            Sample(i, ids[width - p : width + c], p, record)
            for i, (ids, p, c, record) in enumerate(zip(tokens, prompts, completions, records, strict=True))
        ]
        return samples, rollout.logprobs[:, : output["completion_ids"].shape[1]]


def mismatch(train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, prefix: str) -> dict[str, float]:
    """k3, F(2) and F(1.1), under a prefix."""
    both = (train_logprobs, rollout_logprobs, mask)
    return {
        f"{prefix}/k3_kl": float(k3_kl(*both)),
        f"{prefix}/extreme_token_frac": float(extreme_token_frac(*both)),
        f"{prefix}/extreme_token_frac_1.1": float(extreme_token_frac(*both, tau=1.1)),
    }
