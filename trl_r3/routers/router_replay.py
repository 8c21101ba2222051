"""A model's routers under one handle: record their selections, replay them, remove every trace.

Legend: B batch, T tokens of a sequence, N = B * T, L MoE layers, S layer slots (L, or one per decoder layer), K
experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import in_backward, is_compiled, transforms
from ..records.metrics import ReplayStats
from ..records.record import missing_rows
from ..records.sources import RecordSource, WholeBatch
from ..records.unpadded_rows import unpadded_positions
from .attachable import attachable, refuse_unread, refuse_unseen
from .discovery import find_routers
from .gated import GatedRouter
from .packing import PackedBatch
from .padding import Padding, check_padding
from .passes import LivePass, RecordedRoutes, RecordingPass, ReplayingPass, TrainingGuard, WhichAreReal
from .patches import ActivePass, CurrentModules, Pass, Patch, attended_tokens, bound_checkpoints, get_batch, take_rows
from .trimming import TrimmedBatch

GATINGS = ("auto", "intercept", "op")
_LOST = (
    "is recomputed in backward by a checkpoint that replay does not know, so its record is lost. Use "
    "`model.gradient_checkpointing_enable()`"
)
_SMALLER = (PackedBatch, TrimmedBatch)  # what layers see in place of a padded batch


class RouterReplay:
    """
    Records and replays the expert selections of a model.

    Attaching runs a few tokens through the model to find its routers, and checks each of them. Until it is removed,
    the handle owns the forward of the routers and of the module above the decoder layers; outside `record()` and
    `replay()` they do what they always did. Used as a context manager, the handle is removed at the end.

    Args:
        model (`torch.nn.Module`):
            A Transformers mixture-of-experts causal LM: bare, inside a `PeftModel`, or prepared by Accelerate.
        gating (`str`, *optional*, defaults to `"auto"`):
            How a recorded selection takes effect. `"intercept"`: the one top-k call of the router returns it, and the
            router's own code goes on. `"op"`: [`masked_topk_gating`] computes the gate from the router's logits, where
            it was found equal to the router's own. `"auto"`: the op where it covers the gate and its compiled kernels
            are installed, else interception. Interception is the model's own code, bit for bit; the op rounds
            otherwise.
        padding (`str`, *optional*, defaults to `"keep"`):
            `"keep"`: padding goes through every layer, as it does live. `"auto"`: in replay layers, or at least their
            experts, see real tokens only, if a forward of this model was found equal to a padded one up to rounding.

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

    @torch.inference_mode(False)  # a check goes back, too
    def __init__(self, model: nn.Module, gating: str = "auto", padding: str = "keep"):
        if gating not in GATINGS:
            raise ValueError(f"`gating` is {gating!r}, expected one of {GATINGS}.")
        check_padding(padding)
        unwrapped = attachable(model)
        self._compilable = (model, unwrapped)
        found = find_routers(unwrapped, gating)
        self.routers, self.stack, self.layout = found.routers, found.stack, found.layout
        self._modules = CurrentModules(self.stack)
        self._active = ActivePass.idle()
        self._recomputes = False  # whether a recompute has to go through the experts of its forward
        self.steady_recompute = False  # whether live forwards that build a graph want that, too
        self.steady_pass: Callable[..., RecordingPass] = RecordingPass  # what these are then
        self.guard: TrainingGuard | None = None  # what meets the forwards of a training step
        self._source: tuple[RecordSource, ReplayStats] | None = None  # with the counts of its forwards
        self._recorded: RecordedRoutes | None = None
        self._patches = [
            Patch(router.module, torch.compiler.disable(self._route), index)
            for index, router in enumerate(self.routers)
        ] + [Patch(self.stack, torch.compiler.disable(self._forward_stack))]
        self.padding = Padding(self._modules, self._active) if padding == "auto" else None
        if self.padding is not None:
            self.padding.try_skipping(unwrapped, self)
            self._recomputes = False  # those of a trial are over

    def __enter__(self) -> RouterReplay:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    @property
    def moe_layers(self) -> list[int]:
        """Decoder-layer indices of the MoE layers, ascending."""
        return list(self.layout.moe_layers)

    @property
    def num_decoder_layers(self) -> int:
        """Number of decoder layers, dense ones included."""
        return self.layout.num_decoder_layers

    @property
    def num_experts(self) -> int:
        """Number of experts a router chooses from."""
        return self.layout.num_experts

    @property
    def top_k(self) -> int:
        """Number of experts a token is routed to."""
        return self.layout.top_k

    def __repr__(self) -> str:
        router = type(self.routers[0].module).__name__
        gating = "op" if all(isinstance(router, GatedRouter) for router in self.routers) else "intercept"
        return (
            f"RouterReplay({router}, gating={gating!r}, moe_layers={self.moe_layers}, "
            f"num_decoder_layers={self.num_decoder_layers}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"padding={self.padding or 'kept'})"
        )

    @contextmanager
    def record(self, real: WhichAreReal | None = None) -> Iterator[RecordedRoutes]:
        """
        Record the selections of all forwards inside.

        Args:
            real (`Callable`, *optional*):
                Tells which tokens of a forward are real, by its size and mask. With `padding="auto"`, others go to no
                expert. Without it all do.

        Yields:
            [`RecordedRoutes`]: Its `routed_experts` has shape `(B, T, L, K)` and dtype `torch.int16`, on the model's
            device: all forwards, concatenated along the sequence.
        """
        self._check_idle("record")
        self._recorded = recorded = RecordedRoutes(self.layout, real=real)
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
        with self.replay_from(WholeBatch.of(routed_experts, self.layout)) as stats:
            yield stats

    @contextmanager
    def replay_from(self, source: RecordSource) -> Iterator[ReplayStats]:
        """Like [`RouterReplay.replay`], for a batch whose rows several forwards share."""
        self._check_idle("replay")
        self._source = source, (stats := ReplayStats())
        try:
            yield stats
        finally:
            self._source = None
        if stats.forwards == 0:
            raise RuntimeError(
                "no forward went through the model inside `replay()`, so nothing was replayed. Call the model that "
                "this handle is attached to."
            )

    @contextmanager
    def guarded(self, guard: TrainingGuard | None) -> Iterator[None]:
        """Let `guard` meet the forwards inside that build a graph, or nothing."""
        before, self.guard = self.guard, guard
        try:
            yield
        finally:
            self.guard = before

    def remove(self) -> None:
        """Give the model back as it was, bit for bit."""
        self._active.removed.set()
        while self._patches:
            self._patches.pop().remove()
        if self.padding is not None:
            self.padding.remove()

    def _check_idle(self, wanted: str) -> None:
        if not self._patches:
            raise RuntimeError(f"`{wanted}()` on a handle that was removed. Attach to the model again.")
        busy = "record" if self._recorded is not None else "replay" if self._source is not None else None
        if busy is not None:
            raise RuntimeError(f"`{wanted}()` inside `{busy}()`: a forward either records or replays. Nest nothing.")
        self._active.begin()

    def _route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if (pass_ := self._active.current) is not None:
            return pass_.route(index, forward, args, kwargs)
        if self._recomputes and in_backward():
            raise RuntimeError(f"{self.routers[index].name} {_LOST}.")
        return forward(*args, **kwargs)

    def _forward_stack(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("routed_experts") is not None:
            refuse_unread()
        steadies = self.steady_recompute and torch.is_grad_enabled()
        if (self._source or self._recorded or steadies) and (transforms() or any(map(is_compiled, self._compilable))):
            refuse_unseen(self._compilable, self.routers, self._recorded is not None)
        if self._source or self._recorded:
            self._active.meet()
        if self._source is not None:
            return self._replay_stack(*self._source, forward, args, kwargs)
        if self._recorded is not None:
            return self._record_stack(self._recorded, forward, args, kwargs)
        if torch.is_grad_enabled():
            if (self._recomputes or self.steady_recompute) and in_backward():
                raise RuntimeError(f"{type(self.stack).__name__} {_LOST}, or call `backward()` inside `replay()`.")
            if self.guard is not None:
                self.guard.meet_live(*get_batch(args, kwargs)[1].shape[:2])
            return self._live_stack(forward, args, kwargs)
        return forward(*args, **kwargs)  # nothing to do, and nothing will be recomputed

    def _run(self, pass_: Pass, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        with self._active.use(pass_), bound_checkpoints(self._modules.get(), self._active, pass_):
            return forward(*args, **kwargs)

    def _live_stack(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.steady_recompute:
            return self._run(LivePass(), forward, args, kwargs)
        self._recomputes = True
        pass_ = self.steady_pass(self.routers, self.layout)
        output = self._run(pass_, forward, args, kwargs)
        pass_.close()
        return output

    def _record_stack(self, recorded: RecordedRoutes, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        tokens, main = get_batch(args, kwargs)
        pass_ = RecordingPass(self.routers, self.layout)
        if self.padding is not None and recorded.real is not None:
            pass_.real = self.padding.of_experts(recorded.real(main.shape[:2], kwargs.get("attention_mask")))
        output = self._run(pass_, forward, args, kwargs)
        positions = unpadded_positions(kwargs, main.shape[1]) if main.shape[0] == 1 else None
        self.routers[0].check_tokens(len(selected_NLK := pass_.close()), main.shape[:2].numel())
        recorded.add(selected_NLK.unflatten(0, main.shape[:2]), tokens, positions)
        return output

    def _replay_stack(
        self, source: RecordSource, stats: ReplayStats, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        tokens, main = get_batch(args, kwargs)
        batch_size, num_tokens = main.shape[:2]
        record_NLK = take_rows(source, kwargs, batch_size, num_tokens, tokens).flatten(0, 1)
        skips = None if self.padding is None else self.padding.rows(source, main, args, kwargs)
        mask, observed_M = kwargs.get("attention_mask"), source.observed
        attended_N = attended_tokens(mask, batch_size, num_tokens)
        if isinstance(skips, _SMALLER):
            record_NLK, observed_M = skips.take(record_NLK), skips.place(observed_M)
            attended_N = None if isinstance(skips, PackedBatch) or attended_N is None else skips.take(attended_N)
        # on the host it costs nothing to know; on a device, knowing would wait for it
        has_missing = record_NLK.device.type != "cpu" or bool(missing_rows(record_NLK, self.layout).any())
        replayed_NLK = record_NLK.to(main.device)
        self._recomputes = True  # without a graph, too: a checkpoint around all of it may build one later
        asks = stats.log_scores is not None
        pass_ = ReplayingPass(self.routers, self.layout, replayed_NLK, has_missing, observed_M, asks)
        run = forward if self.padding is None else self.padding.around(pass_, skips, forward)
        output = self._run(pass_, run, args, kwargs)
        changed_NL = pass_.close()
        if (live_MLK := pass_.observed_live()) is not None:
            source.observe(live_MLK.cpu())
        if self.guard is not None and torch.is_grad_enabled():
            self.guard.replayed += 1
        if stats.log_scores is not None:
            rows = skips.padded(pass_.log_scores()) if isinstance(skips, _SMALLER) else pass_.log_scores()
            stats.log_scores.append(rows.unflatten(0, (batch_size, num_tokens)))
        stats.add(changed_NL, ~missing_rows(replayed_NLK, self.layout), attended_N)
        return output
