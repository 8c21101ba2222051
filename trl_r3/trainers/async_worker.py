"""The rollout process of TRL's AsyncGRPO, recording: what it passes on, from an answer of the server to its queue.

TRL spawns the process with a class of loop. Whichever that is, one that keeps the routes is derived from it there.

Legend: T tokens of a sample, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections import defaultdict
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from trl.experimental.async_grpo import async_rollout_worker
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample, TrainingSequence, _SampleBuilder

from .._compat import swapped
from ..engines.conversations import Conversation, ConversationRoutes
from ..engines.payloads import decode_vllm_http
from ..engines.turns import common_prefix
from ..records.record import RoutingLayout

if TYPE_CHECKING:
    from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop as _Loop
else:
    _Loop = object

_COMPLETIONS = "/v1/completions"
_LOST = (
    "the rollout loop made the sampled tokens of a turn anew, so that the routes which came with them are lost. Hand "
    "on the list that `_generate_one_turn` returns as it is."
)
_EDITED = (
    "the rollout loop returned a sample from `_score_group` whose tokens are those of no sequence of its group, so "
    "that its routes are not known. Return whole sequences as they are, or leave them out."
)


@dataclass
class RoutedSequence(TrainingSequence):
    """[`TrainingSequence`] of TRL with the routes of its tokens."""

    routes: ConversationRoutes = ConversationRoutes()


class RoutedBuilder(_SampleBuilder):
    """`_SampleBuilder` of TRL, which joins the turns of a conversation, joining their routes as well."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.routes = ConversationRoutes()

    def append_turn(self, turn, *args, **kwargs) -> None:
        """`append_turn` of TRL."""
        matched = common_prefix(self.tokens, turn.prompt_ids)
        super().append_turn(turn, *args, **kwargs)
        lost = ConversationRoutes(fault=_LOST)
        self.routes = self.routes.go_on(matched, getattr(turn.output_ids, "routes", lost))

    def to_training_sequence(self, *args, **kwargs):
        """`to_training_sequence` of TRL."""
        return RoutedSequence(**vars(super().to_training_sequence(*args, **kwargs)), routes=self.routes)


@dataclass(slots=True)
class RoutedSample(RolloutSample):
    """
    [`RolloutSample`] of TRL with its record, as it goes through the queue.

    Args:
        record (`numpy.ndarray` of shape `(T - 1, L, K)`, *optional*):
            Packed ids.
        spans (`numpy.ndarray` of shape `(pieces, 3)`):
            How many rows a request has told, and the versions of the weights when it was sent and when answered.
        fault (`str`, *optional*):
            What was wrong with an answer.
    """

    record: np.ndarray | None = None
    spans: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    fault: str | None = None

    @classmethod
    def of(cls, sample: RolloutSample, routes: ConversationRoutes) -> RoutedSample:
        """Add what was recorded of it to a sample."""
        own = {each.name: getattr(sample, each.name) for each in fields(RolloutSample)}
        record = routes.rows.numpy() if routes.pieces else None  # a tensor would go through shared memory
        return cls(**own, record=record, spans=routes.spans, fault=routes.fault)


class RecordingLoop(_Loop):
    """
    What is added to a rollout loop of TRL: it keeps `routed_experts` of each answer, and asks for those it lacks.

    It raises nothing because of routes. An error would end the process, and nobody would be told which record it was.
    """

    layout: RoutingLayout

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._conversation: ContextVar[Conversation] = ContextVar("conversation")  # of the task that rolls it out
        self._answers = 0

    def run(self) -> None:
        """`run` of TRL."""
        self.rollout_buffer.cancel_join_thread()  # or the process ends only when somebody has read its last samples
        with swapped(async_rollout_worker, "_SampleBuilder", RoutedBuilder):
            super().run()

    async def _generate_one(self, *args, **kwargs):
        self._conversation.set(Conversation(self.layout))
        return await super()._generate_one(*args, **kwargs)

    async def _post(self, path: str, payload: dict[str, Any], *args, **kwargs) -> dict[str, Any]:
        if path != _COMPLETIONS:
            return await super()._post(path, payload, *args, **kwargs)
        # a turn that is sampled from another task stands for itself, and all of its rows come
        conversation = self._conversation.get(None) or Conversation(self.layout)
        asked = copy(conversation)  # another request of it may be answered before this one
        prompt = payload["prompt"]
        if left_out := conversation.rows_left_out(prompt):
            payload = {**payload, "routed_experts_prompt_start": left_out}
        sent_at = self.model_version
        answer = await super()._post(path, payload, *args, **kwargs)
        versions = sent_at, self.model_version
        for choice in answer.get("choices", ()):
            self._answers += 1
            told = _decoded(choice.pop("routed_experts", None))
            choice["token_ids"] = asked.add(prompt, choice["token_ids"], told, versions, self._answers)
            conversation.tokens, conversation.routes = asked.tokens, asked.routes
        return answer

    async def _score_group(self, group) -> list[RolloutSample]:
        samples = await super()._score_group(group)
        left = defaultdict(list)
        for each in chain.from_iterable(group.completions_sequences):
            left[_tokens(each)].append(each)
        # a loop of one's own may leave samples out, or order them
        return [RoutedSample.of(sample, _take_routes(left[_tokens(sample)], sample)) for sample in samples]


def _tokens(sequence: TrainingSequence | RolloutSample) -> bytes:
    return np.asarray(sequence.input_ids, np.int64).tobytes()


def _take_routes(sequences: list[TrainingSequence], sample: RolloutSample) -> ConversationRoutes:
    """Of the sequence a sample was made of, among those with its tokens: that drawn alike, or the first."""
    if not sequences:
        return ConversationRoutes(fault=_EDITED)
    drawn = [np.array_equal(np.asarray(each.old_log_probs, np.float32), sample.old_log_probs) for each in sequences]
    return getattr(sequences.pop(drawn.index(True) if any(drawn) else 0), "routes", ConversationRoutes(fault=_LOST))


def _decoded(payload: str | None) -> np.ndarray | ValueError | None:
    """(R, D, K), or why there are none; an answer without routes is one of missing rows."""
    try:
        return None if payload is None else decode_vllm_http(payload)
    except ValueError as error:
        return error


def recording_loop(loop_class: type, layout: RoutingLayout, **kwargs: Any) -> Any:
    """
    Build a loop that records, in the process that TRL has spawned for it.

    Args:
        loop_class (`type`):
            A rollout loop of TRL, or one that is derived from it.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        kwargs:
            Arguments of the loop.
    """
    return type(f"Recording{loop_class.__name__}", (RecordingLoop, loop_class), {"layout": layout})(**kwargs)
