"""Transformers' continuous batching: which tokens of which request each packed forward held, and what it drew.

Legend: N tokens of a packed forward, D requests of it that draw a token, R rows of a request, C its completion tokens,
L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._compat import swapped
from ..records.metrics import drawn_logprobs
from ..records.sampling_mask import SamplingMask, kept_rows
from ..routers.passes import RecordedRoutes
from ..routers.router_replay import RouterReplay
from ._compat_engines import batching_sampler, batching_step
from .turns import MakeTurn, Prompts, SamplingTrainer, Turn


class Draw(NamedTuple):
    """A sampled token, its log-probability, and what was left to draw from, where that is recorded."""

    token: int
    logprob: float
    kept: Tensor | None


class RecordedSteps:
    """
    What the steps of a call of `generate_batch` did, by request: rows, draws.

    Args:
        recorded ([`RecordedRoutes`], *optional*):
            What the routers of the model record; `None` where no routes are wanted.
    """

    def __init__(self, recorded: RecordedRoutes | None):
        self._recorded = recorded
        self._draws: dict[str, dict[int, Draw]] = {}  # by request and position
        self._rows: dict[str, list[Tensor]] = {}
        self._filled: dict[str, int] = {}

    def add_step(self, fed: Sequence[tuple[str, int, int]]) -> None:
        """
        Take the routes of the forward that has just run.

        Args:
            fed (sequence of `tuple[str, int, int]`):
                Request, position of its first token and number of its tokens, in the order they are packed.
        """
        if self._recorded is None:
            return
        packed = self._recorded.forwards.pop()[0]
        self._recorded.tokens.clear()
        expected = sum(count for _, _, count in fed)
        if self._recorded.forwards or packed.shape[0] != expected:
            raise RuntimeError(
                f"a step of continuous batching ran {len(self._recorded.forwards) + 1} forwards and routed "
                f"{packed.shape[0]} tokens, expected 1 and {expected}: a compiled or padded step cannot be recorded. "
                f"Leave `transformers_continuous_batching_config` to its defaults."
            )
        for (request, start, _), rows in zip(fed, packed.split([count for _, _, count in fed]), strict=True):
            filled = self._filled.get(request, 0)
            if start > filled:
                raise RuntimeError(
                    f"{request} went on at token {start}, but only {filled} tokens of it were routed: it shares cache "
                    f"blocks with another request. Set `allow_block_sharing=False`."
                )
            # an evicted request is prefilled again; what was routed first gave the sampled tokens
            new = rows[filled - start :]
            if new.shape[0]:
                self._rows.setdefault(request, []).append(new)
                self._filled[request] = filled + new.shape[0]

    def add_draws(
        self, drew: Sequence[tuple[str, int]], tokens: Tensor, logits_DV: Tensor, scores_DV: Tensor | None = None
    ) -> None:
        """
        Score the tokens that a step drew.

        Args:
            drew (sequence of `tuple[str, int]`):
                Request and position of each of its tokens.
            tokens (`torch.Tensor` of shape `(D,)`):
                The tokens.
            logits_DV (`torch.Tensor` of shape `(D, V)`):
                The logits of the model divided by the temperature.
            scores_DV (`torch.Tensor` of shape `(D, V)`, *optional*):
                What was drawn from, -inf where it was cut. Log-probabilities are over what is left then, else over the
                whole vocabulary.
        """
        kept: Sequence[Tensor | None] = [None] * len(drew)
        if scores_DV is not None:
            kept, logits_DV = kept_rows(scores_DV), logits_DV.masked_fill(scores_DV == -torch.inf, -torch.inf)
        logprobs = drawn_logprobs(logits_DV, tokens)
        for (request, position), *draw in zip(drew, tokens.tolist(), logprobs.tolist(), kept, strict=True):
            # an evicted request is prefilled again; what was drawn first stays
            self._draws.setdefault(request, {}).setdefault(position, Draw(*draw))

    def rows(self, request: str) -> Tensor:
        """Ids of shape `(R, L, K)` of a request, on the host."""
        return torch.cat(self._rows[request]).cpu()

    def draws(self, request: str, output: Any) -> list[Draw]:
        """Of the C tokens that a request sampled: what `output` says of them is normalised over what was kept."""
        drawn = self._draws.get(request, {})
        first, tokens = len(output.prompt_ids), list(output.generated_tokens)
        draws = []
        for position, token in enumerate(tokens, first):
            draw = drawn.get(position)
            if draw is None or draw.token != token:
                raise RuntimeError(
                    f"{request} returned token {token} at position {position}, but its steps drew "
                    f"{draw and draw.token}, so its log-probability is unknown. Generate without continuous batching."
                )
            draws.append(draw)
        return draws

    def logprobs(self, request: str, output: Any) -> Tensor:
        """Of shape `(C,)`, of the tokens that a request sampled."""
        return torch.tensor([draw.logprob for draw in self.draws(request, output)], dtype=torch.float32, device="cpu")

    def mask(self, request: str, output: Any) -> SamplingMask:
        """Of C rows."""
        return SamplingMask.of([draw.kept for draw in self.draws(request, output) if draw.kept is not None])

    def check(self, inputs: Sequence[Sequence[int]], outputs: dict[str, Any]) -> None:
        """Refuse a call that lost requests: TRL would pair what is left with the wrong prompts."""
        failed = [request for request, output in outputs.items() if output.error is not None]
        if len(outputs) != len(inputs) or failed:
            reason = f"; {failed[0]} failed with: {outputs[failed[0]].error.rstrip('.')}" if failed else ""
            raise RuntimeError(
                f"continuous batching returned {len(outputs) - len(failed)} of {len(inputs)} requests{reason}. If its "
                f"cache was too small, raise `max_memory_percent`; else generate without it."
            )
        if self._recorded is None:
            return
        for request, output in outputs.items():
            expected = len(output.prompt_ids) + len(output.generated_tokens) - 1
            if self._filled.get(request, 0) < expected:
                raise RuntimeError(
                    f"{request} has {self._filled.get(request, 0)} recorded rows for {expected + 1} tokens, expected "
                    f"{expected}. Generate without continuous batching."
                )
            self._rows[request] = [self.rows(request)[:expected]]


@contextmanager
def recorded_steps(replay: RouterReplay | None, temperature: float, masks: bool = False) -> Iterator[RecordedSteps]:
    """
    Record every step of continuous batching inside.

    Args:
        replay ([`RouterReplay`], *optional*):
            Handle on the model that generates; `None` to record no routes.
        temperature (`float`):
            What the trainer divides logits by.
        masks (`bool`, *optional*, defaults to `False`):
            Whether to record what sampling kept.

    Yields:
        [`RecordedSteps`].
    """
    with replay.record() if replay is not None else nullcontext() as recorded:
        steps = RecordedSteps(recorded)

        def step(own_step: Any, processor: Any, model: Any) -> None:
            in_batch = processor.inputs_and_outputs.requests_in_batch
            # the offset already counts what this step feeds
            fed = [
                (each.state.request_id, each.state.position_offset - each.query_length, each.query_length)
                for each in in_batch
            ]
            # a request that is still prefilling draws nothing
            drew = [(each.state.request_id, each.state.position_offset) for each in in_batch if each.has_new_token]
            scores: list[Tensor] = []
            sampler = batching_sampler(processor, scores) if masks else nullcontext()
            with _logits_of_draws(model, temperature, len(drew)) as logits, sampler:
                own_step(processor, model)
            steps.add_step(fed)
            tokens = processor.inputs_and_outputs.output_ids[0, : len(drew)]
            steps.add_draws(drew, tokens, logits[0], scores[0][0, : len(drew)] if masks else None)

        with batching_step(step):
            yield steps


@contextmanager
def _logits_of_draws(model: nn.Module, temperature: float, count: int) -> Iterator[list[Tensor]]:
    """Take the logits `(D, V)` that a step draws from, before it processes them in place; D is `count`."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        logits = output.logits[0]
        if "logits_to_keep" not in kwargs:  # a model that computes all of them
            logits = logits[kwargs["logits_indices"]]
        taken.append(logits[:count].detach().float() / temperature)

    handle = model.register_forward_hook(take, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


@contextmanager
def recorded_batches(trainer: SamplingTrainer, replay: RouterReplay | None, masks: bool) -> Iterator[MakeTurn]:
    """
    Record one call of `trainer._generate_single_turn`, by continuous batching.

    Args:
        trainer, replay, masks:
            As in [`~trl_r3.engines.generate.recorded_generate`].

    Yields:
        What makes the [`Turn`] once the call has returned.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    own_generate, calls = model.generate_batch, []

    def generate_batch(inputs, *args, **kwargs):
        with recorded_steps(replay, trainer.temperature, masks) as steps:
            outputs = own_generate(inputs, *args, **kwargs)
        steps.check(inputs, outputs)
        calls.append((steps, outputs))
        return outputs

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        ((steps, outputs),) = calls
        records = [] if replay is None else [steps.rows(request) for request in outputs]
        logprobs = [steps.logprobs(request, output) for request, output in outputs.items()]
        kept = [steps.mask(request, output) for request, output in outputs.items()] if masks else None
        return Turn(prompt_ids, completion_ids, records, logprobs, kept)

    with swapped(model, "generate_batch", generate_batch):
        yield make_turn


def recordable_config(config: Any) -> None:
    """
    Set what recording needs: one plain forward a step, in which every token of a request is fed.

    Args:
        config (`transformers.ContinuousBatchingConfig`):
            Changed in place.
    """
    config.allow_block_sharing = False  # a duplicate of a prompt would be served from the cache, unrouted
    config.use_async_batching = False
    config.use_cuda_graph = False
    config.varlen_compile_config = None
    config.decode_compile_config = None
    config.default_compile_level = 0
