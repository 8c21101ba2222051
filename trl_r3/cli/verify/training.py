"""The training forward over a rollout: scores, what the experts executed, gradients.

Legend: B samples, T tokens of a padded sequence, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._compat import set_checkpointing
from ...records.metrics import k3_kl
from ...records.record import lay_out, unpack
from ...records.samples import Observation, Sample, ScoredBatch
from ...routers.router_replay import RouterReplay
from ..models import LoadedModel
from .executed import Executed, watch_experts
from .sampling import VerifiedRollout

CHECKPOINTING: dict[str, dict[str, bool] | None] = {
    "none": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


@dataclass
class Batch:
    """A rollout as the trainer lays it out: prompts padded on the left, completions on the right."""

    samples: list[Sample]
    prompt_width: int
    input_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    completion_mask: Tensor  # (B, C)

    @classmethod
    def of(cls, rollout: VerifiedRollout, records: list[Tensor], device: torch.device) -> Batch:
        """Of a rollout and its packed records."""
        pairs = list(zip(rollout.prompt_ids, rollout.completion_ids, strict=True))
        width = max(len(prompt) for prompt, _ in pairs)
        length = max(len(completion) for _, completion in pairs)
        samples = [
            Sample(i, torch.tensor([*prompt, *completion]), len(prompt), record)
            for i, ((prompt, completion), record) in enumerate(zip(pairs, records, strict=True))
        ]
        ids, mask = torch.empty(2, len(pairs), width + length, dtype=torch.int64)
        prompts = [sample.prompt_length for sample in samples]
        lay_out([sample.tokens for sample in samples], prompts, width, ids, 0)
        lay_out([torch.ones_like(sample.tokens) for sample in samples], prompts, width, mask, 0)
        return cls(samples, width, ids.to(device), mask.to(device), mask[:, width:].bool())

    def source(self, replay: RouterReplay, observes: bool = False) -> ScoredBatch:
        """What `replay_from` takes."""
        return ScoredBatch(self.samples, self.prompt_width, replay.layout, observes)

    def record(self, replay: RouterReplay) -> Tensor:
        """(B, T, L, K) ids; -1 where there is no row."""
        return unpack(self.source(replay).take(*self.input_ids.shape), replay.layout)


@torch.no_grad()
def score(policy: LoadedModel, batch: Batch, temperatures: Sequence[float]) -> dict[float, Tensor]:
    """
    Score the sampled tokens as TRL does: logits over the temperature, the whole vocabulary.

    Args:
        policy ([`~trl_r3.cli.models.LoadedModel`]):
            What scores.
        batch ([`Batch`]):
            The rollout.
        temperatures (sequence of `float`):
            What to divide the logits by.

    Returns:
        `dict[float, torch.Tensor]` of shape `(B, C)` each: By temperature.
    """
    logits = policy(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False).logits
    logits = logits[:, batch.prompt_width - 1 : -1].float()
    sampled = batch.input_ids[:, batch.prompt_width :, None]
    return {each: (logits / each).log_softmax(-1).gather(-1, sampled)[..., 0].cpu() for each in temperatures}


def padding_k3(policy: LoadedModel, batch: Batch, scores_BC: Tensor, temperature: float) -> float:
    """
    How far the scores of the sample with the shortest prompt are from those that it has alone, without padding.

    Args:
        policy ([`~trl_r3.cli.models.LoadedModel`]):
            What scores.
        batch ([`Batch`]):
            The rollout.
        scores_BC (`torch.Tensor` of shape `(B, C)`):
            Of the padded batch, at `temperature`.
        temperature (`float`):
            What to divide the logits by.

    Returns:
        `float`: k3; next to nothing, unless the forward of the model depends on padding.
    """
    row = min(range(len(batch.samples)), key=lambda i: batch.samples[i].prompt_length)
    width, size = batch.samples[row].prompt_length, int(batch.completion_mask[row].sum())
    there = slice(batch.prompt_width - width, batch.prompt_width + size)
    ids, mask = batch.input_ids[row : row + 1, there], batch.mask[row : row + 1, there]
    alone = Batch([batch.samples[row]], width, ids, mask, mask[:, width:].bool())
    scores = score(policy, alone, [temperature])[temperature]
    return float(k3_kl(scores, scores_BC[row : row + 1, :size], alone.completion_mask.cpu()))


@dataclass
class ReplayedScores:
    """What a replayed forward gives beside its scores."""

    scores: dict[float, Tensor]  # as of [`score`]
    observations: list[Observation]
    executed: Executed
    changed: int  # (row, layer) pairs in which live routing would have differed
    compared: int  # pairs


def score_replayed(
    policy: LoadedModel, replay: RouterReplay, batch: Batch, temperatures: Sequence[float]
) -> ReplayedScores:
    """As [`score`], through the recorded experts."""
    source = batch.source(replay, observes=True)
    with watch_experts(policy.model, replay) as executed, replay.replay_from(source) as stats:
        scores = score(policy, batch, temperatures)
    layers = len(replay.moe_layers)
    return ReplayedScores(
        scores, source.observations, executed, int(stats.changed_routers), int(stats.compared_tokens) * layers
    )


@dataclass
class Gradients:
    """
    Gradients of a replayed loss with one kind of checkpointing.

    Args:
        values (`dict[str, torch.Tensor]`):
            Of routers and input embedding, by name; of what the embedding returns, where the weights are sharded.
        executed ([`Executed`]):
            By the forward and by the recompute.
        error (`str`, *optional*):
            What backward raised instead.
    """

    values: dict[str, Tensor]
    executed: Executed
    error: str | None = None


def replayed_gradients(policy: LoadedModel, replay: RouterReplay, batch: Batch, kind: str) -> Gradients:
    """
    Backward through the recorded experts.

    Only routers and input embedding get a gradient, which goes through every layer: so it fits beside the largest
    model. With sharded weights it is what the embedding returns: no process holds it in parts.
    """
    model = policy.model
    wanted = {} if policy.sharding else _routers_and_embedding(model, replay)
    device = batch.input_ids.device
    with (
        _training(model, wanted, kind),
        _gradients_of_inputs(model, policy.sharding is not None) as inputs,
        torch.random.fork_rng([device] if device.type != "cpu" else []),
    ):
        torch.manual_seed(0)  # of dropout, which has to be the same in each run
        with watch_experts(model, replay) as executed:
            with replay.replay_from(batch.source(replay)):
                logits = policy(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False).logits
            logits = logits[:, batch.prompt_width - 1 : -1].float()
            picked = logits.log_softmax(-1).gather(-1, batch.input_ids[:, batch.prompt_width :, None])[..., 0]
            try:
                (-picked[batch.completion_mask.to(device)].mean()).backward()
            except RuntimeError as error:  # a recompute that is not what its forward was
                if policy.sharding is not None:
                    raise  # other processes are in backward still, and would meet another forward
                return Gradients({}, executed, str(error).splitlines()[0])
        values = {name: p.grad.detach().clone() for name, p in wanted.items() if p.grad is not None}
        values |= {f"input {i}": x.grad.detach().clone() for i, x in enumerate(inputs) if x.grad is not None}
    return Gradients(values, executed)


@contextmanager
def _gradients_of_inputs(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """What the input embedding returns: if wanted, it gets a gradient although no weight does."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.requires_grad_().retain_grad()
        embedded.append(output)

    handles = [model.get_input_embeddings().register_forward_hook(keep)] if wanted else []
    try:
        yield embedded
    finally:
        for handle in handles:
            handle.remove()


def _routers_and_embedding(model: Any, replay: RouterReplay) -> dict[str, nn.Parameter]:
    modules = [model.get_input_embeddings(), *(router.module for router in replay.routers)]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own and p.is_floating_point()}


@contextmanager
def _training(model: Any, wanted: dict[str, nn.Parameter], kind: str) -> Iterator[None]:
    """Training mode with one kind of checkpointing, in which only some parameters get a gradient."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chosen = {id(parameter) for parameter in wanted.values()}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        model.train()
        set_checkpointing(model, CHECKPOINTING[kind])
        yield
    finally:
        set_checkpointing(model, None)
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
