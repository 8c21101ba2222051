"""What replay tells: shares into TRL's log, over all processes, and errors that end a run on every process.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .._compat import warn
from ..alarm.evidence import Verdict
from ..records.metrics import SHARES, ReplayStats, k3_kl, mismatch_sums
from ..records.samples import Sample, ScoredBatch
from ..routers.passes import TrainingGuard

Made = TypeVar("Made")

_ROUNDING_K3 = 1e-8  # what float32 alone makes of equal routing


class ReplayLog:
    """
    Adds up shares, part / whole, between two logs.

    Processes meet at the end of an optimizer step ([`ReplayLog.meet`]), never in [`ReplayLog.collect`]: TRL's `log`
    may be called on one of them only.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        more (sequence of `str`, *optional*):
            Metrics beside `SHARES`.
    """

    def __init__(self, accelerator: Any, more: Sequence[str] = ()):
        self._accelerator = accelerator
        self._names = (*SHARES, *more)
        self._shared: dict[str, Tensor] = {}  # by metric: (part, whole) of all processes since the last log
        # of this process since processes met
        self._own: dict[str, Tensor] = {} if accelerator.num_processes > 1 else self._shared

    def add(self, name: str, part: Tensor | float, whole: Tensor | float) -> None:
        """Add to the part and the whole of a metric, one of those that it was made with."""
        # stays on the device: a number that is read makes the host wait for it
        device = self._accelerator.device
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in (part, whole)])
        self._own[name] = self._own[name] + sums if name in self._own else sums

    def add_replay(self, stats: ReplayStats, batch: ScoredBatch) -> None:
        """How much of a pass was replayed, and how far live routing has moved from the record."""
        routers = stats.compared_tokens * len(batch.layout.moe_layers)
        self.add("routing_replay/replayed_frac", batch.rows - batch.rows_missing, batch.rows)
        self.add("routing_replay/missing_frac", batch.rows_missing, batch.rows)
        self.add("routing_replay/changed_router_frac", stats.changed_routers, routers)
        self.add("routing_replay/changed_token_frac", stats.changed_tokens, stats.compared_tokens)

    def add_live(self, guard: TrainingGuard) -> None:
        """The rows that went live on purpose."""
        if guard.live:
            self.add("routing_replay/replayed_frac", 0, guard.live_rows)
            self.add("routing_replay/missing_frac", guard.live_rows, guard.live_rows)

    def add_verdict(self, verdict: Verdict) -> None:
        """What live routing says of the records, at the weights of their rollout."""
        for name, value in (("agreement", verdict.agreement), ("contrast", verdict.contrast)):
            if not math.isnan(value):
                self.add(f"routing_replay/{name}", value, 1.0)

    def add_mismatch(
        self, train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, prefix: str = "sampling"
    ) -> None:
        """Rollout against training, (B, C) each, at weights that have not changed since the rollout."""
        k3, extreme, count = mismatch_sums(train_logprobs, rollout_logprobs, mask)
        self.add(f"{prefix}/k3_kl", k3, count)
        self.add(f"{prefix}/extreme_token_frac", extreme, count)

    def meet(self) -> None:
        """Add up what all processes have added since they last met. Each of them has to come here equally often."""
        if self._own is self._shared:
            return
        nothing = torch.zeros(2, dtype=torch.float32, device=self._accelerator.device)
        own = torch.stack([self._own.get(name, nothing) for name in self._names])
        sums = self._accelerator.reduce(own, reduction="sum")  # of the same size on every process
        for name, each in zip(self._names, sums, strict=True):
            if name in self._own:
                self._shared[name] = self._shared[name] + each if name in self._shared else each
        self._own.clear()

    def collect(self) -> dict[str, float | None]:
        """What has come together, which is forgotten; without a wait for other processes."""
        if not self._shared:
            return {}
        names = [name for name in self._names if name in self._shared]
        shares = torch.stack([self._shared[name] for name in names]).tolist()  # one wait for the device
        self._shared.clear()
        return {name: part / whole if whole else None for name, (part, whole) in zip(names, shares, strict=True)}


def counted_tokens(batch: dict[str, Any]) -> Tensor:
    """(B, C) of a batch of TRL: 1 for completion tokens that the loss counts."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def truncation(args: Any) -> str:
    """What cuts the distribution that rollouts are drawn from, by name."""
    own = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    sampling = {**own, **_own_kwargs(args)}
    top_p, top_k, min_p = (sampling[name] for name in own)
    cut = {"top_p": top_p is not None and top_p < 1.0, "top_k": (top_k or 0) > 0, "min_p": (min_p or 0) > 0}
    return ", ".join(f"{name}={sampling[name]}" for name, cuts in cut.items() if cuts)


def penalties(args: Any) -> str:
    """What else changes the distribution that rollouts are drawn from, which no sampling mask tells, by name."""
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    neutral["temperature"] = args.temperature  # which training divides by, too
    sampling = {"repetition_penalty": args.repetition_penalty, **_own_kwargs(args)}
    changed = {name: sampling[name] for name in neutral if sampling.get(name) not in (None, neutral[name])}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _own_kwargs(args: Any) -> dict[str, Any]:
    """Sampling settings that TRL lets override its own; AsyncGRPO has none."""
    return getattr(args, "generation_kwargs", None) or {}


def samples_another(args: Any, masks: bool) -> bool:
    """Whether log-probabilities of vLLM are those of another distribution than training's, with masks or without."""
    return args.use_vllm and bool(penalties(args) or (not masks and truncation(args)))


def warn_of_sampling(args: Any, masks: bool) -> None:
    """Say once, at construction, which sampling settings training does not know."""
    effect = ", so that every importance ratio is off, and `sampling/*` is not logged" if args.use_vllm else ""
    if not masks and (named := truncation(args)):
        warn(
            f"{named} cuts the distribution that rollouts are drawn from, but training normalises over the whole "
            f"vocabulary{effect}. Set `use_sampling_mask_replay=True` to train over the tokens that were kept, or "
            "`top_p=1.0`, `top_k=0` and `min_p=None`."
        )
    if named := penalties(args):
        warn(
            f"{named} changes the distribution that rollouts are drawn from, but training scores the model without "
            f"it{effect}. Leave penalties out, and set `temperature` of the config, not of `generation_kwargs`."
        )


def sampled_logprobs(batch: dict[str, Any], samples: Sequence[Sample]) -> Tensor | None:
    """(B, C) log-probabilities that a batch was sampled with: those that were recorded, or those of TRL."""
    known = [sample.logprobs for sample in samples if sample.logprobs is not None]
    if len(known) != len(samples):
        return batch.get("sampling_per_token_logps")
    completion_ids = batch["completion_ids"]
    padded = torch.zeros(completion_ids.shape, dtype=torch.float32, device="cpu")
    for row, values in zip(padded, known, strict=True):
        row[: len(values)] = values[: len(row)]
    return padded.to(completion_ids.device)


def warn_if_worse(replayed: Tensor, live: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> None:
    """At the weights of the rollout, replay brings training, (B, C) each, closer to it, or something is wrong."""
    k3_replayed, k3_live = (float(k3_kl(each, rollout_logprobs, mask)) for each in (replayed, live))
    if k3_replayed > k3_live > _ROUNDING_K3:
        warn(
            f"at the weights of the rollout k3 is {k3_replayed:.3g} with its experts and {k3_live:.3g} with live "
            "routing: replay makes the mismatch worse. Look at `routing_replay/agreement` and `/contrast`, and "
            "whether the engine computes with the trained weights."
        )


def make_together(accelerator: Any, make: Callable[[], Made], error: Exception | None = None) -> Made:
    """
    Make something on all processes, or raise on all what any of them has to raise.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        make (`Callable`):
            Returns what is made. Its `RuntimeError` or `ValueError` is raised on all processes.
        error (`Exception`, *optional*):
            What this process has to raise already; nothing is made then.

    Returns:
        What `make` returned.

    Raises:
        `Exception`: As [`raise_together`].
    """
    made: Any = None
    if error is None:
        try:
            made = make()
        except (RuntimeError, ValueError) as refusal:
            error = refusal
    raise_together(accelerator, error)
    return made


def raise_together(accelerator: Any, error: Exception | None) -> None:
    """
    Raise what any process has to raise on all of them, in the same place and with the same text.

    Every process has to come here equally often.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        error (`Exception`, *optional*):
            What this process has to raise.

    Raises:
        `Exception`: The error of the first process that has one; with several processes its text begins with its rank.
    """
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    errors = gather_object([error])
    rank, first = next(((rank, each) for rank, each in enumerate(errors) if each is not None), (0, None))
    if first is not None:
        raise type(first)(f"process {rank}: {first}") from error
