"""GRPO with the rollouts and the arms of the map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from trl_r3._compat import swapped
from trl_r3.cli.demo.low_precision import LowPrecisionRolloutTrainer
from trl_r3.engines.generate import SampledTokens, drawn_tokens
from trl_r3.routers.router import _Selection

from .cells import Arm
from .numerics import rollout_numerics


class MapTrainer(LowPrecisionRolloutTrainer):
    """
    [`LowPrecisionRolloutTrainer`] with other numerics.

    TRL's importance-sampling correction acts only with `use_vllm`. Where an arm has it, the trainer says so around
    scoring and loss, while Transformers generates and hands over the log-probabilities that it sampled with.

    Args:
        rollout (`str`):
            As in [`Setting`].
        arm ([`Arm`]):
            The arm.
        noise_seed (`int`):
            Of the noise in the rollout.
        kwargs:
            All other arguments are those of [`LowPrecisionRolloutTrainer`].
    """

    def __init__(self, *args, rollout: str, arm: Arm, noise_seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout = rollout
        self.arm = arm
        self.noise = torch.Generator().manual_seed(noise_seed)

    def _rollout_numerics(self, model: Any) -> AbstractContextManager[None]:
        return rollout_numerics(self.rollout, model, self.noise)

    def _generate_single_turn(self, *args, **kwargs):
        if not self.arm.corrects:
            return super()._generate_single_turn(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        own_generate, sampled = model.generate, []

        def generate(*args, **kwargs):
            prompts = args[0] if args else kwargs["input_ids"]
            scores = SampledTokens(model, self.temperature)
            try:
                sequences = own_generate(*args, **kwargs)
            finally:
                scores.remove()
            sampled.extend(scores.logprobs(sequences, drawn_tokens(sequences[:, prompts.shape[1] :], ())))
            return sequences

        with swapped(self, "use_vllm", False), swapped(model, "generate", generate):
            completions, _ = super()._generate_single_turn(*args, **kwargs)
        return completions, [row[: len(ids)].tolist() for row, ids in zip(sampled, completions, strict=True)]

    def _generate_and_score_completions(self, inputs):
        with self._arm_acts():
            return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, *args, **kwargs):
        with self._arm_acts():
            return super()._compute_loss(*args, **kwargs)

    def _arm_acts(self) -> ExitStack:
        with ExitStack() as stack:
            stack.enter_context(swapped(self, "use_vllm", self.arm.corrects))
            if self.arm.floor:
                stack.enter_context(plausible_replay(self.arm.floor))
            return stack.pop_all()


@contextmanager
def plausible_replay(floor: float) -> Iterator[None]:
    """
    Let a replayed selection go, token by token and layer by layer, where the live router finds it implausible.

    That is where one of its experts has a live score below `floor` times the lowest score that live routing selects.
    With a floor of 0 this is replay, with 1 it is live routing.
    """
    own = _Selection._selected

    def selected(self: _Selection, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> Tensor:
        replayed = own(self, args, kwargs, shape)
        if self.replayed_NK is None:
            return replayed
        with torch.no_grad():
            live = torch.topk(*args, **kwargs)
            scores = args[0].gather(-1, replayed)
            plausible = (scores >= floor * live.values.amin(-1, keepdim=True)).all(-1, keepdim=True)
        return torch.where(plausible, replayed, live.indices)

    with swapped(_Selection, "_selected", selected):
        yield
