"""Switch on the capture of routes and sampling masks in the vLLM that TRL builds or talks to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.import_utils import is_vllm_available

from .._compat import swapped
from .vllm_client import RecordingVLLMClient
from .vllm_masks import check_mask_settings
from .vllm_versions import check_vllm_masks, check_vllm_version, vllm_engine_kwargs


@contextmanager
def capturing_vllm(args: Any) -> Iterator[None]:
    """
    Let a trainer that is constructed inside get a vLLM that returns routes.

    TRL passes no engine arguments on and names its client class itself, so both names are swapped in its module while
    it constructs them.

    Args:
        args ([`~trl.GRPOConfig`]):
            Config of the trainer.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If its version cannot return routes.
    """
    _check_installed()
    if args.vllm_mode == "server":
        with swapped(vllm_generation, "VLLMClient", partial(RecordingVLLMClient, routes=True)):
            yield
        return
    import vllm

    check_vllm_version(vllm.__version__, args.vllm_tensor_parallel_size)
    routed_llm = partial(vllm_generation.LLM, **vllm_engine_kwargs(vllm.__version__))
    with swapped(vllm_generation, "LLM", routed_llm):
        yield


@contextmanager
def masking_vllm(args: Any) -> Iterator[None]:
    """
    Let a trainer that is constructed inside get a vLLM that returns sampling masks, beside routes or without.

    Args:
        args ([`~trl.GRPOConfig`]):
            Config of the trainer.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If its version or sampling settings return none.
    """
    check_mask_settings(args)
    _check_installed()
    if args.vllm_mode == "server":
        asked: Any = vllm_generation.VLLMClient  # TRL's own, or one that takes routes
        client = partial(RecordingVLLMClient if asked is VLLMClient else asked, masks=True)
        with swapped(vllm_generation, "VLLMClient", client):
            yield
        return
    import vllm

    check_vllm_masks(vllm.__version__)
    with swapped(vllm_generation, "LLM", partial(vllm_generation.LLM, return_sampling_mask=True)):
        yield


def _check_installed() -> None:
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed. Install it with `pip install 'trl[vllm]'`, or set "
            "`use_vllm=False`."
        )
