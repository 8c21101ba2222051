"""Trainers whose rollouts and updates are watched from outside, by hooks on the experts. The package is not asked.

Legend: B batch, T tokens of a padded sequence, P prompt, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from oracles import as_sets, padded
from torch import Tensor

from trl_r3.cli.experts import executed_ids


@dataclass
class WatchedTurn:
    """One call of the rollout engine."""

    step: int
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    weights: dict[str, Tensor]
    seen: dict[int, list[Tensor]]  # by decoder layer: (N, K) a call of the experts, if Transformers generates

    def rows(self, sample: int) -> Tensor:
        """(P + C - 1, L, K) of one sample, if `generate` ran on a batch padded on the left."""
        count = len(self.prompt_ids)
        fed = torch.stack(
            [
                torch.cat([call.unflatten(0, (count, -1)) for call in calls], 1)
                for _, calls in sorted(self.seen.items())
            ],
            dim=2,
        )
        prompt, completion = self.prompt_ids[sample], self.completion_ids[sample]
        padding = max(map(len, self.prompt_ids)) - len(prompt)
        return fed[sample, padding : padding + len(prompt) + len(completion) - 1]


@dataclass
class WatchedPass:
    """One pass of the policy over a batch."""

    step: int
    is_update: bool
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    executed: Tensor  # (B, T, L, K), -1 where padding was skipped
    weights: dict[str, Tensor]
    logprobs: Tensor  # (B, C)

    def samples(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Tokens of each sequence without padding, and the rows `(T - 1, L, K)` that they executed."""
        return [
            (tuple(ids[mask.bool()].tolist()), rows[mask.bool()][:-1])
            for ids, mask, rows in zip(self.input_ids, self.attention_mask, self.executed, strict=True)
        ]


class Watched:
    """Put it before a trainer among the bases of a class."""

    def __init__(self, *args, **kwargs):
        self.turns: list[WatchedTurn] = []
        self.passes: list[WatchedPass] = []
        self._updating = False
        super().__init__(*args, **kwargs)
        self.pristine = copy.deepcopy(self.model).eval()
        for module in self.pristine.modules():
            vars(module).pop("forward", None)  # TRL's scoring head, bound to the other model

    @property
    def updates(self) -> list[WatchedPass]:
        """The passes that were trained on."""
        return [one for one in self.passes if one.is_update]

    def live_rows(self, tokens: Sequence[int], weights: dict[str, Tensor]) -> Tensor:
        """(T - 1, L, K) of a plain forward, of a model that nothing was ever attached to."""
        self.pristine.load_state_dict(weights)
        with torch.no_grad(), executed_ids(self.pristine) as seen:
            self.pristine(torch.tensor([list(tokens)]), use_cache=False)
        return torch.stack([torch.cat(calls) for _, calls in sorted(seen.items())], dim=1)[:-1]

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        prompts, weights = [list(ids) for ids in prompt_ids], self._weights()
        with executed_ids(self.model) as seen:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        completions = generated[0] if isinstance(generated, tuple) else generated
        if self.model.training:
            step = self.state.global_step
            self.turns.append(WatchedTurn(step, prompts, [list(ids) for ids in completions], weights, dict(seen)))
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        with executed_ids(self.model) as seen:
            result = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        rows = [padded(torch.cat(calls), attention_mask) for _, calls in sorted(seen.items())]
        self.passes.append(
            WatchedPass(
                self.state.global_step,
                self._updating,
                input_ids.clone(),
                attention_mask.clone(),
                torch.stack(rows, dim=2),
                self._weights(),
                result[0].detach().clone(),
            )
        )
        return result

    def _compute_loss(self, *args, **kwargs):
        self._updating = True
        try:
            return super()._compute_loss(*args, **kwargs)
        finally:
            self._updating = False


def wrong_rows(executed: Tensor, expected: Tensor) -> int:
    """How many (row, layer) pairs differ as sets."""
    assert executed.shape == expected.shape, f"{tuple(executed.shape)} rows for {tuple(expected.shape)}"
    return int((as_sets(executed) != as_sets(expected)).any(-1).sum())


def assert_replayed(
    trainer: Watched,
    expected: dict[int, list[tuple[Sequence[int], Tensor]]],
    *,
    truncated_are_masked: bool = False,
) -> int:
    """
    Every update executed exactly the expected rows.

    Args:
        trainer ([`Watched`]):
            After training.
        expected (`dict`):
            By step of the rollout, tokens and rows `(T - 1, L, K)` of each of its samples.
        truncated_are_masked (`bool`, *optional*, defaults to `False`):
            Whether the trainer hides completions from the model, so that only the prompt of a sample is seen.

    Returns:
        `int`: Number of (row, layer) pairs that were compared.
    """
    compared = 0
    for one in trainer.updates:
        rollout = max(step for step in expected if step <= one.step)
        for tokens, executed in one.samples():
            candidates = [
                rows[: len(tokens) - 1]
                for fed, rows in expected[rollout]
                if tokens == (tuple(fed)[: len(tokens)] if truncated_are_masked else tuple(fed))
            ]
            assert candidates, f"step {one.step} trains on {tokens}, which no rollout made"
            # samples of the same tokens may have been computed with other neighbours
            wrong = min(wrong_rows(executed, rows) for rows in candidates)
            assert wrong == 0, f"step {one.step}: {wrong} of {executed[..., 0].numel()} pairs of row and layer differ"
            compared += executed[..., 0].numel()
    assert compared, "no update was watched"
    return compared


def rows_of_turns(trainer: Watched) -> dict[int, list]:
    """By step of the rollout, tokens and rows of each of its samples, if it had one turn."""
    return {
        turn.step: [
            ([*p, *c], turn.rows(i)) for i, (p, c) in enumerate(zip(turn.prompt_ids, turn.completion_ids, strict=True))
        ]
        for turn in trainer.turns
    }


def assert_two_rollouts_are_replayed(trainer: Watched) -> None:
    """Train on two rollouts, each for two updates: all of them replay, where live routing has moved on."""
    before = trainer._weights()
    trainer.train()
    assert any(not torch.equal(before[name], now) for name, now in trainer._weights().items())
    assert len(trainer.updates) == 4 and len({turn.step for turn in trainer.turns}) == 2
    assert_replayed(trainer, rows_of_turns(trainer))
    assert_nothing_missing(trainer, steps=4)
    last = trainer.updates[-1]
    changed = sum(wrong_rows(rows, trainer.live_rows(tokens, last.weights)) for tokens, rows in last.samples())
    assert changed > 20, "live routing still agrees with the record, so replay shows nothing"


def assert_nothing_missing(trainer: Watched, steps: int) -> None:
    """Every row of every update was replayed, by the trainer's own count too."""
    logs = [log for log in trainer.state.log_history if "routing_replay/missing_frac" in log]
    assert len(logs) == steps, f"{len(logs)} of {steps} steps logged what was replayed"
    for log in logs:
        assert log["routing_replay/missing_frac"] == 0 and log["routing_replay/replayed_frac"] == 1
