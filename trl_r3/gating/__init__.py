"""Masked top-k gating: the gate of a mixture-of-experts layer, with the selection live or given."""

from .contract import GatingOutput, RowStatus
from .masked_topk import masked_topk_gating
from .native import load_native_kernels, native_kernels
from .reference import masked_topk_gating_ref

load_native_kernels()

__all__ = ["GatingOutput", "RowStatus", "masked_topk_gating", "masked_topk_gating_ref", "native_kernels"]
