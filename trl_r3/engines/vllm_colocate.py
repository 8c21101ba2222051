"""vLLM inside the training processes: built so that it records, and what its outputs hold.

Legend: P prompt tokens, C completion tokens, R = P + C - 1 rows, D decoder layers, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .._compat import swapped
from ..records.record import RoutingLayout, to_record
from ._compat_engines import pause_in_mode_keep
from .equal_shares import equal_shares
from .known_routes import KnownRoutes
from .turns import MakeTurn, Prompts, SamplingTrainer, Turn
from .vllm_masks import decode_vllm_mask
from .vllm_versions import VLLM_FLAG, check_vllm_masks, check_vllm_version, sleeps_in_mode_keep, vllm_engine_kwargs


class HasRoutedExperts(Protocol):
    """The part of vLLM's `CompletionOutput` that is read here."""

    routed_experts: NDArray[Any] | None


def decode_vllm_output(completion_output: HasRoutedExperts) -> NDArray[np.integer]:
    """
    Take the ids from a `CompletionOutput` of vLLM's `LLM.generate`.

    Args:
        completion_output (`vllm.CompletionOutput`):
            A finished completion.

    Returns:
        `numpy.ndarray` of shape `(R, D, K)` and dtype `uint8` (E <= 256) or `uint16`: the engine's own array.

    Raises:
        `ValueError`: If there are no ids, or they have the layout of vLLM before 0.22.
    """
    ids = completion_output.routed_experts
    if ids is None:
        raise ValueError(
            f"`CompletionOutput.routed_experts` is None: the engine does not capture routes, or the request was "
            f"aborted. {VLLM_FLAG}"
        )
    if not isinstance(ids, np.ndarray):
        raise ValueError(
            f"`CompletionOutput.routed_experts` is a {type(ids).__name__}, expected a numpy.ndarray. Use vLLM 0.22 to "
            f"0.33."
        )
    if ids.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"`CompletionOutput.routed_experts` has dtype {ids.dtype}, expected uint8 or uint16. vLLM before 0.22 "
            f"returns int16, without the prompt's rows, with one slot per MoE layer, and -1 where the prefix cache "
            f"hit. Upgrade to vLLM 0.22 or later."
        )
    if ids.ndim != 3 or 0 in ids.shape:
        raise ValueError(
            f"`CompletionOutput.routed_experts` has shape {ids.shape}, expected 3 dimensions of at least 1: rows "
            f"(prompt + completion - 1), decoder layers, experts per token. Use vLLM 0.22 to 0.33."
        )
    return ids


@contextmanager
def recording_llm(routes: bool, masks: bool, tensor_parallel_size: int) -> Iterator[None]:
    """
    Let a trainer that is constructed inside get a vLLM that returns routes, sampling masks, or both.

    TRL passes no engine arguments on, so the name of its class is swapped in TRL's module while the engine is built.

    Args:
        routes, masks (`bool`):
            What is wanted.
        tensor_parallel_size (`int`):
            Ranks that share one engine.

    Raises:
        `ValueError`: If the installed version cannot return them.
    """
    import vllm
    from trl.generation import vllm_generation

    arguments: dict[str, bool] = {}
    own_llm = vllm_generation.LLM
    if routes:
        check_vllm_version(vllm.__version__, tensor_parallel_size)
        arguments |= vllm_engine_kwargs(vllm.__version__)
    if masks:
        check_vllm_masks(vllm.__version__)
        arguments["return_sampling_mask"] = True

    def build(*args: Any, **kwargs: Any) -> Any:
        llm = own_llm(*args, **arguments, **kwargs)
        if routes and sleeps_in_mode_keep(vllm.__version__):
            pause_in_mode_keep(llm)
        return llm

    with swapped(vllm_generation, "LLM", build):
        yield


@contextmanager
def recorded_llm(
    trainer: SamplingTrainer, layout: RoutingLayout | None, masks: bool, known: KnownRoutes | None
) -> Iterator[MakeTurn]:
    """
    Record one call of `trainer._generate_single_turn`, by a colocated vLLM.

    Args:
        trainer ([`SamplingTrainer`]):
            The trainer.
        layout ([`RoutingLayout`], *optional*):
            Layers and experts of its policy; `None` to record no routes.
        masks (`bool`):
            Whether to record sampling masks.
        known ([`KnownRoutes`], *optional*):
            What the engine has returned in this rollout, where later turns go on from earlier ones.

    Yields:
        What makes the [`Turn`] once the call has returned.
    """
    llm, outputs = trainer.vllm_generation.llm, []
    own_generate = llm.generate

    def generate(prompts, sampling_params=None, **kwargs):
        if known is not None:
            sampling_params = _only_missing(prompts, sampling_params, known)
        outputs.extend(own_generate(prompts, sampling_params=sampling_params, **kwargs))
        return outputs

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        answers = [(output, completion) for output in outputs for completion in output.outputs]
        routes = _routes(answers, known) if layout is not None else []
        own = _own_share(trainer, len(prompt_ids))
        records = [to_record(ids, layout, sample) for sample, ids in enumerate(routes[own])] if layout else []
        kept = None
        if masks:
            kept = [
                decode_vllm_mask(getattr(each.sampling_mask, "token_ids", None), len(each.token_ids), sample)
                for sample, (_, each) in enumerate(answers[own])
            ]
        return Turn(prompt_ids, completion_ids, records, masks=kept)

    generation = trainer.vllm_generation
    shares: AbstractContextManager = nullcontext()
    if generation.tensor_parallel_size > 1:
        shares = equal_shares(trainer, "`vllm_tensor_parallel_size=1`", generation.tp_group)
    with shares, swapped(llm, "generate", generate):
        yield make_turn


def _only_missing(prompts: Sequence, sampling: Any, known: KnownRoutes) -> Any:
    """Sampling parameters that leave out the rows which the engine has returned before."""
    starts = [known.start(prompt["prompt_token_ids"]) for prompt in prompts]
    if not any(starts) or not hasattr(sampling, "routed_experts_prompt_start"):  # which an older vLLM lacks
        return sampling
    each = [copy.copy(sampling) for _ in starts]
    for parameters, start in zip(each, starts, strict=True):
        parameters.routed_experts_prompt_start = start
    return each


def _routes(answers: Sequence, known: KnownRoutes | None) -> list[np.ndarray]:
    routes = [decode_vllm_output(completion) for _, completion in answers]
    if known is None:
        return routes
    whole = [
        known.complete(output.prompt_token_ids, completion.token_ids, rows)
        for (output, completion), rows in zip(answers, routes, strict=True)
    ]
    known.end_turn()
    return whole


def _own_share(trainer: SamplingTrainer, count: int) -> slice:
    """Of what a colocated engine made, the part of this process: every rank of a group generates for all of them."""
    generation = trainer.vllm_generation
    if generation.tensor_parallel_size == 1:
        return slice(None)
    first = torch.distributed.get_rank(group=generation.tp_group) * count
    return slice(first, first + count)
