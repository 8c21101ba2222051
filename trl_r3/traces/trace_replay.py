"""A trace, replayed offline: the same model at the same weights gives the same log-probabilities, bit for bit.

Legend: B samples of a forward, T tokens with padding, C completion tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from .._compat import swapped
from ..masks.masked_batch import MaskedBatch
from ..masks.restricted_head import restricted_head
from ..records.metrics import k3_kl
from ..records.samples import ScoredBatch
from ..routers.attachable import attachable
from ..routers.router_replay import RouterReplay
from .trace import Trace
from .trace_conditions import conditions, differences, padding_mode, refuse_another_model


@dataclass(frozen=True)
class TraceCheck:
    """
    What [`verify_trace`] found.

    Args:
        step (`int`):
            Step of the trace.
        tokens (`int`):
            Completion tokens of it.
        differing (`int`):
            Those whose log-probability is another one, by a single bit at least.
        largest (`float`):
            The largest difference in nats.
        k3_replayed (`float`):
            k3 between the rollout and this replay; NaN where the trace has no log-probabilities of the rollout.
        differences (list of `str`):
            What may change bits and is not as it was: versions, device, processor.
        logprobs (`torch.Tensor` of shape `(C,)`):
            What this replay gave.
    """

    step: int
    tokens: int
    differing: int
    largest: float
    k3_replayed: float
    differences: list[str]
    logprobs: Tensor = field(repr=False)

    @property
    def matches(self) -> bool:
        """Whether every bit is the one of the trace."""
        return self.differing == 0

    def __str__(self) -> str:
        if self.matches:
            return f"step {self.step}: all {self.tokens} log-probabilities are those of the trace, bit for bit"
        text = (
            f"step {self.step}: {self.differing} of {self.tokens} log-probabilities are not those of the trace, the "
            f"largest difference is {self.largest:.3g}. "
        )
        if self.differences:
            return text + f"Not as it was: {'; '.join(self.differences)}. Replay it where it was made."
        return text + f"Pass the model with the weights of step {self.step}, or replay it on the machine that made it."


def verify_trace(model: nn.Module, trace: Trace) -> TraceCheck:
    """
    Replay a trace on a model that holds the weights of its step.

    Autocast, padding, order, batch sizes, gating and the number of threads are those of the trace. The model is
    scored as TRL's trainers do, and given back as it was.

    Args:
        model (`torch.nn.Module`):
            The policy, with the weights that it had at the step of the trace.
        trace ([`Trace`]):
            With records.

    Returns:
        [`TraceCheck`].

    Raises:
        `ValueError`: If the trace is of another model, dtype or implementation of attention or experts, or cannot be
            replayed; the message names both.

    Example:

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("out/checkpoint-12")
    >>> print(verify_trace(model, load_trace("traces/step-00000012-rank-00000.safetensors")))
    ```
    """
    here = conditions(model)
    refuse_another_model(trace.facts, here)
    base: Any = attachable(model)
    largest_id, vocabulary = int(trace.tokens.max()), base.get_input_embeddings().weight.shape[0]
    if largest_id >= vocabulary:
        raise ValueError(
            f"the trace has token {largest_id}, this model {vocabulary} embeddings. Pass the model that was trained."
        )
    padding = "keep" if trace.facts.padding == "none" else "auto"
    # autocast from attaching on: a gate is compared, and taken over, in the dtypes that it computes in
    with _as_in(model, trace), _autocast(model, trace), RouterReplay(model, trace.facts.gating, padding) as replay:
        if replay.layout != trace.layout:
            raise ValueError(
                f"the trace is of {trace.layout}, this model is {replay.layout}. Pass the model of the trace."
            )
        if padding_mode(replay) != trace.facts.padding:
            raise ValueError(
                f"in the trace padding was skipped by {trace.facts.padding!r} of the layers, in this model it is by "
                f"{padding_mode(replay)!r} ({replay.padding}). Replay it where it was made."
            )
        logprobs = torch.cat(list(_scored(model, replay, trace)))
    then = trace.train_logprobs
    differing = (logprobs != then) & ~(logprobs.isnan() & then.isnan())
    largest = float((logprobs.double() - then.double()).abs().max()) if bool(differing.any()) else 0.0
    k3 = float("nan")
    if trace.rollout_logprobs is not None:
        k3 = float(k3_kl(logprobs, trace.rollout_logprobs, trace.counted))
    return TraceCheck(
        trace.facts.step, len(then), int(differing.sum()), largest, k3, differences(trace.facts, here), logprobs
    )


@contextmanager
def _as_in(model: nn.Module, trace: Trace) -> Iterator[None]:
    """The process and the model as they were: threads, precision, TRL's head, no dropout."""
    facts = trace.facts
    base: Any = attachable(model)
    if isinstance(base, PeftModel):
        base = base.get_base_model()  # where TRL puts its head, too
    threads, precision, training = torch.get_num_threads(), torch.get_float32_matmul_precision(), model.training
    with swapped(base, "forward", base.forward), torch.no_grad():
        try:
            add_fused_lm_head(
                base,
                temperature=facts.temperature,
                cast_lm_head_to_fp32=facts.float32_head,
                outputs=("log_probs", "entropy"),
            )
            torch.set_num_threads(facts.threads)
            torch.set_float32_matmul_precision(facts.matmul_precision)
            model.eval()
            yield
        finally:
            model.train(training)
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(threads)


def _autocast(model: nn.Module, trace: Trace) -> AbstractContextManager:
    if trace.facts.autocast == "no":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, getattr(torch, trace.facts.autocast))


def _scored(model: Any, replay: RouterReplay, trace: Trace) -> Iterator[Tensor]:
    """(C_i,) of each sample, in the order of the trace."""
    device = next(model.parameters()).device
    for samples, ids_BT, mask_BT, prompt_width in trace.batches():
        batch = ScoredBatch(samples, prompt_width, trace.layout)
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
        labels_BT[:, :prompt_width] = -100
        head: Any = nullcontext()
        if trace.kept_ids is not None:
            head = restricted_head(model, MaskedBatch(samples, prompt_width))
        with replay.replay_from(batch), head:
            output = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, fused_lm_head=True)
        logprobs_BT = output.log_probs[:, prompt_width - 1 :].to(trace.train_logprobs.dtype).cpu()
        for row, sample in enumerate(samples):
            yield logprobs_BT[row, : sample.completion_length]
