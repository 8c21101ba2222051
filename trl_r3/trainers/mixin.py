"""TRL's trainers, replaying the routes of their rollouts. What is not overridden here is left to TRL.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compat import adapters_are_off, extra_fields
from ..engines.capture import capture, rollout_of_func
from ..engines.continuous_batching import recordable_config
from ..engines.generate_settings import check_decoding
from ..engines.turns import RolloutRecord, Turn, stitch
from ..engines.vllm_engine import capturing_vllm
from ..records.checks import rows_that_matter
from ..records.sources import ScoredBatch
from ..records.storage import slice_samples
from ..routers.router_replay import RouterReplay
from .config import RoutingReplayConfigMixin
from .log import ReplayLogMixin


@dataclass
class _Scoring:
    """What the passes inside one call of TRL score."""

    known: RolloutRecord | None = None  # once there are completions
    inputs: dict[str, Any] | None = None  # of an update; without them: the passes over a fresh rollout
    old_logprobs: Tensor | None = None  # (B, C), if there is an old-policy pass

    @property
    def rollout(self) -> RolloutRecord:
        """The records."""
        assert self.known is not None, "TRL scores before it has generated"
        return self.known


class RoutingReplayMixin(ReplayLogMixin):
    """
    Routing replay for a trainer of the GRPO family: a delta of the passes that generate and score.

    Rollouts are recorded, one array a sample, and travel with TRL's own batch dict. Each pass of the policy over them
    replays; the reference policy, reward models and evaluation route live.
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

    def __init__(self, *args, **kwargs):
        self._attached_replay: RouterReplay | None = None
        self._turns: list[Turn] = []
        self._scoring: _Scoring | None = None
        config: Any = kwargs.get("args") or next((arg for arg in args if hasattr(arg, "use_routing_replay")), None)
        self._use_replay = bool(getattr(config, "use_routing_replay", False))
        if self._use_replay and not isinstance(config, RoutingReplayConfigMixin):
            raise ValueError(
                f"`use_routing_replay` is set on a {type(config).__name__}, which does not check it. Use "
                "`R3GRPOConfig`."
            )
        with capturing_vllm(config) if self._use_replay and _captures_vllm(config) else nullcontext():
            super().__init__(*args, **kwargs)
        if self._use_replay:
            if config.torch_compile:
                raise ValueError(
                    "`torch_compile=True` runs past routing replay. Set `torch_compile=False`, or "
                    "`use_routing_replay=False`."
                )
            if self.continuous_batching_config is not None:
                recordable_config(self.continuous_batching_config)
            elif not self.use_vllm:
                check_decoding(self.model, {"generation_config": self.generation_config})
            if self._is_vlm:
                raise ValueError(
                    "routing replay of vision-language models is not supported: the processor expands image "
                    "placeholders, so rollout and training tokens differ in number. Set `use_routing_replay=False`."
                )
            with self._attached():  # unsupported models fail now, not at the first step
                pass

    @contextmanager
    def _attached(self) -> Iterator[None]:
        replay = self._attached_replay = RouterReplay(
            self.accelerator.unwrap_model(self.model), self.args.routing_replay_gating
        )
        try:
            yield
        finally:
            replay.remove()
            self._attached_replay = None

    @property
    def routing_replay(self) -> RouterReplay:
        """The handle on the policy, while it trains."""
        if self._attached_replay is None:
            raise RuntimeError("routing replay is attached to the policy only while `train()` runs. Call it inside.")
        return self._attached_replay

    def train(self, *args, **kwargs):
        """`train` of TRL. The model is attached while it runs, and given back as it was."""
        if not self._use_replay:
            return super().train(*args, **kwargs)
        self._last_compared = None
        with self._attached():
            return super().train(*args, **kwargs)

    @property
    def _replays_now(self) -> bool:
        return self._use_replay and self.model.training

    @property
    def _captures(self) -> bool:
        # R2 needs no routes of the rollout; where Transformers generates, the capture also gives the log-probabilities
        by_transformers = not self.use_vllm and getattr(self, "rollout_func", None) is None
        return self.args.routing_replay_mode == "R3" or by_transformers

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self._replays_now or not self._captures:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with capture(self, self.routing_replay) as make_turn:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        completion_ids = generated[0] if isinstance(generated, tuple) else generated  # RLOO has no log-probabilities
        # the tool loop goes on to edit these lists
        self._turns.append(make_turn([list(ids) for ids in prompt_ids], [list(ids) for ids in completion_ids]))
        return generated

    def rollout_turn(self, prompt_ids: list[list[int]]) -> tuple[Turn, list | None]:
        """
        Generate one turn with the configured engine, for use in a `rollout_func`.

        Args:
            prompt_ids (list of `list[int]`):
                Prompts, one a completion.

        Returns:
            `tuple[Turn, list]`: The turn with its records (join turns with [`stitch`]), and the log-probabilities of
            its sampled tokens. In evaluation there are no records, and no log-probabilities where TRL has none.
        """
        completion_ids, logprobs = self._generate_single_turn(prompt_ids, None, {}, 1)
        turn = self._turns.pop() if self._turns else Turn(prompt_ids, completion_ids, [])
        if logprobs is None and turn.logprobs is not None:
            logprobs = [values.tolist() for values in turn.logprobs]
        return turn, logprobs

    def _generate(self, prompts):
        self._turns = []
        try:
            output = super()._generate(prompts)
            fields = extra_fields(output) if getattr(self, "rollout_func", None) is not None else None
            routes = None if fields is None else fields.pop("routed_experts", None)  # no business of reward functions
            if not self._replays_now:
                return output
            layout = self.routing_replay.layout
            if fields is None or not self._captures:
                rollout = stitch(self._turns, output[0], output[1], layout)
            else:
                rollout = rollout_of_func(routes, output[0], output[1], layout)
        finally:
            self._turns = []
        assert self._scoring is not None
        self._scoring.known = rollout
        return output

    def _rows_that_matter(self, rollout: RolloutRecord, output: dict[str, Any]) -> list[int]:
        """How many rows of each sample, from its first on, the loss depends on."""
        mask_BC = (output["completion_mask"] * output.get("tool_mask", 1)).bool().cpu()
        # the row before a token predicts it
        predicts_BC = rows_that_matter(mask_BC)
        return [
            length - 1 + int(count) if count else 0
            for length, count in zip(rollout.prompt_lengths, predicts_BC.sum(1), strict=True)
        ]

    def _check_missing(self, rollout: RolloutRecord, rows: list[int]) -> None:
        share, sample = rollout.missing_share(self.routing_replay.layout, rows)
        if share > self.args.routing_replay_max_missing:
            raise RuntimeError(
                f"{share:.2%} of the rollout's rows have no record, the first in sample {sample}, counting those that "
                f"the loss depends on, but `routing_replay_max_missing` allows "
                f"{self.args.routing_replay_max_missing:.2%}. Fix the rollout, or set `routing_replay_max_missing` to "
                "let these rows route live."
            )

    def _generate_and_score_completions(self, inputs):
        if not self._replays_now:
            return super()._generate_and_score_completions(inputs)
        with self._scores(_Scoring()) as scoring:
            output = super()._generate_and_score_completions(inputs)
            rollout = scoring.rollout
            output["routed_experts"] = rollout.records
            output["routed_prompt_lengths"] = rollout.prompt_lengths
            output["routed_rows_that_matter"] = rows = self._rows_that_matter(rollout, output)
            if self._captures:
                self._check_missing(rollout, rows)
            if rollout.logprobs is not None:
                output["rollout_logprobs"] = self._padded_like(rollout.logprobs, output["completion_ids"])
            self._log_mismatch(output, scoring.old_logprobs)
        if self._compare_is_due():
            self._log_mismatch(output, self._score_live(output), prefix="sampling/live")
        return output

    def _compute_loss(self, model, inputs):
        if not self._replays_now:
            return super()._compute_loss(model, inputs)
        rollout = RolloutRecord(inputs["routed_prompt_lengths"], inputs["routed_experts"], None)
        with self._scores(_Scoring(rollout, inputs)):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _scores(self, scoring: _Scoring) -> Iterator[_Scoring]:
        self._scoring = scoring
        try:
            yield scoring
        finally:
            self._scoring = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        def score():
            return super(RoutingReplayMixin, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

        scoring = self._scoring
        if scoring is None or (scoring.inputs is None and self._is_reference(model)):
            return score()
        prompt_width = input_ids.size(1) - logits_to_keep
        if self.args.routing_replay_mode == "R2" and scoring.inputs is None:
            result = self._record_old_policy(score, scoring.rollout, prompt_width)
            scoring.old_logprobs = result[0]
            return result
        batch = ScoredBatch(
            scoring.rollout.prompt_lengths,
            scoring.rollout.records,
            prompt_width,
            self.routing_replay.layout,
            None if scoring.inputs is None else scoring.inputs["routed_rows_that_matter"],
        )
        with self.routing_replay.replay_from(batch) as stats:
            result = score()
        batch.check_done()
        if scoring.inputs is None:
            scoring.old_logprobs = result[0]
            return result
        self._log_replay(stats, batch)
        if scoring.inputs.keys().isdisjoint(("old_per_token_logps", "old_logps")):
            # without an old policy, no update has happened since the rollout
            self._log_mismatch(scoring.inputs, result[0].detach())
        return result

    def _is_reference(self, model) -> bool:
        # with PEFT the reference is the policy's own module, so the pass tells, not the module
        return model is self.ref_model or adapters_are_off(self.accelerator.unwrap_model(model))

    def _record_old_policy(self, score, rollout: RolloutRecord, prompt_width: int):
        with self.routing_replay.record() as recorded:
            result = score()
        routes = torch.cat(recorded.forwards).cpu()
        completions = [
            record.shape[0] + 1 - length
            for record, length in zip(rollout.records, rollout.prompt_lengths, strict=True)
        ]
        rollout.records = slice_samples(routes, prompt_width, rollout.prompt_lengths, completions)
        return result


def _captures_vllm(config: Any) -> bool:
    return config.use_vllm and config.routing_replay_mode == "R3"
