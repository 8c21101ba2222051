"""Trainers that distil, and a watch on the forwards of a model that asks neither them nor the package.

Legend: B batch, T tokens of a padded sequence, N tokens of a call, L MoE layers, K experts per token.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from oracles import changed_rows, padded, stacked
from torch import Tensor
from trainers.runs import SHORT
from trainers.watching import PROMPTS, distinct_characters, make_tokenizer, scrambled_routers

from trl_r3 import (
    R3DistillationConfig,
    R3DistillationTrainer,
    R3IWOPDConfig,
    R3IWOPDTrainer,
    R3SDPOConfig,
    R3SDPOTrainer,
)
from trl_r3._compat import find_causal_lm
from trl_r3.cli.experts import executed_ids, watched_experts

TRAINERS = {"distillation": R3DistillationTrainer, "sdpo": R3SDPOTrainer, "iw_opd": R3IWOPDTrainer}
CONFIGS = {"distillation": R3DistillationConfig, "sdpo": R3SDPOConfig, "iw_opd": R3IWOPDConfig}
OWN_SETTINGS = {
    "distillation": {},
    "sdpo": {"num_generations": 2, "teacher_model_kind": "live"},
    "iw_opd": {"max_length": 64, "top_p": 1.0},
}

ADAPTER = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@dataclass
class Forward:
    """One forward of the decoder."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    generates: bool
    builds_graph: bool
    weights: dict[str, Tensor]
    calls: dict[int, list[Tensor]] = field(default_factory=dict)  # by decoder layer: (N, K)
    recomputed: dict[int, list[Tensor]] = field(default_factory=dict)  # likewise, in backward
    hidden: Tensor | None = None  # (B, T, H)

    position_ids: Tensor | None = None  # (1, T) of a row that holds sequences one after the other

    def samples(self, calls: dict[int, list[Tensor]]) -> list[tuple[list[int], Tensor]]:
        """Tokens of each sequence without padding, and the rows (T - 1, L, K) that they executed."""
        mask = self.attention_mask if self.position_ids is None else torch.ones_like(self.input_ids)
        return self.split(torch.stack([padded(calls[layer][0], mask) for layer in sorted(calls)], 2).long())

    def split(self, rows_BTLK: Tensor) -> list[tuple[list[int], Tensor]]:
        """Tokens of each sequence without padding, and its rows but for the last token."""
        if self.position_ids is not None:
            starts = (self.position_ids[0] == 0).nonzero()[:, 0].tolist()
            ends = [*starts[1:], self.position_ids.shape[1]]
            return [
                (self.input_ids[0, a:b].tolist(), rows_BTLK[0, a : b - 1]) for a, b in zip(starts, ends, strict=True)
            ]
        real_BT = self.attention_mask.bool()
        return [(self.input_ids[i][real].tolist(), rows_BTLK[i][real][:-1]) for i, real in enumerate(real_BT)]


class ForwardWatch:
    """
    Notes every forward of a model, by hooks on its decoder and on its experts.

    Args:
        model (`torch.nn.Module`):
            The model, in whatever wrapper.
        live (`bool`, *optional*, defaults to `True`):
            Keep a copy and the weights of each forward, to say what live routing would have been.
    """

    def __init__(self, model, live=True):
        self.model, self.forwards, self._open = model, [], None
        self.pristine = copy.deepcopy(model).eval() if live else None
        self._hooks = ExitStack()
        self._hooks.enter_context(watched_experts(model, self._note))
        decoder = find_causal_lm(model).model
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        decoder.register_forward_hook(self._leave)

    def _enter(self, module, args, kwargs):
        weights = {}
        if self.pristine is not None:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        mask = kwargs.get("attention_mask")
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = torch.ones_like(ids) if mask is None else mask
        generates = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        builds = torch.is_grad_enabled() and module.training  # attaching tries the model in evaluation mode
        self._open = Forward(ids.clone(), mask.clone(), generates, builds, weights)
        if not generates and kwargs.get("position_ids") is not None:
            self._open.position_ids = kwargs["position_ids"].clone()
        self.forwards.append(self._open)

    def _leave(self, module, args, output):
        self._open.hidden = output.last_hidden_state.detach().clone()
        self._open = None

    def _note(self, layer, ids):
        if self._open is not None:
            self._open.calls.setdefault(layer, []).append(ids)
        elif self.forwards and self.forwards[-1].builds_graph:
            self.forwards[-1].recomputed.setdefault(layer, []).append(ids)
        else:  # a teacher that shares the module came in between
            [*_, last] = [one for one in self.forwards if one.builds_graph]
            last.recomputed.setdefault(layer, []).append(ids)

    @property
    def updates(self) -> list[Forward]:
        """The forwards of the student that are trained on."""
        return [one for one in self.forwards if one.builds_graph]

    @property
    def scored(self) -> list[Forward]:
        """Forwards that build no graph and generate nothing: old policies, and a teacher in the same module."""
        return [one for one in self.after_rollout if not one.builds_graph]

    @property
    def after_rollout(self) -> list[Forward]:
        """Forwards that generate nothing, from the first rollout on: attaching tries the model before."""
        first = next((at for at, one in enumerate(self.forwards) if one.generates), 0)
        return [one for one in self.forwards[first:] if not one.generates]

    def rollout(self) -> list[tuple[list[int], Tensor]]:
        """Tokens that were fed for each sequence, and the rows that they executed."""
        fed, group = [], []
        for one in [*self.forwards, None]:
            if group and (one is None or not one.generates or one.input_ids.size(1) > 1):
                fed += _joined(group)
                group = []
            if one is not None and one.generates:
                group.append(one)
        return fed

    def live_rows(self, one: Forward) -> Tensor:
        """(B, T, L, K) of a copy that was never touched, at the weights of that forward."""
        return stacked(self._by_copy(one)[1], len(one.input_ids))

    def live_hidden(self, one: Forward) -> Tensor:
        """(B, T, H) of it."""
        return self._by_copy(one)[0]

    def _by_copy(self, one: Forward):
        self.pristine.load_state_dict(one.weights, strict=False)
        decoder = find_causal_lm(self.pristine).model
        given = {"attention_mask": one.attention_mask}
        if one.position_ids is not None:
            given = {"position_ids": one.position_ids}
        with torch.no_grad(), executed_ids(self.pristine) as seen:
            output = decoder(input_ids=one.input_ids, use_cache=False, **given)
        return output.last_hidden_state, seen


def _joined(forwards: list[Forward]) -> list[tuple[list[int], Tensor]]:
    tokens_BT = torch.cat([one.input_ids for one in forwards], 1)
    rows_BTLK = torch.cat([stacked(one.calls, len(one.input_ids)) for one in forwards], 1)
    starts = [mask.tolist().index(1) for mask in forwards[0].attention_mask]
    return [(tokens_BT[i, start:].tolist(), rows_BTLK[i, start:]) for i, start in enumerate(starts)]


def wrong_rows(sample: tuple[list[int], Tensor], rollout: list[tuple[list[int], Tensor]]) -> int:
    """How many (row, layer) pairs of a sample differ from those of the rollout that fed its tokens."""
    tokens, rows = sample
    found = [recorded[: len(rows)] for fed, recorded in rollout if fed[: len(rows)] == tokens[:-1]]
    assert found, f"{tokens} was never rolled out"
    return min(int(changed_rows(rows, each).sum()) for each in found)


def assert_updates_replay(watch: ForwardWatch, rollout=None, recomputes: bool = False) -> None:
    """Every update executed its rollout, and a live forward would not have."""
    rollout = watch.rollout() if rollout is None else rollout
    assert watch.updates
    for one in watch.updates:
        live = watch.live_rows(one)
        changed = sum(wrong_rows(sample, rollout) for sample in one.split(live))
        assert changed > 20, "live routing agrees with the record, so replay shows nothing"
        for calls in (one.calls, one.recomputed) if recomputes else (one.calls,):
            assert [wrong_rows(sample, rollout) for sample in one.samples(calls)] == [0] * len(one.split(live))
        assert recomputes == bool(one.recomputed)


def assert_teacher_is_live(watch: ForwardWatch, forwards: list[Forward]) -> None:
    """To the last bit what a model computes that was never touched."""
    assert forwards
    for one in forwards:
        assert torch.equal(one.hidden, watch.live_hidden(one)), "the teacher did not route live"


def scramble_rollouts(model) -> None:
    """Let whatever a model generates come from routers that select quite other experts."""
    own = model.generate

    def generate(*args, **kwargs):
        with scrambled_routers(model):
            return own(*args, **kwargs)

    model.generate = generate


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def make_student(kind, folder, model, teacher=None, trainer_class=None, scrambles=True, passed=(), **changes):
    """A trainer of one of the kinds, for a run of a second, and the watch on its student."""
    settings = {
        "output_dir": str(folder / "out"),
        **SHORT,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "use_routing_replay": True,
        **OWN_SETTINGS[kind],
    }
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = {"prompt": PROMPTS * 4}
    given = {}
    if kind == "iw_opd":
        # with an answer, which is never read: by its tokens TRL 1.16 divides the loss
        rows = {"messages": [[user(prompt), assistant("7")] for prompt in PROMPTS * 4]}
        tokenizer.save_pretrained(folder / "teacher")  # where TRL looks for the one of a teacher
        teacher = model if teacher is None else teacher
        teacher.config._name_or_path = str(folder / "teacher")
    if kind == "sdpo":
        given["reward_funcs"] = distinct_characters
    else:
        given["teacher_model"] = model if teacher is None else teacher
    trainer = (trainer_class or TRAINERS[kind])(
        model=model,
        args=CONFIGS[kind](**{**settings, **changes}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        **given,
        **dict(passed),
    )
    if scrambles:
        scramble_rollouts(trainer.accelerator.unwrap_model(trainer.model))
    return trainer, ForwardWatch(trainer.model)
