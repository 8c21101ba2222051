"""
What lets weights reach a vLLM on a CPU by TRL's own `sync_weights`, colocated and through its client for a server.

Two things are not TRL's or vLLM's own. CPU kernels pack weights away when a model is loaded, so that nothing could be
loaded afterwards: here linears compute from their parameters, and experts are packed at each call. NCCL needs GPUs:
here the bytes that it would carry go through the store in which both sides meet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

Patch = Callable[[Any, str, Any], None]  # `setattr`, or `monkeypatch.setattr`


@cache  # a second time would pack experts twice
def compute_from_parameters() -> None:
    """Let the engines that this process starts from here on keep their weights where `load_weights` finds them."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def only_pad(self: Any, layer: torch.nn.Module) -> None:
        self._use_zentorch = False
        self._pad_moe_intermediate(layer)

    own = cpu_moe.cpu_fused_moe

    def pack_and_run(out: Any, hidden: Any, w13: Any, w2: Any, b13: Any, b2: Any, *args: Any) -> None:
        _, _, _, isa, *_ = args
        packed = [_custom_ops.cpu_prepack_moe_weight(weight, isa) for weight in (w13, w2)]
        own(out, hidden, *packed, b13, b2, *args)

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = only_pad
    cpu_moe.cpu_fused_moe = pack_and_run


class StoreCommunicator:
    """vLLM's `PyNcclCommunicator` as far as weights need it, over a group of processes that share a store."""

    def __init__(self, group: Any, device: Any = None) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(self.group.broadcast(tensor, src))


def carry_weights_by_a_store(patch: Patch) -> None:
    """Let vLLM's transfer of weights run in this process, trainer or worker, without NCCL and without streams."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    done = SimpleNamespace(synchronize=lambda: None)
    patch(pynccl, "PyNcclCommunicator", StoreCommunicator)
    patch(packed_tensor, "_get_streams", lambda device, count: (done,) * count)
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(torch.accelerator, "current_device_index", lambda: 0)
    patch(torch.accelerator, "synchronize", lambda: None)


def let_the_client_send(patch: Patch) -> None:
    """Let TRL's client of a server send weights from a CPU, which it refuses to open the way for."""
    from trl.generation.vllm_client import VLLMClient

    carry_weights_by_a_store(patch)
    own = VLLMClient.init_communicator
    patch(VLLMClient, "init_communicator", lambda self, device=0: own(self, torch.device("cuda")))
