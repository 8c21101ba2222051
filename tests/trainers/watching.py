"""
Trainers that are watched from outside: what their experts executed, in which pass, at which weights.

The watch sits between the code under test and TRL, and on the experts themselves; it asks the code under test nothing.

Legend: B batch, T tokens of a padded sequence, P prompt tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from oracles import padded
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from trl_r3.cli.experts import executed_ids, watched_experts

PAD, EOS, VOCAB = 0, 1, 96
PROMPTS = ["1+2=", "abcdefg", "x", "hello you", "Q?", "(a,b)", "zyxwvut", "7*8"]


def make_tokenizer():
    vocab = {"<pad>": PAD, "<eos>": EOS, **{chr(31 + i): i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="!", padding_side="left"
    )


@dataclass
class Pass:
    """One pass of a trainer over a batch."""

    name: str
    step: int
    input_ids: torch.Tensor | None = None  # (B, T)
    attention_mask: torch.Tensor | None = None  # (B, T)
    prompt_width: int = 0
    recorded: torch.Tensor | None = None  # (B, T, L, K), -1 where the rollout fed nothing
    weights: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)  # by decoder layer: list of (N, K) that its experts executed
    logits: list = field(default_factory=list)  # of a rollout: (B, V) a step
    logps: torch.Tensor | None = None

    @property
    def executed(self):
        """(B, T, L, K), -1 where padding was skipped."""
        mask = self.attention_mask if self.attention_mask is not None else torch.ones_like(self.input_ids)
        return torch.stack([padded(torch.cat(self.calls[layer]), mask) for layer in sorted(self.calls)], dim=2)

    @property
    def fed(self):
        """(B, T): positions that the rollout has a record of, and that are real."""
        return (self.recorded[:, :, 0, 0] != -1) & self.attention_mask.bool()


@dataclass
class Sample:
    """What a rollout did for one of its sequences."""

    prompt_length: int
    rows: torch.Tensor  # (P + C - 1, L, K)
    logps: torch.Tensor  # (C,) of the sampled tokens


def instance_forwards(model):
    """Modules whose forward is not that of their class."""
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


class Watching(GRPOTrainer):
    """TRL's trainer, taking notes. Goes below the code under test in the order of method resolution."""

    while_generating = staticmethod(lambda model: nullcontext())
    forgets = True  # rollouts, when the next one is made

    def __init__(self, *args, **kwargs):
        self.passes: list[Pass] = []
        self.rollouts: dict[bool, dict[tuple, Sample]] = {True: {}, False: {}}  # of training and of evaluation
        self.losses: list[float] = []
        self._open: Pass | None = None
        self._inside = None
        super().__init__(*args, **kwargs)
        # PEFT before 0.21 has a buffer that is a result, which `deepcopy` refuses
        results = {id(each): each.detach().clone() for each in self.model.buffers() if not each.is_leaf}
        self.pristine = copy.deepcopy(self.model, results)
        for module in self.pristine.modules():
            vars(module).pop("forward", None)  # TRL's scoring head, bound to the other model
        watched = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        self._watches = ExitStack()  # as long as the trainer
        for model in watched:
            self._watches.enter_context(watched_experts(model, self._note))
        causal_lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        causal_lm.register_forward_hook(
            lambda *call: self._note_logits(*call)
        )  # a copy of the model copies no trainer

    def of(self, name):
        """The passes of that name."""
        found = [one for one in self.passes if one.name == name]
        assert found, f"no {name} among {[one.name for one in self.passes]}"
        return found

    def live_routes(self, one):
        """(B, T, L, K) of a model that was never touched, at the weights of that pass."""
        self.pristine.load_state_dict(one.weights)
        with torch.no_grad(), executed_ids(self.pristine) as calls:
            self.pristine(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False)
        return Pass("live", one.step, one.input_ids, calls=calls).executed

    def _note(self, layer, ids):
        if self._open is not None:
            self._open.calls.setdefault(layer, []).append(ids)

    def _note_logits(self, module, args, output):
        if self._open is not None and self._open.name.endswith("rollout"):
            self._open.logits.append(output.logits[:, -1].detach().clone())

    @contextmanager
    def _pass(self, name, **of):
        weights = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        prefix = "" if self.model.training else "evaluation "
        self._open = one = Pass(prefix + name, self.state.global_step, weights=weights, **of)
        self.passes.append(one)
        try:
            yield one
        finally:
            self._open = None

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        with self.while_generating(self.model), self._pass("rollout") as one:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        routes = torch.stack(
            [torch.cat([c.unflatten(0, (len(prompt_ids), -1)) for c in one.calls[n]], 1) for n in sorted(one.calls)], 2
        )
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(map(len, prompt_ids)) // multiple) * multiple
        sampling = one.logits[width - 1 - routes.shape[1] :]  # a prompt may be fed in several chunks
        logps = (torch.stack(sampling, 1).double() / self.temperature).log_softmax(-1)  # (B, C, V)
        for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            rows = routes[i, width - len(prompt) : width + len(completion) - 1]
            sampled = logps[i, : len(completion)].gather(1, torch.tensor(completion)[:, None])[:, 0]
            self.rollouts[self.model.training][(*prompt, *completion)] = Sample(len(prompt), rows, sampled)
        return completion_ids, logprobs

    def _generate(self, prompts):
        if self.forgets:
            self.rollouts[self.model.training] = {}
        return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs):
        self._inside = "scoring"
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._inside = None

    def _compute_loss(self, model, inputs):
        self._inside = "update"
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._inside = None
        if self.model.training:
            self.losses.append(loss.item())
            forward = self.passes[-1]
            self._open = Pass(
                "recompute",
                forward.step,
                forward.input_ids,
                forward.attention_mask,
                forward.prompt_width,
                forward.recorded,
                forward.weights,
            )
            self.passes.append(self._open)
        return loss

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._open = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        name = {"update": "update", "scoring": "old policy", None: "comparison"}[self._inside]
        if self._inside == "scoring" and (model is self.ref_model or reference_adapters(model)):
            name = "reference"
        prompt_width = input_ids.size(1) - logits_to_keep
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "prompt_width": prompt_width}
        with self._pass(name, **batch) as one:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        one.logps = result[0].detach().clone()
        one.recorded = self._recorded_like(one)
        return result

    def _recorded_like(self, one):
        samples = [self.sample_of(one, row) for row in range(one.input_ids.shape[0])]
        recorded = torch.full((*one.input_ids.shape, *samples[0].rows.shape[1:]), -1)
        for row, sample in enumerate(samples):
            start = one.prompt_width - sample.prompt_length
            recorded[row, start : start + sample.rows.shape[0]] = sample.rows
        return recorded

    def sample_of(self, one, row):
        """The rollout of a row of a batch, found by its tokens."""
        tokens = one.input_ids[row].tolist()
        start = one.attention_mask[row].tolist().index(1)
        lengths = range(len(tokens), one.prompt_width, -1)
        mode = self.model.training  # which a reward function may have changed since
        rollout = {**self.rollouts[not mode], **self.rollouts[mode]}
        return next(rollout[key] for n in lengths if (key := tuple(tokens[start:n])) in rollout)


def reference_adapters(model):
    """Whether a PEFT model is in the state in which TRL computes the reference policy."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(layer.disable_adapters or "ref" in layer.active_adapters for layer in layers)


def distinct_characters(completions, **kwargs):
    return [len(set(text)) + 0.1 * i for i, text in enumerate(completions)]


@contextmanager
def rounded_weights(model, dtype=torch.bfloat16):
    """The weights of an engine with fewer bits."""
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    try:
        yield
    finally:
        model.load_state_dict(own)


@contextmanager
def scrambled_routers(model):
    """An engine whose routers choose quite other experts."""
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name and "lora" not in name:
                parameter.copy_(parameter.roll(3, 0))
    try:
        yield
    finally:
        model.load_state_dict(own)


def same_sets(one, other):
    """Whether two selections are the same, in whatever order."""
    return torch.equal(one.sort(-1).values, other.sort(-1).values)


class Check:
    """What a pass has to show."""

    def replayed(self, one):
        """Every row that the rollout fed went through the experts of the rollout."""
        executed, recorded = one.executed, one.recorded
        assert executed.shape == recorded.shape
        assert one.fed.any()
        assert same_sets(executed[one.fed], recorded[one.fed]), one.name

    def live(self, trainer, one):
        """Every real token went through the experts that a model never touched selects."""
        real = one.attention_mask.bool()
        assert same_sets(one.executed[real], trainer.live_routes(one)[real]), one.name

    def drifted(self, trainer, one):
        """Live routing would have been another: without this, replay proves nothing."""
        live = trainer.live_routes(one)
        assert not same_sets(live[one.fed], one.recorded[one.fed])
