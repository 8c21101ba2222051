"""From the queue of TRL's AsyncGRPO to packed rows whose records wait, on the main process, until they are trained.

A batch carries the number of each of its rows, nothing else: the dispatcher gives every process the rows of all.

Legend: T tokens of a sample, N forwarded tokens of a row, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout, RolloutQueueDataset

from .._compat import swapped
from ..records.checks import MisalignedRecordError, check_length
from ..records.packed_row import PackedRow
from ..records.prefix_tree import NO_VERSION, TreeRecord, TreeSample
from ..records.record import RoutingLayout

ROW_NUMBER = "packed_row"  # in a batch: which of the waiting rows each of its rows is
_TOKEN_BITS = 24  # of a token id; the bits above are free for what tells records apart
_TOKENS = (1 << _TOKEN_BITS) - 1
_MARKS = (1 << 38) - 1


@dataclass
class QueuedRoutes:
    """What was recorded of a sample, beside what TRL reads of it."""

    identity: int
    record: np.ndarray  # (T - 1, L, K)
    spans: np.ndarray  # (pieces, 3): rows, version when sent, when answered
    sent: int  # version of its first request

    @property
    def is_spanning(self) -> bool:
        """Whether the weights changed while one of its requests was answered."""
        return bool((self.spans[:, 1] != self.spans[:, 2]).any())

    def on_path(self, path: np.ndarray, counts: np.ndarray, lets_live: bool) -> TreeSample:
        """The sample in a tree; rows of requests that saw the weights change go live if they are to."""
        rows, sent, answered = self.spans.T
        versions = np.repeat(np.where(sent == answered, sent, NO_VERSION), rows)
        goes_live = np.repeat((sent != answered) & lets_live, rows)
        return TreeSample(self.identity, path, self.record, versions, counts, goes_live)


@dataclass
class WaitingRows:
    """
    Packed rows on the host of the main process, between packing and their forward.

    Args:
        layout_of (`Callable`):
            Layers and experts of the model, once it is prepared: TRL makes the queue before.
        max_missing (`float`):
            Share of rows that matter to the loss and may lack a record.
        lets_live (`bool`):
            Whether rows of requests that saw the weights change route live.
        is_exact (`bool`, *optional*, defaults to `False`):
            Whether samples share a token only where their records agree.
    """

    layout_of: Callable[[], RoutingLayout]
    max_missing: float
    lets_live: bool
    is_exact: bool = False
    error: Exception | None = field(default=None, init=False)  # raised where all processes meet
    samples: int = field(default=0, init=False)  # seen so far
    _rows: dict[int, PackedRow] = field(default_factory=dict, init=False)
    _packed: int = field(default=0, init=False)

    @property
    def layout(self) -> RoutingLayout:
        """Layers and experts of the model."""
        return self.layout_of()

    def drop(self) -> None:
        """Give all rows back."""
        self._rows.clear()

    def routes_of(self, sample: Any) -> QueuedRoutes:
        """Take the record of a sample from the queue; what is wrong with it is kept until a row is taken."""
        identity, self.samples = self.samples, self.samples + 1
        rows = len(sample.input_ids) - 1
        record, spans = getattr(sample, "record", None), getattr(sample, "spans", None)
        fault = getattr(sample, "fault", None)
        if record is None or spans is None or len(record) != rows:
            size = (rows, len(self.layout.moe_layers), self.layout.top_k)
            fault = fault or _why_unusable(record, len(sample.input_ids), identity, sample)
            record = torch.full(size, self.layout.missing, dtype=self.layout.storage_dtype, device="cpu").numpy()
            spans = np.array([[rows, sample.model_version, sample.model_version]])
        if fault is not None and self.error is None:
            self.error = ValueError(f"a record of the rollout process cannot be used: {fault}")
        return QueuedRoutes(identity, record, spans, int(spans[0, 1]) if len(spans) else sample.model_version)

    def marked(self, tokens: np.ndarray, record: np.ndarray) -> np.ndarray:
        """
        Let tokens with different rows be different ones for whoever looks for common prefixes.

        Args:
            tokens (`numpy.ndarray` of shape `(T,)`, `int64`):
                Token ids.
            record (`numpy.ndarray` of shape `(T - 1, L, K)`):
                Packed ids. Their order in a row does not count.

        Returns:
            `numpy.ndarray` of shape `(T,)`: The token in the lower bits, a mark of its row above.
        """
        marks = np.zeros(len(tokens), dtype=np.int64)
        for layer, of_expert in enumerate(self._marks):
            marks[:-1] += of_expert[record[:, layer].astype(np.uint16)].sum(-1)
        return tokens | ((marks & _MARKS) << _TOKEN_BITS)

    @cached_property
    def _marks(self) -> np.ndarray:
        """A random number for each expert of each layer, whose sum stands for a set of them; for missing ones, too."""
        ids = np.iinfo(np.uint8 if self.layout.missing > 0 else np.uint16).max + 1
        size = (len(self.layout.moe_layers), ids)
        return np.random.default_rng(0).integers(-(1 << 62), 1 << 62, size=size)

    def add(self, rows: Sequence[PackedRow]) -> list[int]:
        """Take the rows of a batch, one a process, and number them."""
        matters = sum(row.tree.matters for row in rows)
        missing = sum(row.tree.missing - row.tree.live for row in rows)
        if missing > self.max_missing * matters and self.error is None:
            self.error = RuntimeError(
                f"{missing} of {matters} tokens that the loss depends on have no record, but "
                f"`routing_replay_max_missing` allows {self.max_missing:.2%}. Start the server with its flag for "
                "routed experts, or set `routing_replay_max_missing` to let these tokens route live."
            )
        numbers = range(self._packed, self._packed + len(rows))
        self._packed += len(rows)
        self._rows.update(zip(numbers, rows, strict=True))
        return list(numbers)

    def take(self, first: int, count: int) -> list[PackedRow]:
        """
        Give away the rows of a batch.

        Raises:
            `Exception`: What was wrong with any record so far.
            [`MisalignedRecordError`]: If the rows are not there.
        """
        if self.error is not None:
            raise self.error
        numbers = range(first, first + count)
        lacking = [number for number in numbers if number not in self._rows]
        if lacking:
            raise MisalignedRecordError(
                f"the batch names packed row {lacking[0]}, but {len(self._rows)} of {self._packed} rows wait for "
                f"their forward: its `{ROW_NUMBER}` was edited, or it was trained before. Compute the loss of a batch "
                "once."
            )
        return [self._rows.pop(number) for number in numbers]


def _why_unusable(record: np.ndarray | None, tokens: int, identity: int, sample: Any) -> str:
    if not hasattr(sample, "record"):
        return (
            f"sample {identity} is a {type(sample).__name__} without one. Let R3AsyncGRPOTrainer build its rollout "
            "worker, or derive yours from TRL's AsyncRolloutWorker."
        )
    try:
        check_length(0 if record is None else len(record), tokens, identity)
    except ValueError as error:
        return str(error)
    return f"sample {identity} has {tokens} tokens, and no request that told their rows. Roll out two tokens or more."


class _Noting:
    """A queue that remembers what was taken last."""

    def __init__(self, queue: Any):
        self._queue, self.last = queue, None

    def get(self, *args, **kwargs):
        self.last = self._queue.get(*args, **kwargs)
        return self.last

    def qsize(self) -> int:
        return self._queue.qsize()


class RoutedQueueDataset(RolloutQueueDataset):
    """
    `RolloutQueueDataset` of TRL, whose samples come with what was recorded of them.

    Args:
        waiting ([`WaitingRows`]):
            Where records are checked.
    """

    def __init__(self, waiting: WaitingRows, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._waiting = waiting

    def __iter__(self) -> Iterator[dict[str, Any]]:
        noting = _Noting(self.queue)
        with swapped(self, "queue", noting):
            for example in super().__iter__():
                routes = self._waiting.routes_of(noting.last)
                if self._waiting.is_exact:
                    example["input_ids"] = self._waiting.marked(example["input_ids"], routes.record)
                yield {**example, "routes": routes}


@dataclass
class RoutedCollator(DataCollatorForRollout):
    """`DataCollatorForRollout` of TRL, which also packs the records of each row, and leaves them where they are."""

    waiting: WaitingRows | None = None

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """`torch_call` of TRL."""
        (rows,) = examples
        assert self.waiting is not None  # of whoever swapped it in
        tokens = [np.array(row.tokens) & _TOKENS for row in rows]
        with ExitStack() as stack:
            for row in rows:  # what is packed as a token then says which node of the tree stands there
                stack.enter_context(swapped(row, "tokens", range(len(row.tokens))))
            batch = super().torch_call(examples)
        labels = batch["shift_labels"]
        labels[labels >= 0] &= _TOKENS
        packed = []
        for row, of_node, ids, depths in zip(rows, tokens, batch["input_ids"], batch["position_ids"], strict=True):
            order = ids[: len(of_node)].numpy().copy()
            ids[: len(of_node)] = torch.from_numpy(of_node[order])
            packed.append(self._packed(row, order, ids[: len(of_node)].clone(), depths[: len(of_node)].clone()))
        batch[ROW_NUMBER] = torch.tensor(self.waiting.add(packed), device="cpu")
        return batch

    def _packed(self, row: Any, order: np.ndarray, tokens: torch.Tensor, depths: torch.Tensor) -> PackedRow:
        assert self.waiting is not None
        at = np.empty_like(order)
        at[order] = np.arange(len(order))
        routes: list[QueuedRoutes] = [sample["routes"] for sample in row.samples]
        samples = [
            each.on_path(at[nodes], sample["completion_mask"].astype(bool), self.waiting.lets_live)
            for each, nodes, sample in zip(routes, row.sample_nodes, row.samples, strict=True)
        ]
        tree = TreeRecord.of(samples, len(order), self.waiting.layout)
        return PackedRow(tokens, depths, tree, [each.sent for each in routes], sum(r.is_spanning for r in routes))
