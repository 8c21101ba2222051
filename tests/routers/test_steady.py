"""Plain training: a recompute goes through the experts of its own forward, also where the router would pick others."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from noisy import NOISE, add_noise, same_draws
from oracles import CHECKPOINTING, as_sets, changed_rows, differing, gradients, stacked, use_checkpointing
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from trl_r3 import RouterReplay, disable_routing_replay, enable_routing_replay
from trl_r3._compat import swapped
from trl_r3.cli.experts import executed_ids

RECOMPUTING = CHECKPOINTING[1:]


def backward(model, ids):
    """Gradients of a loss, and what the experts executed: in the forward, and in the recompute if there is one."""
    with executed_ids(model) as seen:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    calls = {len(each) for each in seen.values()}
    assert len(calls) == 1
    return gradients(model), [stacked(seen, ids.shape[0], call) for call in range(calls.pop())]


@pytest.fixture
def expected(model, ids):
    """Gradients and experts of the first draws, without checkpointing."""
    add_noise(model)
    model.train()
    found = backward(model, ids)
    same_draws(model)
    return found


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_without_it_the_recompute_flips(model, ids, kind, expected):
    """What it is for: backward crashes, or its gradients are wrong without a word."""
    grads, (executed,) = expected
    use_checkpointing(model, kind)
    try:
        wrong, (forward, recompute) = backward(model, ids)
    except CheckpointError:
        assert kind == "non-reentrant"
        return
    assert torch.equal(forward, executed)
    assert changed_rows(forward, recompute).float().mean() > 0.2
    assert len(differing(wrong, grads, rtol=0.1)) > len(grads) / 4


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_gradients_are_those_of_the_forward(model, ids, kind, expected):
    grads, (executed,) = expected
    use_checkpointing(model, kind)
    replay = enable_routing_replay(model, steady_recompute=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # live is what was asked for
        steady, (forward, recompute) = backward(model, ids)
    assert torch.equal(as_sets(forward), as_sets(executed))
    assert torch.equal(as_sets(recompute), as_sets(executed))
    assert differing(steady, grads, rtol=50 * NOISE) == []
    assert replay.steady_recompute
    disable_routing_replay(model)
    assert not hasattr(model.model.layers[-1].mlp.gate.forward, "around")


def test_layers_that_are_wrapped_afterwards(model, ids, expected):
    """As FSDP's `activation_checkpointing` does inside `train()`, for which one has enabled before."""
    grads, (executed,) = expected
    enable_routing_replay(model, steady_recompute=True)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    steady, (forward, recompute) = backward(model, ids)
    assert torch.equal(as_sets(forward), as_sets(executed)) and torch.equal(as_sets(recompute), as_sets(executed))
    steady = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in steady.items()}
    assert differing(steady, grads, rtol=50 * NOISE) == []


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_without_noise_it_changes_no_bit(model, ids, kind):
    use_checkpointing(model, kind)
    plain, _ = backward(model, ids)
    enable_routing_replay(model, steady_recompute=True)
    steady, _ = backward(model, ids)
    assert differing(steady, plain) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_routers_that_the_op_gates(model, ids, kind):
    """The recompute runs the code of the forward: non-reentrant checkpointing counts the tensors that both save."""
    use_checkpointing(model, kind)
    plain, _ = backward(model, ids)
    enable_routing_replay(model, gating="op", steady_recompute=True)
    steady, _ = backward(model, ids)
    assert differing(steady, plain) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_two_forwards_before_their_backwards(model, ids, kind, expected):
    """A preference loss scores twice, say; the noise differs between them."""
    use_checkpointing(model, kind)
    enable_routing_replay(model, steady_recompute=True)
    other = ids.flip(1)
    with executed_ids(model) as first:
        one = model(ids, labels=ids, use_cache=False).loss
    with executed_ids(model) as second:
        two = model(other, labels=other, use_cache=False).loss
    with executed_ids(model) as again:
        two.backward()
        one.backward()
    assert torch.equal(as_sets(stacked(again, 2, 0)), as_sets(stacked(second, 2)))
    assert torch.equal(as_sets(stacked(again, 2, 1)), as_sets(stacked(first, 2)))


class CountedOperators(TorchDispatchMode):
    """How many operators run: what a step costs where arithmetic costs nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(model, ids, context):
    """Of a forward, and of its backward with the recomputes."""
    model.zero_grad()
    with CountedOperators() as forward, context:
        loss = model(ids, labels=ids, use_cache=False).loss
    with CountedOperators() as backward:
        loss.backward()
    return forward.count, backward.count


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_it_costs_a_capture_and_a_replayed_recompute(model, ids, kind):
    use_checkpointing(model, kind)
    with RouterReplay(model) as replay:
        with replay.record() as recorded, torch.no_grad():
            model(ids)
        live = operators(model, ids, nullcontext())
        captured, _ = operators(model, ids, replay.record())
        _, replayed = operators(model, ids, replay.replay(recorded.routed_experts))
        steady = operators(model, ids, swapped(replay, "steady_recompute", True))
    assert live[0] < steady[0] <= captured
    assert live[1] < steady[1] <= replayed


def test_a_recompute_that_it_does_not_know_is_an_error(qwen, ids):
    enable_routing_replay(qwen, steady_recompute=True)
    layer = qwen.model.layers[1]
    own = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(lambda h: own(h, **kwargs), hidden, use_reentrant=True)
    loss = qwen(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.gate is recomputed in backward .* does not know"):
        loss.backward()


def test_a_model_that_is_compiled_later_is_refused(qwen, ids):
    enable_routing_replay(qwen, steady_recompute=True)
    qwen.compile(backend="eager")
    with pytest.raises(RuntimeError, match="was compiled after routing replay was attached"):
        qwen.forward(ids, labels=ids)


def test_the_warning_of_live_losses_stays_without_it(qwen, ids):
    enable_routing_replay(qwen)
    with pytest.warns(RuntimeWarning, match="computed with live routing"):
        qwen(ids, labels=ids)
