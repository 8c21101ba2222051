"""Model types that nobody has looked at are tried: replay is right, or says that it is not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from model_zoo import build_tiny
from oracles import CHECKPOINTING, differing, foreign_record, gradients, use_checkpointing
from routers.families import TRIED, Executed, backward, expected_mask, own_record

from trl_r3 import RouterReplay, enable_routing_replay
from trl_r3.records.sources import WholeBatch


class NotTried(Exception):
    """Nothing can be said about replay on this model type."""


def trial(model_type, ids):
    """
    What replay makes of a model type that nobody has looked at: that it is right, or the error that says it is not.

    An `AssertionError` means that replay was wrong without a word.
    """
    try:
        model = build_tiny(model_type).train()
        logits, grads = backward(model, ids)
        again_logits, again_grads = backward(model, ids)
    except Exception as error:
        raise NotTried(f"not tried, for it does not run so small: {named(error)}") from error
    if not torch.equal(again_logits, logits) or differing(again_grads, grads):
        raise NotTried("not tried, for two live passes differ")
    try:
        replay = enable_routing_replay(model)
        record = own_record(model, replay, ids)
        own_logits, own_grads = backward(model, ids, routed_experts=record)
        executed = Executed(model, replay)
        foreign = foreign_record(replay, *ids.shape)
        foreign_logits, foreign_grads = backward(model, ids, routed_experts=foreign)
        mask = executed.all(ids)
    except Exception as error:  # noqa: BLE001
        return f"refused, {named(error)}"
    assert torch.equal(own_logits, logits) and differing(own_grads, grads) == [], "its own record changes bits"
    assert torch.equal(mask, expected_mask(model_type, foreign, replay.num_experts)), "foreign experts did not run"
    assert not torch.equal(foreign_logits, logits), "the experts that ran do not matter"
    outcome = "replayed"
    for kind in CHECKPOINTING[1:]:
        try:
            again_grads = recomputed(model, kind, ids, foreign, grads)
        except Exception as error:  # noqa: BLE001
            outcome += f"; with {kind} checkpointing refused, {named(error)}"
            continue
        if again_grads is not None:
            assert differing(again_grads, foreign_grads, rtol=1e-5) == [], "a recompute ran other experts"
    return outcome


def named(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def recomputed(model, kind, ids, record, live_grads):
    """The gradients of a replayed pass with checkpointing, if the model is right with it when live."""
    use_checkpointing(model, kind)
    gradients(model)  # what a backward that raised has left
    _, grads = backward(model, ids)
    if differing(grads, live_grads, rtol=1e-5):
        return None
    return backward(model, ids, routed_experts=record)[1]


@pytest.mark.parametrize("model_type", ["qwen3_moe", *TRIED])
def test_types_of_other_versions_are_right_or_refused(model_type, ids, record_property):
    """
    What a newer Transformers adds is tried and reported at the end of the run. It may not build so small, or raise,
    but not be replayed wrongly.
    """
    try:
        outcome = trial(model_type, ids)
    except NotTried as error:
        outcome = str(error)
    if model_type in TRIED:
        record_property("model type", f"{model_type}: {outcome}")
    assert model_type in TRIED or outcome == "replayed"


def replays_nothing(monkeypatch):
    monkeypatch.setattr(RouterReplay, "replay_from", lambda self, source: nullcontext())


def replays_other_experts(monkeypatch):
    check = WholeBatch.of
    other = classmethod(lambda cls, ids, layout: check((ids + 1) % layout.num_experts, layout))
    monkeypatch.setattr(WholeBatch, "of", other)


def recomputes_live(monkeypatch):
    monkeypatch.setattr("trl_r3.routers.patches.checkpoint_functions", lambda modules: [])
    monkeypatch.setattr("trl_r3.routers.router_replay.in_backward", lambda: False)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (replays_nothing, "foreign experts did not run"),
        (replays_other_experts, "its own record changes bits"),
        (recomputes_live, "a recompute ran other experts"),
    ],
)
def test_a_trial_tells_wrong_replay(wrong, what, ids, monkeypatch):
    assert trial("mixtral", ids) == "replayed"
    wrong(monkeypatch)
    with pytest.raises(AssertionError, match=what):
        trial("mixtral", ids)


@pytest.mark.parametrize("error", [ValueError("too small"), NotImplementedError("no")])
def test_a_trial_reports_what_raises(error, ids, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    assert trial("phimoe", ids).startswith("refused, UnsupportedRouterError: model.layers.0.mlp")
    monkeypatch.setattr(RouterReplay, "replay_from", fails)
    assert trial("mixtral", ids) == f"refused, {type(error).__name__}: {error}"
    monkeypatch.setattr("test_discovery_trials.build_tiny", fails)
    with pytest.raises(NotTried, match=str(error)):
        trial("mixtral", ids)
