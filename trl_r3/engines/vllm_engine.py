"""Switch on the capture of routes and sampling masks in the vLLM that TRL builds or talks to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.import_utils import is_vllm_available

from .._compat import swapped
from .known_routes import KnownRoutes
from .payloads import decode_vllm_http
from .vllm_masks import check_mask_settings
from .vllm_versions import check_vllm_masks, check_vllm_version, vllm_engine_kwargs, vllm_serve_command

_CONCURRENT_REQUESTS = 64  # the pool of the client's session


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
        with swapped(vllm_generation, "VLLMClient", RoutedVLLMClient):
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
    Let a trainer that is constructed inside get a colocated vLLM that returns sampling masks.

    Args:
        args ([`~trl.GRPOConfig`]):
            Config of the trainer.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If its version, mode or sampling settings return none.
    """
    check_mask_settings(args)
    _check_installed()
    import vllm

    check_vllm_masks(vllm.__version__)
    with swapped(vllm_generation, "LLM", partial(vllm_generation.LLM, return_sampling_mask=True)):
        yield


def _check_installed() -> None:
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed. Install it with `pip install 'trl-r3[vllm]'`, or set "
            "`use_vllm=False`."
        )


class RoutedVLLMClient(VLLMClient):
    """
    [`~trl.generation.vllm_client.VLLMClient`] that also takes the routes of each completion.

    One request a prompt: a single response would hold the routes of the whole batch as one JSON document.

    Raises:
        `ValueError`: If the server cannot return routes; the message has the line that starts one which can.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._answers = threading.local()  # choices of the last response, of each requesting thread
        self._routes: list[np.ndarray] = []
        self.known_routes = KnownRoutes()  # of this rollout
        self.version = version = self._get(f"{self.base_url}/version")["version"]
        check_vllm_version(version)
        if not _returns_routes(self.get_server_info()):
            raise ValueError(
                f"the vLLM server at {self.base_url} (version {version}) does not return routed experts. Start it "
                f"with: {vllm_serve_command(version, self.model)}"
            )

    def _post(self, url: str, **kwargs) -> dict:
        answer = super()._post(url, **kwargs)
        if "choices" in answer:
            self._answers.choices = answer["choices"]
        return answer

    def generate(self, prompts, features=None, **kwargs) -> dict[str, Any]:  # type: ignore[override]
        """`generate` of TRL; [`RoutedVLLMClient.take_routes`] returns what it routed."""
        if features is not None:
            raise ValueError("routes of multimodal prompts cannot be aligned. Set `use_routing_replay=False`.")

        def send(prompt: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
            settings = kwargs
            if start := self.known_routes.start(prompt):
                extra = {**(kwargs.get("generation_kwargs") or {}), "routed_experts_prompt_start": start}
                settings = {**kwargs, "generation_kwargs": extra}
            answer = super(RoutedVLLMClient, self).generate([prompt], **settings)
            return answer, [self.decode(choice.get("routed_experts")) for choice in self._answers.choices]

        with ThreadPoolExecutor(max_workers=min(_CONCURRENT_REQUESTS, max(len(prompts), 1))) as executor:
            answers = list(executor.map(send, prompts))
        self._routes = [
            self.known_routes.complete(prompt, completion, ids)
            for prompt, (answer, routes) in zip(prompts, answers, strict=True)
            for completion, ids in zip(answer["completion_ids"], routes, strict=True)
        ]
        self.known_routes.end_turn()
        return {key: _joined([answer[key] for answer, _ in answers]) for key in answers[0][0]}

    def decode(self, payload: str | None) -> np.ndarray:
        """(P + C - 1, D, K) of one choice, from the field of the response."""
        return decode_vllm_http(payload)

    def take_routes(self) -> list[np.ndarray]:
        """
        Hand over the routes of the last `generate`.

        Returns:
            list of `numpy.ndarray` of shape `(P + C - 1, D, K)`: One array a completion, prompt by prompt.
        """
        routes, self._routes = self._routes, []
        return routes


def _joined(parts: list[list | None]) -> list | None:
    return None if any(part is None for part in parts) else [item for part in parts for item in part or ()]


def _returns_routes(config: dict[str, Any]) -> bool:
    """Whether a server's config has the flag: in `model_config` up to vLLM 0.30, in `aux_output_config` later."""
    sections = (config.get("model_config"), config.get("aux_output_config"))
    return any(bool((section or {}).get("enable_return_routed_experts")) for section in sections)
