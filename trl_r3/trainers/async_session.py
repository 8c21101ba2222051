"""What R3AsyncGRPOTrainer remembers while it replays, and how the loss of one packed row goes through its record.

Legend: N forwarded tokens of a row, L MoE layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.experimental.async_grpo import async_grpo_trainer
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from .._compat import swapped
from ..engines.weight_sync import merged_copies
from ..records.metrics import ASYNC_SHARES, ReplayStats
from ..records.packed_row import PackedRow
from ._compat_trainers import attending_plainly, refuse_second_training, stopping_if_alive
from .async_queue import RoutedCollator, RoutedQueueDataset, WaitingRows
from .async_worker import recording_loop
from .attaching import Attachment
from .log import ReplayLog, raise_together


class TreeAttachment(Attachment):
    """An [`Attachment`] to a policy whose attention wants the tree of a packed row, which the probe has not."""

    def _attach(self, only_with_weights: bool = False) -> None:
        with attending_plainly(self.trainer.accelerator.unwrap_model(self.trainer.model)):
            super()._attach(only_with_weights)


class AsyncReplaySession:
    """
    The state of a trainer that replays, behind its one attribute.

    Args:
        trainer ([`~trl.experimental.async_grpo.AsyncGRPOTrainer`]):
            The trainer.
    """

    routes = True  # without them there is no session

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.attachment = TreeAttachment(trainer)
        self._until_the_end = ExitStack()
        self._has_begun = False
        self._start()

    def begin(self) -> None:
        """Before TRL prepares anything for training."""
        refuse_second_training(self._has_begun)

    def _start(self) -> None:
        self.log = ReplayLog(self.trainer.accelerator, ASYNC_SHARES)
        self.waiting: WaitingRows | None = None
        self.synced_at: int | None = None  # optimizer steps when the weights were last sent

    def attach(self) -> None:
        """When the policy has been prepared for training, before the rollout process is spawned."""
        worker = self.trainer.rollout_worker
        self.attachment.attach(judges=True)
        self._has_begun = True
        if isinstance(worker, AsyncRolloutWorker):  # on the main process
            loop = partial(recording_loop, worker._loop_cls, self.attachment.replay.layout)
            self._until_the_end.enter_context(swapped(worker, "_loop_cls", loop))
            self._until_the_end.enter_context(stopping_if_alive(worker))

    def end(self) -> None:
        """When training is over, whatever ended it: nothing of it stays."""
        self._until_the_end.close()
        self.attachment.detach()
        if self.waiting is not None:
            self.waiting.drop()  # TRL keeps the queue
        self._start()

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Let the dataloader that TRL makes inside pack records."""
        args = self.trainer.args
        lets_live, max_missing = args.routing_replay_in_flight == "live", args.routing_replay_max_missing
        is_exact = args.routing_replay_shared_rows == "exact"
        self.waiting = WaitingRows(lambda: self.attachment.replay.layout, max_missing, lets_live, is_exact)
        dataset, collator = (partial(each, waiting=self.waiting) for each in (RoutedQueueDataset, RoutedCollator))
        with (
            swapped(async_grpo_trainer, "RolloutQueueDataset", dataset),
            swapped(async_grpo_trainer, "DataCollatorForRollout", collator),
        ):
            yield

    @contextmanager
    def keeping_base(self) -> Iterator[None]:
        """Let the weights that TRL sends inside be merged copies: the base of an adapter stays as it is."""
        model, transfer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.weight_transfer
        if not hasattr(model, "merge_adapter"):
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(merged_copies(model, self.trainer.accelerator.device))
            if transfer is not None:  # on the main process
                own = transfer.send_weights

                def send_weights(weights: Iterator) -> None:
                    own(weights)
                    deque(weights, maxlen=0)  # one that sends none reads none, and other processes read all

                stack.enter_context(swapped(transfer, "send_weights", send_weights))
            yield

    @contextmanager
    def counting_first(self) -> Iterator[None]:
        """
        Let the rollout process know of the weights that TRL sends inside before the server goes on with them.

        TRL tells it afterwards, and a request that is answered in between would pass for one of older weights alone.
        """
        transfer, worker = self.trainer.weight_transfer, self.trainer.rollout_worker
        if transfer is None or not worker:
            yield
            return
        own = transfer.resume

        def resume(*args, **kwargs) -> None:
            worker.update_model_version(self.trainer.model_version + 1)
            own(*args, **kwargs)

        with swapped(transfer, "resume", resume):
            yield

    @contextmanager
    def replays(self, number: int) -> Iterator[None]:
        """Let the loss of a packed row go through its record, and judge that before the optimizer moves."""
        row = self._receive(number)
        replay, alarm = self.attachment.replay, self.attachment.alarm
        assert alarm is not None  # attached
        with replay.replay_from(row) as stats:
            yield
        self._note(row, stats)
        verdict = alarm.look(row.observations)
        if verdict is not None:
            self.log.add_verdict(verdict)
        if self.trainer.accelerator.sync_gradients:  # of all processes
            raise_together(self.trainer.accelerator, alarm.judge())

    def _receive(self, number: int) -> PackedRow:
        """Get a row from the host of the main process: each process its own, all at once."""
        accelerator = self.trainer.accelerator
        count, shares = accelerator.num_processes, None
        if accelerator.is_main_process:
            shares = self._give(number, count)
        received: list[Any] = [None]
        if count == 1:
            assert shares is not None
            received = shares
        else:
            torch.distributed.scatter_object_list(received, shares, src=0)
        if isinstance(received[0], Exception):
            raise received[0]
        return received[0]

    def _give(self, first: int, count: int) -> list[Any]:
        """The rows of a batch, or for each of them what is wrong."""
        assert self.waiting is not None  # attached
        try:
            rows = self.waiting.take(first, count)
        except (RuntimeError, ValueError) as error:
            return [error] * count
        now, step = self.trainer.model_version, self.trainer.state.global_step
        for row in rows:
            row.staleness = sum(now - sent for sent in row.sent)
            # with several steps between two updates of the server, the trainer's weights are ahead of it
            row.version = now if self.synced_at == step else None
        return rows

    def _note(self, row: PackedRow, stats: ReplayStats) -> None:
        """What the log tells of a row."""
        tree, log = row.tree, self.log
        log.add("routing_replay/replayed_frac", tree.matters - tree.missing, tree.matters)
        log.add("routing_replay/missing_frac", tree.missing, tree.matters)
        log.add("routing_replay/staleness", row.staleness, len(row.sent))
        log.add("routing_replay/spanning_frac", row.spanning, len(row.sent))
        log.add("routing_replay/shared_conflict_frac", tree.conflicts, tree.shared)
        assert stats.changed is not None  # a forward has run
        for prefix, of_rows in (("routing_replay", row.recorded), ("routing_replay/fresh", row.fresh)):
            self._note_changes(prefix, stats.changed, of_rows)

    def _note_changes(self, prefix: str, changed_NL: Tensor, rows_N: Tensor) -> None:
        changed = changed_NL & rows_N.to(changed_NL.device)[:, None]
        count = int(rows_N.sum())
        self.log.add(f"{prefix}/changed_router_frac", changed.sum(), count * changed.shape[1])
        self.log.add(f"{prefix}/changed_token_frac", changed.any(1).sum(), count)
