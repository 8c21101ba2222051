"""A model's routers under one handle: record their selections, replay them, remove every trace.

Legend: B batch, T tokens of a sequence, N = B * T, L MoE layers, S layer slots (L, or one per decoder layer), K
experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._compat import in_backward, is_compiled
from .discovery import find_routers
from .forward_pass import ActivePass, ForwardPass, Patch, bound_checkpoints
from .gated_router import GatedRouter
from .record_checks import check_rows
from .replay_data import RecordedRoutes, RecordSource, ReplayStats, WholeBatch
from .routed_experts import RoutingShape, missing_rows, pack, select_moe_layers


class RouterReplay:
    """
    Records and replays the expert selections of a model.

    Attaching runs a few tokens through the model to find its routers, and checks each of them. Until it is removed,
    the handle owns the forward of the routers and of the module above the decoder layers; outside `record()` and
    `replay()` they do what they always did.

    Args:
        model (`torch.nn.Module`):
            A Transformers mixture-of-experts causal LM: bare, inside a `PeftModel`, or prepared by Accelerate.
        gating (`str`, *optional*, defaults to `"auto"`):
            How a recorded selection takes effect. `"intercept"`: the one top-k call of the router returns it, and the
            router's own code goes on. `"op"`: [`masked_topk_gating`] computes the gate from the router's logits, where
            it was found equal to the router's own. `"auto"`: the op where it covers the gate and its compiled kernels
            are installed, else interception.

    Raises:
        [`UnsupportedRouterError`]: If the model is dense, or a router cannot be replayed; the message names it.
        `ValueError`: If the model is compiled or already attached.

    Example:

    ```python
    >>> replay = RouterReplay(model)
    >>> with replay.record() as recorded, torch.no_grad():
    ...     model(input_ids)
    >>> with replay.replay(recorded.routed_experts):
    ...     loss = model(input_ids, labels=input_ids).loss
    >>> loss.backward()  # a recompute replays the same record
    >>> replay.remove()
    ```
    """

    def __init__(self, model: nn.Module, gating: str = "auto"):
        if gating not in ("auto", "intercept", "op"):
            raise ValueError(f"`gating` is {gating!r}, expected 'auto', 'intercept' or 'op'.")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model is a {type(model).__name__}, expected a torch.nn.Module. Load it first: "
                f"`AutoModelForCausalLM.from_pretrained(...)`."
            )
        unwrapped = _unwrap(model)
        if any(isinstance(getattr(m.__dict__.get("forward"), "__self__", None), Patch) for m in unwrapped.modules()):
            raise ValueError(
                "the model already has routing replay attached. Use the handle that exists, or call "
                "`disable_routing_replay(model)` (`remove()` of the handle) first."
            )
        for module in (model, unwrapped):
            if is_compiled(module):
                raise ValueError(
                    f"{type(unwrapped).__name__} is compiled: `torch.compile` would run past the replay. Attach to "
                    "the model before compiling, and do not compile it."
                )
        self._routers, stack_name, num_decoder_layers = find_routers(unwrapped, gating)
        first = self._routers[0]
        layers = tuple(router.layer for router in self._routers)
        self.shape = RoutingShape(layers, num_decoder_layers, first.num_experts, first.top_k)
        self.stack = unwrapped.get_submodule(stack_name)
        self._active = ActivePass(threading.Event())
        self._has_replayed = False
        self._source: RecordSource | None = None
        self._stats: ReplayStats | None = None
        self._recorded: RecordedRoutes | None = None
        self._patches = [Patch(router.module, self._route, index) for index, router in enumerate(self._routers)] + [
            Patch(self.stack, self._forward_stack)
        ]

    @property
    def moe_layers(self) -> list[int]:
        """Decoder-layer indices of the MoE layers, ascending."""
        return list(self.shape.moe_layers)

    @property
    def num_decoder_layers(self) -> int:
        """Number of decoder layers, dense ones included."""
        return self.shape.num_decoder_layers

    @property
    def num_experts(self) -> int:
        """Number of experts a router chooses from."""
        return self.shape.num_experts

    @property
    def top_k(self) -> int:
        """Number of experts a token is routed to."""
        return self.shape.top_k

    def __repr__(self) -> str:
        router = type(self._routers[0].module).__name__
        gating = "op" if all(isinstance(router, GatedRouter) for router in self._routers) else "intercept"
        return (
            f"RouterReplay({router}, gating={gating!r}, moe_layers={self.moe_layers}, "
            f"num_decoder_layers={self.num_decoder_layers}, num_experts={self.num_experts}, top_k={self.top_k})"
        )

    @contextmanager
    def record(self) -> Iterator[RecordedRoutes]:
        """
        Record the selections of all forwards inside.

        Yields:
            [`RecordedRoutes`]: Its `routed_experts` has shape `(B, T, L, K)` and dtype `torch.int16`, on the model's
            device: all forwards, concatenated along the sequence.
        """
        self._check_idle("record")
        self._recorded = recorded = RecordedRoutes(self.shape)
        try:
            yield recorded
        finally:
            self._recorded = None

    @contextmanager
    def replay(self, routed_experts: Tensor) -> Iterator[ReplayStats]:
        """
        Replay a record in every forward inside, and in the recomputes of their backward, wherever that runs.

        Args:
            routed_experts (`torch.Tensor` of shape `(B, T, S, K)`):
                Ids of any integer dtype, on any device, aligned with the tokens of the forward. S is the number of MoE
                layers, or of decoder layers (slots of dense layers are ignored). A row of -1 is missing: its token
                routes live.

        Yields:
            [`ReplayStats`]: How far live and recorded selections differ.

        Raises:
            `ValueError`: If the record cannot be one of this model or of the forward's batch.
            `RuntimeError`: If no forward went through the model.
        """
        with self.replay_from(self.batch_source(routed_experts)) as stats:
            yield stats

    def batch_source(self, routed_experts: Tensor) -> WholeBatch:
        """
        Check a record of a whole batch.

        Args:
            routed_experts (`torch.Tensor` of shape `(B, T, S, K)`):
                As in [`RouterReplay.replay`].

        Returns:
            [`WholeBatch`]: What [`RouterReplay.replay_from`] takes.

        Raises:
            `ValueError`: Naming sample, layer and both numbers.
        """
        routed_experts = torch.as_tensor(routed_experts)
        if routed_experts.ndim != 4:
            raise ValueError(
                f"`routed_experts` has {routed_experts.ndim} dimensions, shape {tuple(routed_experts.shape)}, "
                "expected 4: (batch, tokens, layers, top_k)."
            )
        record = pack(select_moe_layers(routed_experts, self.shape), self.shape)
        for sample, rows in enumerate(record.cpu()):
            check_rows(rows, self.shape, sample=sample)
            if rows.shape[0] > 1 and bool(missing_rows(rows, self.shape).all()):
                raise ValueError(
                    f"sample {sample}: all {rows.shape[0]} rows are missing, so nothing of it would be replayed. Pass "
                    "its record, or leave the sample out."
                )
        return WholeBatch(record, self.shape)

    @contextmanager
    def replay_from(self, source: RecordSource) -> Iterator[ReplayStats]:
        """Like [`RouterReplay.replay`], for a batch whose rows several forwards share."""
        self._check_idle("replay")
        self._source, self._stats = source, (stats := ReplayStats())
        try:
            yield stats
        finally:
            self._source = self._stats = None
        if stats.forwards == 0:
            raise RuntimeError(
                "no forward went through the model inside `replay()`, so nothing was replayed. Call the model that "
                "this handle is attached to."
            )

    def remove(self) -> None:
        """Give the model back as it was, bit for bit."""
        self._active.removed.set()
        while self._patches:
            self._patches.pop().remove()

    def _check_idle(self, wanted: str) -> None:
        if not self._patches:
            raise RuntimeError(f"`{wanted}()` on a handle that was removed. Attach to the model again.")
        busy = "record" if self._recorded is not None else "replay" if self._source is not None else None
        if busy is not None:
            raise RuntimeError(f"`{wanted}()` inside `{busy}()`: a forward either records or replays. Nest nothing.")

    def _route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        pass_ = self._active.current
        if pass_ is not None:
            return pass_.route(index, forward, args, kwargs)
        if self._has_replayed and in_backward():
            raise RuntimeError(
                f"{self._routers[index].name} is recomputed in backward by a checkpoint that replay does not know, so "
                "its record is lost. Use `model.gradient_checkpointing_enable()`."
            )
        return forward(*args, **kwargs)

    def _forward_stack(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("routed_experts") is not None:
            raise RuntimeError(
                "`routed_experts` was passed to a model that does not take it, so nothing of it would be replayed. "
                "Call the model that was enabled with `enable_routing_replay`, or use `replay()`."
            )
        if self._source is None and self._recorded is None and not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # nothing to do, and nothing will be recomputed
        tokens, (batch_size, num_tokens) = _batch_of(args, kwargs)
        replayed_NLK = None
        if self._source is not None:
            record = self._source.take(tokens, batch_size, num_tokens)
            replayed_NLK = record.flatten(0, 1).to(next(self.stack.parameters()).device, non_blocking=True)
            self._has_replayed = self._has_replayed or torch.is_grad_enabled()
        pass_ = ForwardPass(self._routers, self.shape, replayed_NLK, self._recorded is not None)
        pass_.attended_N = _attended(kwargs.get("attention_mask"), batch_size, num_tokens)
        with self._active.use(pass_), bound_checkpoints(self.stack, self._active, pass_):
            output = forward(*args, **kwargs)
        pass_.close()
        if self._recorded is not None:
            device = pass_.selected[0].device
            selected_NLK = torch.stack([pass_.selected[i].to(device) for i in range(len(self._routers))], dim=1)
            selected = selected_NLK.to(self.shape.storage_dtype).unflatten(0, (batch_size, num_tokens))
            self._recorded.forwards.append(selected)
            self._recorded.tokens.append(None if tokens is None else tokens.clone())  # a view would keep its base
        if self._stats is not None and replayed_NLK is not None:
            self._count(self._stats, pass_, replayed_NLK)
        return output

    def _count(self, stats: ReplayStats, pass_: ForwardPass, replayed_NLK: Tensor) -> None:
        assert pass_.changed_N is not None
        stats.forwards += 1
        recorded_N = ~missing_rows(replayed_NLK, self.shape)
        compared_N = recorded_N if pass_.attended_N is None else recorded_N & pass_.attended_N.to(recorded_N.device)
        stats.recorded_tokens = stats.recorded_tokens + recorded_N.sum()
        stats.compared_tokens = stats.compared_tokens + compared_N.sum()
        stats.changed_routers = stats.changed_routers + pass_.changed_routers
        stats.changed_tokens = stats.changed_tokens + pass_.changed_N.sum()


def _unwrap(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel  # imports slowly

    return extract_model_from_parallel(model, keep_torch_compile=True)


def _attended(mask: Any, batch_size: int, num_tokens: int) -> Tensor | None:
    """(N,) of `bool`, where the mask says which tokens are real."""
    if torch.is_tensor(mask) and mask.shape == (batch_size, num_tokens):
        return mask.flatten().bool()
    return None


def _batch_of(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple[int, int]]:
    """Input ids, if the forward has them, and (B, T)."""
    embeds = kwargs.get("inputs_embeds")
    ids = kwargs.get("input_ids", args[0] if args else None)
    main = ids if torch.is_tensor(ids) and embeds is None else embeds
    if not torch.is_tensor(main) or main.ndim < 2:
        raise RuntimeError(
            f"the decoder was called with {sorted(kwargs)} and {len(args)} positional arguments, but neither "
            "`input_ids` nor `inputs_embeds` is a batch among them. Pass one of them by name."
        )
    return (ids if torch.is_tensor(ids) and ids.ndim == 2 else None), (main.shape[0], main.shape[1])
