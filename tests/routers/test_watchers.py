"""Whoever watches the decoder sees the rows of the batch: a pass that is watched keeps its padding."""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from engines.tiny_chat import tiny_qwen3_moe
from oracles import foreign_record, give_forward

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids, experts_of
from trl_r3.routers.watchers import Watchers

MASK = torch.tensor([[0] * 5 + [1] * 7, [1] * 9 + [0] * 3, [0, 0] + [1] * 8 + [0, 0], [1] * 12])
IDS = (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10


def note_in(rows, args):
    rows.append(next(arg for arg in args if torch.is_tensor(arg)).shape[:-1].numel())


def hooked(place, wrap=lambda hook: hook):
    def watch(model, rows):
        module = model.get_submodule(place)
        return module.register_forward_pre_hook(wrap(lambda module, args: note_in(rows, args)))

    return watch


def behind(model, rows):
    return model.model.layers[2].mlp.gate.register_forward_hook(lambda module, args, output: note_in(rows, args))


def everywhere(model, rows):
    experts = model.get_submodule(EXPERTS)

    def note(module, args):
        if module is experts:
            note_in(rows, args)

    return torch.nn.modules.module.register_module_forward_pre_hook(note)


class Spy:
    """A forward in place of the own one."""

    def __init__(self, model, rows):
        self.module = model.model.layers[2].mlp.experts
        before, own = vars(self.module).get("forward"), self.module.forward

        @functools.wraps(own)
        def forward(*args):
            note_in(rows, args)
            return own(*args)

        self.before, self.module.forward = before, forward

    def remove(self):
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


EXPERTS = "model.layers.2.mlp.experts"
WATCHES = {
    "experts": (hooked(EXPERTS), EXPERTS),
    "experts, by a callable of a library around ours": (hooked(EXPERTS, torch.no_grad()), EXPERTS),
    "experts, by a partial": (hooked(EXPERTS, lambda hook: functools.partial(hook)), EXPERTS),
    "a gate, behind it": (behind, "model.layers.2.mlp.gate"),
    "a block": (hooked("model.layers.3.mlp"), "model.layers.3.mlp"),
    "attention": (hooked("model.layers.0.self_attn.q_proj"), "model.layers.0.self_attn.q_proj"),
    "a layer": (hooked("model.layers.0"), "model.layers.0"),
    "what the head is given": (hooked("model.norm"), "model.norm"),
    "all modules": (everywhere, "all modules"),
    "a forward in place": (Spy, EXPERTS),
}


def logits(model, replay):
    with torch.no_grad(), replay.replay(foreign_record(replay, 4, 12)):
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


def counted(model):
    """Rows that the experts of the last layer compute."""
    rows = []

    def forward(own, hidden, *args):
        rows.append(hidden.shape[0])
        return own(hidden, *args)

    give_forward(experts_of(model)[3], forward)
    return rows


def test_a_forward_of_a_class_that_somebody_replaced_is_a_watcher(monkeypatch):
    """And one that the class was written with, wherever that is, is none."""
    model, rows = tiny_qwen3_moe(), []
    with RouterReplay(model) as replay:
        padded = logits(model, replay)
    experts, gate = experts_of(model)[3], model.model.layers[3].mlp.gate
    give_forward(gate, lambda own, *args: own(*args))
    own = type(experts).forward

    def forward(self, hidden, *args):
        rows.append(hidden.shape[0])
        return own(self, hidden, *args)

    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding) == "skipped"
    monkeypatch.setattr(type(experts), "forward", forward)
    with RouterReplay(model, padding="auto") as replay:
        rows.clear()
        assert torch.equal(logits(model, replay), padded)
        assert set(rows) == {48} and f"kept: a forward of {__name__}." in str(replay.padding)


@pytest.mark.parametrize("watch", ["experts", "a forward in place"])
def test_nothing_is_tried_in_front_of_a_watcher(watch):
    """Who watches from the beginning sees what attaching always does, and no trial."""
    seen = {}
    for padding in ("keep", "auto"):
        model, seen[padding] = tiny_qwen3_moe(), []
        watcher = WATCHES[watch][0](model, seen[padding])
        with RouterReplay(model, padding=padding) as replay:
            logits(model, replay)
            if padding == "auto":
                assert str(replay.padding).startswith("kept: a forward")
                watcher.remove()
                assert str(replay.padding).startswith("kept: not tried, as a forward")
                logits(model, replay)
    assert seen["auto"] == seen["keep"] != []


@pytest.mark.parametrize(
    ("watch", "place", "attention"),
    [*((*case, "sdpa") for case in WATCHES.values()), (*WATCHES["experts"], "eager")],
    ids=[*WATCHES, "by experts only"],
)
def test_a_watched_pass_keeps_its_padding(watch, place, attention, caplog):
    model, rows = tiny_qwen3_moe(), []
    model.config._attn_implementation = attention
    computed = counted(model)
    with RouterReplay(model) as replay:
        padded = logits(model, replay)
    with RouterReplay(model, padding="auto") as replay:
        free = str(replay.padding)
        assert free.startswith("skipped") and replay.padding.used in ("all", "experts, columns")
        computed.clear()
        watcher = watch(model, rows)
        for _ in range(2):
            assert torch.equal(logits(model, replay), padded)
        assert computed == [48, 48] and set(rows) == {48}
        assert f"watches {place}" in repr(replay) or f"is in place of that of {place}" in repr(replay)
        assert f"{__name__}." in str(replay.padding) and replay.padding.used == "none"
        (said,) = [record.getMessage() for record in caplog.records if "watch" in record.getMessage()]
        assert said == f"padding is kept in a forward: {str(replay.padding).removeprefix('kept: ')}"
        watcher.remove()
        logits(model, replay)
        assert computed[2:] == [int(MASK.sum())] and str(replay.padding) == free


def test_without_a_look_for_watchers_they_see_other_rows(monkeypatch):
    """The wrong variant."""
    monkeypatch.setattr(Watchers, "find", lambda self: None)
    model, rows = tiny_qwen3_moe(), []
    with RouterReplay(model, padding="auto") as replay:
        hooked(EXPERTS)(model, rows)
        logits(model, replay)
    assert rows == [int(MASK.sum())]


def test_what_libraries_put_there_watches_nobody():
    model = tiny_qwen3_moe()
    add_hook_to_module(experts_of(model)[0], ModelHook())  # a forward of Accelerate around the own one
    model(input_ids=IDS, output_hidden_states=True)  # hooks of Transformers, which stay
    with RouterReplay(model, padding="auto") as replay, executed_ids(model) as seen:
        add_hook_to_module(experts_of(model)[2], ModelHook())  # and around that of replay
        logits(model, replay)
        assert str(replay.padding) == "skipped"
    assert {len(ids) for calls in seen.values() for ids in calls} == {int(MASK.sum())}


def test_a_watcher_from_before_attaching_is_found_and_stays_named():
    model, rows = tiny_qwen3_moe(), []
    Spy(model, rows)
    with RouterReplay(model, padding="auto") as replay:
        rows.clear()
        logits(model, replay)
    assert rows == [48] and f"kept: a forward of {__name__}.forward is in place" in repr(replay)
