"""TRL's client of a vLLM server, which also takes what the server recorded: routes, sampling masks, or both.

Legend: P prompt tokens, C completion tokens, D decoder layers, K experts per token.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from trl.generation.vllm_client import VLLMClient

from .._compat import name_tokens
from ..records.sampling_masks import SamplingMask
from .known_routes import KnownRoutes
from .payloads import decode_vllm_http
from .vllm_masks import MASKS_PATH, decode_vllm_mask
from .vllm_versions import check_vllm_masks, check_vllm_version, vllm_serve_command

_CONCURRENT_REQUESTS = 64  # the pool of the client's session
_CHOICES = "choices"  # among the sampling parameters, on their way to the request: a list for what it is answered


class RecordingVLLMClient(VLLMClient):
    """
    [`~trl.generation.vllm_client.VLLMClient`] that also takes the routes, the sampling masks, or both, of each
    completion.

    One request a prompt: a single response would hold the routes of the whole batch as one JSON document.

    Args:
        routes (`bool`, *optional*, defaults to `False`):
            Whether the server has to return routed experts.
        masks (`bool`, *optional*, defaults to `False`):
            Whether it has to return sampling masks.

    Raises:
        `ValueError`: If the server cannot return them; the message has the line that starts one which can.
    """

    def __init__(self, *args, routes: bool = False, masks: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self._routes: list[np.ndarray] = []
        self._masks: list[SamplingMask] = []
        self._takes_routes, self._takes_masks = routes, masks
        self.known_routes = KnownRoutes()  # of this rollout
        self.version = self._get(f"{self.base_url}/version")["version"]
        self._check(self.get_server_info())

    def _check(self, info: dict[str, Any]) -> None:
        """Refuse a server that would not return what is taken."""
        server = f"the vLLM server at {self.base_url} (version {self.version})"
        command = vllm_serve_command(self.version, self.model, self._takes_routes, self._takes_masks)
        if self._takes_routes:
            check_vllm_version(self.version)
            if not _returns_routes(info):
                raise ValueError(f"{server} does not return routed experts. Start it with: {command}")
        if self._takes_masks:
            check_vllm_masks(self.version)
            if not (info.get("model_config") or {}).get("return_sampling_mask"):
                raise ValueError(f"{server} does not return sampling masks. Start it with: {command}")
            if self.session.get(f"{self.base_url}{MASKS_PATH}").status_code == 404:
                raise ValueError(f"{server} does not serve `{MASKS_PATH}`. Start it with: {command}")

    def _post(self, url: str, **kwargs) -> dict:
        body = kwargs.get("json") or {}
        choices = body.get("sampling_params", body).pop(_CHOICES, None)
        answer = super()._post(url, **kwargs)
        if choices is not None:
            name_tokens(answer["choices"])
            choices.extend(answer["choices"])
        return answer

    def generate(self, prompts, features=None, **kwargs) -> dict[str, Any]:  # type: ignore[override]
        """`generate` of TRL; [`RecordingVLLMClient.take_routes`] and `take_masks` return what was recorded."""
        if features is not None:
            raise ValueError(
                "routes and masks of multimodal prompts cannot be aligned. Set `use_routing_replay=False` and "
                "`use_sampling_mask_replay=False`."
            )

        def send(prompt: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            choices: list[dict[str, Any]] = []
            extra = {**(kwargs.get("generation_kwargs") or {}), _CHOICES: choices}
            if self._takes_routes and (start := self.known_routes.start(prompt)):
                extra["routed_experts_prompt_start"] = start
            # prompts with features, none of them here, go to the endpoint that returns masks
            no_features = [None] if self._takes_masks else None
            answer = super(RecordingVLLMClient, self).generate(
                [prompt], **{**kwargs, "features": no_features, "generation_kwargs": extra}
            )
            return answer, choices

        with ThreadPoolExecutor(max_workers=min(_CONCURRENT_REQUESTS, max(len(prompts), 1))) as executor:
            answers = list(executor.map(send, prompts))
        choices = [(prompt, each) for prompt, (_, some) in zip(prompts, answers, strict=True) for each in some]
        if self._takes_routes:
            self._routes = [
                self.known_routes.complete(prompt, each["token_ids"], self.decode(each.get("routed_experts")))
                for prompt, each in choices
            ]
            self.known_routes.end_turn()
        if self._takes_masks:
            self._masks = [
                decode_vllm_mask(each.get("sampling_mask"), len(each["token_ids"]), sample)
                for sample, (_, each) in enumerate(choices)
            ]
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

    def take_masks(self) -> list[SamplingMask]:
        """
        Hand over the sampling masks of the last `generate`.

        Returns:
            list of [`SamplingMask`]: One a completion, prompt by prompt, of C rows each.
        """
        masks, self._masks = self._masks, []
        return masks


def _joined(parts: list[list | None]) -> list | None:
    return None if any(part is None for part in parts) else [item for part in parts for item in part or ()]


def _returns_routes(config: dict[str, Any]) -> bool:
    """Whether a server's config has the flag: in `model_config` up to vLLM 0.30, in `aux_output_config` later."""
    sections = (config.get("model_config"), config.get("aux_output_config"))
    return any(bool((section or {}).get("enable_return_routed_experts")) for section in sections)
