"""Right and wrong records of small models, and what live routing says about them inside a replayed forward.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token, M observed rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_r3 import RouterReplay
from trl_r3.alarm.evidence import RoutingEvidence, Verdict
from trl_r3.records.samples import Observation


@torch.no_grad()
def engine_of(model, precision: str):
    """The model as an engine would run it: in "bf16", or in bf16 with weights rounded to "fp8", scaled by tensor."""
    engine = copy.deepcopy(model)
    if precision == "fp8":
        for parameter in engine.parameters():
            if parameter.ndim >= 2:
                scale = parameter.abs().max() / torch.finfo(torch.float8_e4m3fn).max
                parameter.copy_((parameter / scale).to(torch.float8_e4m3fn).float() * scale)
    return engine.to(torch.bfloat16)


def record_of(model, tokens: Tensor) -> Tensor:
    """What the model selects for a batch without padding: (B, T, L, K)."""
    with RouterReplay(model) as replay, torch.no_grad(), replay.record() as recorded:
        model(tokens)
    return recorded.routed_experts


@dataclass
class Bench:
    """A model in training and the batch that it replays."""

    model: torch.nn.Module
    tokens: Tensor  # (B, T)
    shaken: bool = False  # by the dropout of training

    def observe(self, record: Tensor) -> tuple[RouterReplay, Observation]:
        """Replay a record, and note live and recorded routing wherever both neighbours have a row."""
        live: dict[int, Tensor] = {}
        with RouterReplay(self.model, gating="intercept") as replay, torch.no_grad():
            for router in replay.routers:
                router.replay = _noting(router.replay, live, router.layer)
            self.model.train(self.shaken)
            with replay.replay(record):
                self.model(self.tokens)
            self.model.eval()
        batch, length = self.tokens.shape
        live_BTLK = torch.stack([live[layer] for layer in replay.moe_layers], 1).unflatten(0, (batch, length))
        sample = torch.arange(batch).repeat_interleave(length - 3)
        # the last token of a rollout was never fed, so its row is no neighbour
        rows = [record[:, 1 + step : length - 2 + step].flatten(0, 1) for step in (0, -1, 1)]
        return replay, Observation(sample, live_BTLK[:, 1:-2].flatten(0, 1), *rows)

    def verdict(self, record: Tensor) -> Verdict:
        """What the evidence says."""
        replay, observation = self.observe(record)
        evidence = RoutingEvidence(replay.layout)
        evidence.add(observation)
        verdict = evidence.verdict()
        assert verdict is not None, f"{evidence.rows} rows are too few to judge"
        return verdict


def _noting(run: Callable, live: dict[int, Tensor], layer: int) -> Callable:
    def replay(*args, **kwargs):
        routed = run(*args, **kwargs)
        live[layer] = routed.live_NK
        return routed

    return replay


# Wrong records, by what went wrong: each takes a right one (B, T, L, K) with 8 samples and 2 layers or more, and gives
# the wrong one and a pattern for what an error names. `layers` are the decoder layers by MoE layer.


def moved_later(record, layers):
    return record[:, [0, *range(record.shape[1] - 1)]], r"moved by one token, .* one later"


def moved_earlier(record, layers):
    last = record.shape[1] - 1
    return record[:, [*range(1, last + 1), last]], r"moved by one token, .* one earlier"


def other_layer(record, layers):
    wrong = record.clone()
    wrong[:, :, -1] = record[:, :, 0]
    return wrong, rf"layer {layers[-1]} \(the lowest.* layer {layers[0]} \(kappa"


def rotated_layers(record, layers):
    return record.roll(1, 2), rf"layer {layers[0]} \(the lowest.* layer {layers[1]} \(kappa"


def other_sample(record, layers):
    return record.roll(1, 0), rf"layer {layers[0]} \(the lowest.* other tokens"


def half_other_sample(record, layers):
    wrong = record.clone()
    wrong[::2] = record[::2].roll(1, 0)
    return wrong, r"4 of 8 samples .*another sample: sample 0 .*sample 2 .*sample 4 .*sample 6 "


def one_other_sample(record, layers):
    wrong = record.clone()
    wrong[3] = record[4]
    return wrong, r"1 of 8 samples .*another sample: sample 3 "


def one_moved_sample(record, layers):
    wrong = record.clone()
    wrong[3, 1:] = record[3, :-1]
    return wrong, r"1 of 8 samples .*moved by one token: .*sample 3 "


def layer_of_other_sample(record, layers):
    wrong = record.clone()
    wrong[:, :, -1] = record[:, :, -1].roll(1, 0)
    return wrong, rf"layer {layers[-1]} \(the lowest.* other tokens"


def constant_layer(record, layers):
    wrong = record.clone()
    wrong[:, :, -1] = record[0, 5, -1]
    return wrong, rf"layer {layers[-1]} \(the lowest.* constant row"


def constant(record, layers):
    return record[:1, 5:6].expand_as(record).clone(), rf"layer {layers[0]} \(the lowest.* constant row"


OF_LAYERS = (moved_later, moved_earlier, other_layer, rotated_layers, other_sample, layer_of_other_sample)
OF_LAYERS += (constant_layer, constant)
OF_SAMPLES = (half_other_sample, one_other_sample, one_moved_sample)
