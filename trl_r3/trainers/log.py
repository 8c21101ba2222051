"""What routing replay writes into TRL's log.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from ..records.samples import ScoredBatch
from ..routers.forward_pass import ReplayStats, TrainingGuard
from .metric_names import SHARES
from .metrics import k3_kl, mismatch_sums

_ROUNDING_K3 = 1e-8  # what float32 alone makes of equal routing

if TYPE_CHECKING:
    _Trainer = GRPOTrainer  # what the mixin calls on `self`
else:
    _Trainer = object


class ReplayLogMixin(_Trainer):
    """
    What a trainer that replays tells: how much it replayed, how far rollout and training disagree, and whose method
    it is.
    """

    _paper = {
        "title": "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
        "id": "2510.11370",
        "citation": textwrap.dedent("""\
            @article{ma2025stabilizing,
                title        = {{Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers}},
                author       = {Wenhan Ma and Hailin Zhang and Liang Zhao and Yifan Song and Yudong Wang and
                                Zhifang Sui and Fuli Luo},
                year         = 2025,
                eprint       = {arXiv:2510.11370},
            }"""),
    }

    if TYPE_CHECKING:  # what GRPOTrainer sets without annotating it
        args: Any
        model: Any
        pad_to_multiple_of: Any
        use_vllm: bool
        top_p: float
        top_k: int
        min_p: float | None
        _use_masks: bool

    _last_compared: int | None = None  # step of the last comparison with live routing

    def __init__(self, *args, **kwargs):
        self._shares: dict[str, Tensor] = {}  # by metric: (part, whole)
        super().__init__(*args, **kwargs)

    def _compare_is_due(self) -> bool:
        every, step = self.args.routing_replay_compare_every, self.state.global_step
        due = every > 0 and (self._last_compared is None or step - self._last_compared >= every)
        if due:
            self._last_compared = step
        return due

    def _score_live(self, output: dict[str, Any]) -> Tensor:
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(
                self.model,
                input_ids,
                attention_mask,
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
            )[0]

    def _padded_like(self, logprobs: list[Tensor], completion_ids: Tensor) -> Tensor:
        padded = pad(logprobs, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
        return padded.to(completion_ids.device)

    def _truncation(self) -> str:
        """What cuts the distribution that rollouts are drawn from, by name."""
        own = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        sampling = {**own, **(self.args.generation_kwargs or {})}  # TRL lets these override its own
        top_p, top_k, min_p = (sampling[name] for name in own)
        cut = {"top_p": top_p is not None and top_p < 1.0, "top_k": (top_k or 0) > 0, "min_p": (min_p or 0) > 0}
        return ", ".join(f"{name}={sampling[name]}" for name, cuts in cut.items() if cuts)

    def _rollout_logprobs(self, batch: dict[str, Any]) -> Tensor | None:
        """(B, C) log-probabilities that the rollout sampled with, where they are over the tokens of training."""
        if self.use_vllm and not self._use_masks and self._truncation():
            return None  # vLLM normalises over the tokens that are kept, which would look like mismatch
        return batch.get("rollout_logprobs", batch.get("sampling_per_token_logps"))

    def _log_mismatch(self, batch: dict[str, Any], train_logprobs: Tensor | None, prefix: str = "sampling") -> None:
        """Log rollout against training, at weights that have not changed since the rollout."""
        rollout_logprobs = self._rollout_logprobs(batch)
        if train_logprobs is None or rollout_logprobs is None:
            return
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        k3, extreme, count = mismatch_sums(train_logprobs, rollout_logprobs, mask)
        self._add_share(f"{prefix}/k3_kl", k3, count)
        self._add_share(f"{prefix}/extreme_token_frac", extreme, count)

    def _warn_if_worse(self, batch: dict[str, Any], replayed: Tensor | None, live: Tensor) -> None:
        """At the weights of the rollout, replay brings training closer to it, or something is wrong."""
        rollout_logprobs = self._rollout_logprobs(batch)
        if replayed is None or rollout_logprobs is None:
            return
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        k3_replayed, k3_live = (float(k3_kl(each, rollout_logprobs, mask)) for each in (replayed, live))
        if k3_replayed > k3_live > _ROUNDING_K3:
            warnings.warn(
                f"at the weights of the rollout k3 is {k3_replayed:.3g} with its experts and {k3_live:.3g} with live "
                "routing: replay makes the mismatch worse. Look at `routing_replay/agreement` and `/contrast`, and "
                "whether the engine computes with the trained weights.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _log_live(self, guard: TrainingGuard) -> None:
        """Log the rows that went live on purpose."""
        if guard.live:
            self._add_share("routing_replay/replayed_frac", 0, guard.live_rows)
            self._add_share("routing_replay/missing_frac", guard.live_rows, guard.live_rows)

    def _log_replay(self, stats: ReplayStats, batch: ScoredBatch) -> None:
        """Log how much was replayed, and how far live routing has moved from the record."""
        routers = stats.compared_tokens * len(batch.layout.moe_layers)
        self._add_share("routing_replay/replayed_frac", batch.rows - batch.missing, batch.rows)
        self._add_share("routing_replay/missing_frac", batch.missing, batch.rows)
        self._add_share("routing_replay/changed_router_frac", stats.changed_routers, routers)
        self._add_share("routing_replay/changed_token_frac", stats.changed_tokens, stats.compared_tokens)

    def _add_share(self, name: str, part: Tensor | float, whole: Tensor | float) -> None:
        """Add to part / whole of a metric, which is logged over all processes and steps since the last log."""
        # stays on the device: a number that is read makes the host wait for it
        sums = torch.stack([torch.as_tensor(value, device=self.accelerator.device).float() for value in (part, whole)])
        self._shares[name] = self._shares[name] + sums if name in self._shares else sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`log` of TRL, with the shares that have come together."""
        if self._shares and not any(name.startswith("eval_") for name in logs):  # the same on every process
            logs.update(self._collect_shares())  # type: ignore[arg-type]
        super().log(logs, start_time)

    def _collect_shares(self) -> dict[str, float | None]:
        collected: dict[str, float | None] = {}
        nothing = torch.zeros(2, device=self.accelerator.device)
        local = torch.stack([self._shares.get(name, nothing) for name in SHARES])
        # one collective and one wait, of the same size on every process
        for name, (part, whole) in zip(SHARES, self.accelerator.reduce(local, reduction="sum").tolist(), strict=True):
            if name in self._shares:
                collected[name] = part / whole if whole else None
        self._shares = {}
        return collected
