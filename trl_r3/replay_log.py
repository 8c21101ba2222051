"""What routing replay writes into TRL's log.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from .metrics import extreme_token_frac, k3_kl
from .replay_data import ReplayStats
from .rollout.turns import RolloutRecord

if TYPE_CHECKING:
    _Trainer = GRPOTrainer  # what the mixin calls on `self`
else:
    _Trainer = object


class ReplayLogMixin(_Trainer):
    """The metrics of a trainer that replays: how much it replayed, and how far rollout and training disagree."""

    if TYPE_CHECKING:  # what GRPOTrainer sets without annotating it
        args: Any
        model: Any
        pad_to_multiple_of: Any

    _last_compared: int | None = None  # step of the last comparison with live routing

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

    def _log_mismatch(self, batch: dict[str, Any], train_logprobs: Tensor | None, prefix: str = "sampling") -> None:
        """Log rollout against training, at weights that have not changed since the rollout."""
        rollout_logprobs = batch.get("rollout_logprobs", batch.get("sampling_per_token_logps"))
        if train_logprobs is None or rollout_logprobs is None:
            return
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        count = (mask.bool() & ~rollout_logprobs.isnan()).sum()
        for name, measure in (("k3_kl", k3_kl), ("extreme_token_frac", extreme_token_frac)):
            total = (measure(train_logprobs, rollout_logprobs, mask) * count).nan_to_num()
            self._log_share(f"{prefix}/{name}", total, count)

    def _log_replay(self, stats: ReplayStats, rollout: RolloutRecord) -> None:
        """Log how much was replayed, and how far live routing has moved from the record."""
        rows = sum(record.shape[0] for record in rollout.records)
        routers = stats.compared_tokens * rollout.records[0].shape[1]
        self._log_share("routing_replay/replayed_frac", stats.recorded_tokens, rows)
        self._log_share("routing_replay/missing_frac", rows - stats.recorded_tokens, rows)
        self._log_share("routing_replay/changed_router_frac", stats.changed_routers, routers)
        self._log_share("routing_replay/changed_token_frac", stats.changed_tokens, stats.compared_tokens)

    def _log_share(self, name: str, part: Tensor | int, whole: Tensor | int) -> None:
        """Log part / whole over all processes. Without a whole there is nothing to log."""
        local = torch.tensor([float(part), float(whole)], device=self.accelerator.device)
        total_part, total_whole = self.accelerator.reduce(local, reduction="sum").tolist()
        self._metrics["train"][name].append(total_part / total_whole if total_whole else float("nan"))
