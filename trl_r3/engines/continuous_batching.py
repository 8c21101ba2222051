"""Routes of Transformers' continuous batching: which tokens of which request each packed forward held.

Legend: N tokens of a packed forward, R rows of a request, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from .._compat import swapped
from ..records.sources import RecordedRoutes
from ..routers.router_replay import RouterReplay


class RecordedBatches:
    """The rows of each request, collected over the steps of a call of `generate_batch`."""

    def __init__(self, recorded: RecordedRoutes):
        self._recorded = recorded
        self._rows: dict[str, list[Tensor]] = {}
        self._filled: dict[str, int] = {}
        self._logprobs: dict[tuple[str, int], float] = {}  # by request and position

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

    def add_draws(self, drawn: Sequence[tuple[str, int]], logprobs: Tensor) -> None:
        """
        Take what a step has sampled.

        Args:
            drawn (sequence of `tuple[str, int]`):
                Request, and position of the token that was drawn for it.
            logprobs (`torch.Tensor` of shape `(requests,)`):
                Log-probabilities of the tokens.
        """
        for place, value in zip(drawn, logprobs.tolist(), strict=True):
            self._logprobs.setdefault(place, value)

    def logprobs(self, request: str, output: Any) -> Tensor:
        """(C,) log-probabilities of the tokens of a request, over the whole vocabulary."""
        first = len(output.prompt_ids)
        return torch.tensor([self._logprobs[request, first + i] for i in range(len(output.generated_tokens))])

    def rows(self, request: str) -> Tensor:
        """Ids of shape `(R, L, K)` of a request, on the host."""
        return torch.cat(self._rows[request]).cpu()

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

    The engine's own log-probabilities are over the tokens that top-p and its like have kept. Those recorded here are
    over the whole vocabulary, as the trainer scores them.

    Args:
        replay ([`RouterReplay`]):
            Handle on the model that generates.
        temperature (`float`):
            That of the sampling.

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
            logits: list[Tensor] = []
            handle = model.register_forward_hook(lambda module, args, output: logits.append(output.logits))
            try:
                own_step(processor, model)
            finally:
                handle.remove()
            batches.add_step(fed)
            drawn = [
                (request, start + count)
                for each, (request, start, count) in zip(in_batch, fed, strict=True)
                if each.has_new_token
            ]
            batches.add_draws(drawn, _sampled_logprobs(processor, model, logits[0], len(drawn), temperature))

        with swapped(ContinuousBatchProcessor, "_generation_step", step):
            yield batches


def _sampled_logprobs(processor: Any, model: Any, logits: Tensor, count: int, temperature: float) -> Tensor:
    """(requests,) log-probabilities of the tokens that a step has just sampled."""
    buffers = processor.inputs_and_outputs
    # the model has kept the rows that predict, or those of all tokens that were fed
    keeps = processor.model_runner.supports_logits_to_keep(model)
    rows = logits[0, :count] if keeps else logits[0, buffers.logits_indices[:count]]
    logprobs = (rows.float() / temperature).log_softmax(-1)
    return logprobs.gather(1, buffers.output_ids[0, :count, None].long()).squeeze(1)


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
