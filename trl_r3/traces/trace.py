"""A rollout with its records and what its training forward said, as it is kept on disk.

Padding is left out: per sample, prompt and completion follow each other, and samples stand in the order in which they
were scored.

Legend: B samples, N tokens and C completion tokens of all samples, R = N - B rows, F forwards, M kept ids, L MoE
layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records.record import RoutingLayout, lay_out
from ..records.samples import Sample
from ..records.sampling_mask import SamplingMask

ATTENDED = 1  # bits of a mask
COUNTED = 2


@dataclass(frozen=True)
class TraceFacts:
    """
    What a trace says about itself, beside its tensors.

    Args:
        step (`int`):
            Optimizer steps that the weights had taken.
        rank, num_ranks (`int`):
            The process that wrote it, and their number.
        mode (`str`):
            `"R3"` or `"R2"`.
        moe_layers (list of `int`), num_decoder_layers, num_experts, top_k (`int`):
            Those of [`RoutingLayout`].
        model_type, config_digest (`str`):
            Which model it is: what its config says about the forward.
        pad_token_id (`int`):
            Token of the padding.
        temperature (`float`):
            What logits are divided by.
        float32_head (`bool`):
            Whether the head computes in float32 whatever the model does.
        gating (`str`):
            `"intercept"`, `"op"`, or `"auto"` for some of each.
        padding (`str`):
            What skipped it: `"all"` layers, their `"experts"`, or `"none"`; with `"columns"` where columns behind all
            sequences were cut off, too.
        dtype, buffers, autocast, attention, experts, device, processor, matmul_precision (`str`), threads (`int`):
            What the bits of a forward depend on; the first two are dtypes of parameters and of buffers.
        versions (dict of `str` to `str`):
            Of the libraries.
        rows, missing (`int`):
            Rows that the loss depends on, and those of them that lack a record.
        compared_rows (`int`):
            Rows whose live selection was held against the record.
        agreement, contrast (`float`, *optional*):
            Those of the alarm.
        unreplayable (`str`, *optional*):
            Why it cannot be replayed: what else its forward was given, and what to do about it.
    """

    step: int
    rank: int
    num_ranks: int
    mode: str
    moe_layers: list[int]
    num_decoder_layers: int
    num_experts: int
    top_k: int
    model_type: str
    config_digest: str
    pad_token_id: int
    temperature: float
    float32_head: bool
    gating: str
    padding: str
    dtype: str
    buffers: str
    autocast: str
    attention: str
    experts: str
    device: str
    processor: str
    matmul_precision: str
    threads: int
    versions: dict[str, str]
    rows: int
    missing: int
    compared_rows: int
    agreement: float | None = None
    contrast: float | None = None
    unreplayable: str | None = None

    @property
    def layout(self) -> RoutingLayout:
        """Layers and experts of the model."""
        return RoutingLayout(tuple(self.moe_layers), self.num_decoder_layers, self.num_experts, self.top_k)


@dataclass(frozen=True)
class Trace:
    """
    One rollout of one process.

    Args:
        facts ([`TraceFacts`]):
            What the forward was run with.
        lengths (`torch.Tensor` of shape `(B, 2)`, `torch.int32`):
            Prompt and completion tokens of each sample.
        forwards (`torch.Tensor` of shape `(F, 3)`, `torch.int32`):
            Of each training forward: samples, width of the padded prompts, width of the padded sequences.
        tokens (`torch.Tensor` of shape `(N,)`, `torch.int32`):
            Prompt and completion of each sample.
        masks (`torch.Tensor` of shape `(C,)`, `torch.uint8`):
            Bit 0: the token is attended to. Bit 1: the loss counts it.
        train_logprobs (`torch.Tensor` of shape `(C,)`):
            Log-probabilities of the sampled tokens, scored by the training model, in the dtype that it gave.
        rollout_logprobs, live_logprobs (`torch.Tensor` of shape `(C,)`, *optional*):
            Those that they were sampled with, and those scored with live routing.
        load_live, load_recorded (`torch.Tensor` of shape `(L, E)`, `torch.int32`):
            How often each expert was selected, over the rows that have a record.
        changed (`torch.Tensor` of shape `(L,)`, `torch.int32`):
            Rows whose live selection is another set than the recorded one.
        records (`torch.Tensor` of shape `(R, L, K)`, *optional*):
            Packed ids of each sample. `None` if the trace was loaded without.
        kept_ids (`torch.Tensor` of shape `(M,)`, `torch.int32`, *optional*):
            With sampling masks: the token ids that sampling kept, one completion token after the other.
        kept_counts (`torch.Tensor` of shape `(C,)`, `torch.int32`, *optional*):
            How many each token has; 0 where nothing was cut.
    """

    facts: TraceFacts
    lengths: Tensor
    forwards: Tensor
    tokens: Tensor
    masks: Tensor
    train_logprobs: Tensor
    rollout_logprobs: Tensor | None
    live_logprobs: Tensor | None
    load_live: Tensor
    load_recorded: Tensor
    changed: Tensor
    records: Tensor | None
    kept_ids: Tensor | None = None
    kept_counts: Tensor | None = None

    @property
    def layout(self) -> RoutingLayout:
        """Layers and experts of the model."""
        return self.facts.layout

    @property
    def counted(self) -> Tensor:
        """(C,) of `torch.bool`: completion tokens that the loss counts."""
        return (self.masks & COUNTED).bool()

    def samples(self) -> list[Sample]:
        """The samples, each with its record."""
        if self.records is None:
            raise ValueError("the trace was loaded without records. Load it with `load_trace(path)`.")
        sizes = self.lengths.sum(1)
        tokens = self.tokens.long().split(sizes.tolist())
        records = self.records.split((sizes - 1).tolist())
        prompts = self.lengths[:, 0].tolist()
        samples = [Sample(i, *each) for i, each in enumerate(zip(tokens, prompts, records, strict=True))]
        if self.kept_ids is not None and self.kept_counts is not None:
            offsets = torch.cat(
                [torch.zeros(1, dtype=torch.int64, device="cpu"), self.kept_counts.long().cumsum(0)]
            ).int()
            whole, first = SamplingMask(self.kept_ids, offsets), 0
            for sample in samples:
                sample.mask = whole[first : first + sample.completion_length]
                first += sample.completion_length
        return samples

    def batches(self) -> Iterator[tuple[list[Sample], Tensor, Tensor, int]]:
        """
        The padded batches that were scored.

        Yields:
            `tuple[list[Sample], torch.Tensor, torch.Tensor, int]`: Samples, input ids and attention mask of shape
            `(B, T)`, and the width of the prompts.
        """
        samples, first = self.samples(), 0
        completions = (self.masks & ATTENDED).long().split(self.lengths[:, 1].tolist())
        for size, prompt_width, width in self.forwards.tolist():
            scored = samples[first : first + size]
            prompts = [sample.prompt_length for sample in scored]
            ids_BT, mask_BT = torch.empty(2, size, width, dtype=torch.int64, device="cpu")
            lay_out([sample.tokens for sample in scored], prompts, prompt_width, ids_BT, self.facts.pad_token_id)
            attended = [torch.ones(length, dtype=torch.int64, device="cpu") for length in prompts]
            attended = [torch.cat(each) for each in zip(attended, completions[first : first + size], strict=True)]
            lay_out(attended, prompts, prompt_width, mask_BT, 0)
            yield scored, ids_BT, mask_BT, prompt_width
            first += size
