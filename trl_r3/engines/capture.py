"""Record the routes of one call of TRL's rollout engine, whichever it is.

Legend: P prompt tokens, C completion tokens, L MoE layers, D decoder layers, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._compat import swapped
from ..records.layout import RoutingLayout, select_moe_layers
from ..records.storage import pack, slice_samples
from ..routers.router_replay import RouterReplay
from .continuous_batching import recorded_batches
from .generate import generate_with_routes
from .known_routes import KnownRoutes
from .payloads import decode_vllm_output
from .turns import RolloutRecord, Turn, stitch

Prompts = Sequence[Sequence[int]]
MakeTurn = Callable[[Prompts, Prompts], Turn]  # from prompts and completions, after the call


def to_record(ids: np.ndarray | Tensor, layout: RoutingLayout, sample: int) -> Tensor:
    """
    Bring what an engine returned for one sample into the form of a record.

    Args:
        ids (`numpy.ndarray` or `torch.Tensor` of shape `(P + C - 1, S, K)`):
            Expert ids of any integer dtype, one slot S per MoE layer or one per decoder layer.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        sample (`int`):
            Index that errors name.

    Returns:
        `torch.Tensor` of shape `(P + C - 1, L, K)`: Packed ids on the host, in memory of their own.

    Raises:
        `ValueError`: Naming the sample, if the ids have another shape or are no experts of the model.
    """
    if not isinstance(ids, (np.ndarray, Tensor)):
        raise ValueError(
            f"sample {sample}: `routed_experts` is a {type(ids).__name__}, expected a numpy.ndarray or torch.Tensor "
            "of (rows, layers, top_k). Pass one array a sample."
        )
    if ids.ndim != 3:
        raise ValueError(
            f"sample {sample}: `routed_experts` has {ids.ndim} dimensions, shape {tuple(ids.shape)}, expected 3: "
            "(rows, layers, top_k). Pass one array a sample."
        )
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(np.require(ids, requirements=["C", "W", "O"]))  # copies what the engine still owns
    try:
        selected = select_moe_layers(ids.cpu(), layout)
    except ValueError as error:
        raise ValueError(f"sample {sample}: {error}") from error
    return pack(selected, layout, sample=sample)


def capture(trainer: Any, replay: RouterReplay, known: KnownRoutes) -> AbstractContextManager[MakeTurn]:
    """
    Record one call of `trainer._generate_single_turn`.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer; its settings tell the engine.
        replay ([`RouterReplay`]):
            Handle on its policy.
        known ([`KnownRoutes`]):
            What vLLM has returned in this rollout.

    Returns:
        A context manager. What it yields makes the [`Turn`] once the call has returned.
    """
    if trainer.use_vllm:
        if not (getattr(trainer, "tools", None) or getattr(trainer, "rollout_func", None)):
            known = KnownRoutes()  # no later turn will ask for them
        if trainer.vllm_mode == "server":
            return _vllm_server(trainer, replay.layout, known)
        return _vllm_colocate(trainer, replay.layout, known)
    if trainer.use_transformers_continuous_batching:
        return _continuous_batching(trainer, replay)
    return _transformers(trainer, replay)


@contextmanager
def _transformers(trainer: Any, replay: RouterReplay) -> Iterator[MakeTurn]:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    own_generate, rollouts = model.generate, []

    def generate(*args, **kwargs):
        rollouts.append(
            generate_with_routes(
                model, replay, own_generate, args, kwargs, temperature=trainer.temperature, mask_after_end=False
            )
        )
        return rollouts[-1].output

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        (rollout,) = rollouts
        prompts, completions = [len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids]
        records = slice_samples(rollout.records.cpu(), rollout.prompt_width, prompts, completions)
        assert rollout.logprobs is not None  # they were asked for, by temperature
        sampled = [values[:count] for values, count in zip(rollout.logprobs.cpu(), completions, strict=True)]
        return Turn(prompt_ids, completion_ids, records, sampled)

    with swapped(model, "generate", generate):
        yield make_turn


@contextmanager
def _continuous_batching(trainer: Any, replay: RouterReplay) -> Iterator[MakeTurn]:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    own_generate, batches = model.generate_batch, []

    def generate_batch(inputs, *args, **kwargs):
        with recorded_batches(replay, trainer.temperature) as recorded:
            outputs = own_generate(inputs, *args, **kwargs)
        recorded.check(inputs, outputs)
        batches.append((recorded, outputs))
        return outputs

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        ((recorded, outputs),) = batches
        records = [recorded.rows(request) for request in outputs]
        sampled = [recorded.logprobs(request, output) for request, output in outputs.items()]
        return Turn(prompt_ids, completion_ids, records, sampled)

    with swapped(model, "generate_batch", generate_batch):
        yield make_turn


@contextmanager
def colocated_outputs(trainer: Any, prepare: Callable[[Sequence, Any], Any]) -> Iterator[list]:
    """
    Keep what the colocated engine returns to one call of `trainer._generate_single_turn`.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        prepare (`Callable`):
            Given the prompts and the sampling parameters of TRL, the parameters that the engine gets.

    Yields:
        list of the `RequestOutput`s, after the call.
    """
    llm, outputs = trainer.vllm_generation.llm, []
    own_generate = llm.generate

    def generate(prompts, sampling_params=None, **kwargs):
        outputs.extend(own_generate(prompts, sampling_params=prepare(prompts, sampling_params), **kwargs))
        return outputs

    with swapped(llm, "generate", generate):
        yield outputs


def own_completions(trainer: Any, completions: list, count: int) -> list:
    """Of what a colocated engine made, the part of this process: every rank of a group generates for all of them."""
    generation = trainer.vllm_generation
    if generation.tensor_parallel_size == 1:
        return completions
    first = torch.distributed.get_rank(group=generation.tp_group) * count
    return completions[first : first + count]


@contextmanager
def _vllm_colocate(trainer: Any, layout: RoutingLayout, known: KnownRoutes) -> Iterator[MakeTurn]:
    def only_missing(prompts: Sequence, sampling: Any) -> Any:
        starts = [known.start(prompt["prompt_token_ids"]) for prompt in prompts]
        if not any(starts) or not hasattr(sampling, "routed_experts_prompt_start"):  # which an older vLLM lacks
            return sampling
        each = [copy.copy(sampling) for _ in starts]
        for parameters, start in zip(each, starts, strict=True):
            parameters.routed_experts_prompt_start = start
        return each

    with colocated_outputs(trainer, only_missing) as outputs:

        def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
            routes = [
                known.complete(output.prompt_token_ids, completion.token_ids, decode_vllm_output(completion))
                for output in outputs
                for completion in output.outputs
            ]
            known.end_turn()
            own = own_completions(trainer, routes, len(prompt_ids))
            return Turn(prompt_ids, completion_ids, [to_record(ids, layout, sample) for sample, ids in enumerate(own)])

        yield make_turn


@contextmanager
def _vllm_server(trainer: Any, layout: RoutingLayout, known: KnownRoutes) -> Iterator[MakeTurn]:
    client = trainer.vllm_generation.vllm_client if trainer.accelerator.is_main_process else None

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        own = share_of_server(trainer, "take_routes", len(prompt_ids))
        return Turn(prompt_ids, completion_ids, [to_record(ids, layout, sample) for sample, ids in enumerate(own)])

    with swapped(client, "known_routes", known) if client is not None else nullcontext():
        yield make_turn


def share_of_server(trainer: Any, take: str, count: int) -> list:
    """Give each process what was recorded of its samples; the main process has asked the server for all."""
    accelerator = trainer.accelerator
    everything = getattr(trainer.vllm_generation.vllm_client, take)() if accelerator.is_main_process else None
    if accelerator.num_processes == 1:
        assert everything is not None
        return everything
    # the shares that TRL cuts the completions into
    shares = None
    if everything is not None:
        shares = [everything[rank * count : (rank + 1) * count] for rank in range(accelerator.num_processes)]
    received: list[Any] = [None]
    torch.distributed.scatter_object_list(received, shares, src=0)
    return received[0]


def rollout_of_func(
    routes: Sequence[np.ndarray | Tensor] | None, prompt_ids: Prompts, completion_ids: Prompts, layout: RoutingLayout
) -> RolloutRecord:
    """
    Check the records that a `rollout_func` returned.

    Args:
        routes (sequence of `numpy.ndarray` or `torch.Tensor` of shape `(T_i - 1, S, K)`, *optional*):
            Its field `routed_experts`: one array a sample.
        prompt_ids, completion_ids (sequence of `list[int]`):
            Tokens of each sample.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        [`RolloutRecord`].

    Raises:
        `ValueError`: If there are no records, or one of them does not belong to its tokens; it names the sample.
    """
    if routes is None:
        raise ValueError(
            "`rollout_func` returned no `routed_experts`. Return a list with one array of (prompt + completion - 1, "
            "layers, top_k) expert ids a sample; `trainer.rollout_turn` records them. Or set "
            "`use_routing_replay=False`."
        )
    if len(routes) != len(prompt_ids):
        raise ValueError(
            f"`rollout_func` returned `routed_experts` of {len(routes)} samples for {len(prompt_ids)} prompts. Return "
            f"one array a sample."
        )
    records = [to_record(ids, layout, sample) for sample, ids in enumerate(routes)]
    return stitch([Turn(prompt_ids, completion_ids, records)], prompt_ids, completion_ids, layout)
