"""Routes of Transformers' continuous batching: which tokens of which request each packed forward held.

Legend: N tokens of a packed forward, D requests of it that draw a token, R rows of a request, C its completion tokens,
L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from .._compat import swapped
from ..records.sources import RecordedRoutes
from ..routers.router_replay import RouterReplay


class RecordedBatches:
    """The rows and log-probabilities of each request, collected over the steps of a call of `generate_batch`."""

    def __init__(self, recorded: RecordedRoutes):
        self._recorded = recorded
        self._drawn: dict[str, dict[int, tuple[int, float]]] = {}  # by position: token, log-probability
        self._rows: dict[str, list[Tensor]] = {}
        self._filled: dict[str, int] = {}

    def add_step(self, fed: Sequence[tuple[str, int, int]]) -> None:
        """
        Take the forward that has just run.

        Args:
            fed (sequence of `tuple[str, int, int]`):
                Request, position of its first token and number of its tokens, in the order they are packed.
        """
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

    def add_draws(self, drew: Sequence[tuple[str, int]], tokens: Tensor, logits: Tensor) -> None:
        """
        Score the tokens that a step drew.

        Args:
            drew (sequence of `tuple[str, int]`):
                Request and position of each of its tokens.
            tokens (`torch.Tensor` of shape `(D,)`), logits (`torch.Tensor` of shape `(D, V)`):
                The tokens, and the logits of the model divided by the temperature.
        """
        logprobs = logits.gather(1, tokens[:, None].long())[:, 0] - logits.logsumexp(1)
        for (request, position), token, logprob in zip(drew, tokens.tolist(), logprobs.tolist(), strict=True):
            # an evicted request is prefilled again; what was drawn first stays
            self._drawn.setdefault(request, {}).setdefault(position, (token, logprob))

    def rows(self, request: str) -> Tensor:
        """Ids of shape `(R, L, K)` of a request, on the host."""
        return torch.cat(self._rows[request]).cpu()

    def logprobs(self, request: str, output: Any) -> Tensor:
        """
        Of shape `(C,)`, of the tokens that a request sampled, over the whole vocabulary: those of `output` are
        normalised over what truncated sampling kept.
        """
        drawn = self._drawn.get(request, {})
        first, tokens = len(output.prompt_ids), list(output.generated_tokens)
        draws = [drawn.get(first + i, (None, float("nan"))) for i in range(len(tokens))]
        wrong = [i for i, (token, _) in enumerate(draws) if token != tokens[i]]
        if wrong:
            raise RuntimeError(
                f"{request} returned token {tokens[wrong[0]]} at position {first + wrong[0]}, but its steps drew "
                f"{draws[wrong[0]][0]}, so its log-probability is unknown. Generate without continuous batching."
            )
        return torch.tensor([logprob for _, logprob in draws])

    def check(self, inputs: Sequence[Sequence[int]], outputs: dict[str, Any]) -> None:
        """Refuse a call that lost requests: TRL would pair what is left with the wrong prompts."""
        failed = [request for request, output in outputs.items() if output.error is not None]
        if len(outputs) != len(inputs) or failed:
            reason = f"; {failed[0]} failed with: {outputs[failed[0]].error.rstrip('.')}" if failed else ""
            raise RuntimeError(
                f"continuous batching returned {len(outputs) - len(failed)} of {len(inputs)} requests{reason}. If its "
                f"cache was too small, raise `max_memory_percent`; else generate without it."
            )
        for request, output in outputs.items():
            expected = len(output.prompt_ids) + len(output.generated_tokens) - 1
            if self._filled.get(request, 0) < expected:
                raise RuntimeError(
                    f"{request} has {self._filled.get(request, 0)} recorded rows for {expected + 1} tokens, expected "
                    f"{expected}. Generate without continuous batching."
                )
            self._rows[request] = [self.rows(request)[:expected]]


@contextmanager
def recorded_batches(replay: RouterReplay, temperature: float) -> Iterator[RecordedBatches]:
    """
    Record every step of continuous batching inside.

    Args:
        replay ([`RouterReplay`]):
            Handle on the model that generates.
        temperature (`float`):
            What the trainer divides logits by.

    Yields:
        [`RecordedBatches`].
    """
    own_step = ContinuousBatchProcessor._generation_step
    with replay.record() as recorded:
        batches = RecordedBatches(recorded)

        def step(processor: Any, model: Any) -> None:
            in_batch = processor.inputs_and_outputs.requests_in_batch
            # the offset already counts what this step feeds
            fed = [
                (each.state.request_id, each.state.position_offset - each.query_length, each.query_length)
                for each in in_batch
            ]
            # a request that is still prefilling draws nothing
            drew = [(each.state.request_id, each.state.position_offset) for each in in_batch if each.has_new_token]
            with logits_of_draws(model, temperature, len(drew)) as taken:
                own_step(processor, model)
            batches.add_step(fed)
            (logits,) = taken
            batches.add_draws(drew, processor.inputs_and_outputs.output_ids[0, : len(drew)], logits)

        with swapped(ContinuousBatchProcessor, "_generation_step", step):
            yield batches


@contextmanager
def logits_of_draws(model: nn.Module, temperature: float, count: int) -> Iterator[list[Tensor]]:
    """
    Take the logits `(D, V)` that a step draws from, before it processes them in place.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        temperature (`float`):
            What to divide them by.
        count (`int`):
            D; what comes behind is padding.
    """
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
