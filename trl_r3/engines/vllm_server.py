"""A vLLM server, asked by TRL's client, which also takes what the server recorded: routes, sampling masks, or both.

Legend: P prompt tokens, C completion tokens, D decoder layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from .._compat import swapped
from ..records.record import RoutingLayout, to_record
from ..records.sampling_mask import SamplingMask
from ._compat_engines import name_tokens
from .equal_shares import equal_shares
from .known_routes import KnownRoutes
from .payloads import decode_vllm_http
from .turns import MakeTurn, Prompts, SamplingTrainer, Turn
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
        self.known_routes: KnownRoutes | None = None  # of a rollout whose later turns go on from earlier ones
        self.version = self._get(f"{self.base_url}/version")["version"]
        self._check(self.get_server_info())

    def _check(self, info: dict[str, Any]) -> None:
        """Refuse a server that would not return what is taken."""
        server = f"the vLLM server at {self.base_url} (version {self.version})"
        command = vllm_serve_command(self.version, self.model, self._takes_routes, self._takes_masks)
        if self._takes_routes:
            check_vllm_version(self.version)
            if not returns_routes(info):
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
            if self._takes_routes and self.known_routes and (start := self.known_routes.start(prompt)):
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
            self._routes = [self.decode(each.get("routed_experts")) for _, each in choices]
            if self.known_routes is not None:
                self._routes = [
                    self.known_routes.complete(prompt, each["token_ids"], rows)
                    for (prompt, each), rows in zip(choices, self._routes, strict=True)
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


def returns_routes(config: dict[str, Any]) -> bool:
    """Whether a server's config has the flag: in `model_config` up to vLLM 0.30, in `aux_output_config` later."""
    sections = (config.get("model_config"), config.get("aux_output_config"))
    return any(bool((section or {}).get("enable_return_routed_experts")) for section in sections)


@contextmanager
def recording_client(routes: bool, masks: bool) -> Iterator[None]:
    """
    Let a trainer that is constructed inside talk to its vLLM server through a [`RecordingVLLMClient`].

    TRL names its client class itself, so the name is swapped in TRL's module meanwhile.

    Args:
        routes, masks (`bool`):
            What is wanted.
    """
    with swapped(vllm_generation, "VLLMClient", partial(RecordingVLLMClient, routes=routes, masks=masks)):
        yield


@contextmanager
def recorded_server(
    trainer: SamplingTrainer, layout: RoutingLayout | None, masks: bool, known: KnownRoutes | None
) -> Iterator[MakeTurn]:
    """
    Record one call of `trainer._generate_single_turn`, by a vLLM server.

    Args:
        trainer, layout, masks, known:
            As in [`~trl_r3.engines.vllm_colocate.recorded_llm`].

    Yields:
        What makes the [`Turn`] once the call has returned.
    """
    shares: AbstractContextManager = nullcontext()
    if trainer.accelerator.num_processes > 1:
        shares = equal_shares(trainer, "`vllm_mode='colocate'`")
    client = trainer.vllm_generation.vllm_client if trainer.accelerator.is_main_process else None

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        count = len(prompt_ids)
        routes = None if layout is None else _share(trainer, client.take_routes() if client else None, count)
        kept = _share(trainer, client.take_masks() if client else None, count) if masks else None
        # behind all that processes do together: a record may be refused on one of them
        records = [] if layout is None else [to_record(ids, layout, sample) for sample, ids in enumerate(routes or ())]
        return Turn(prompt_ids, completion_ids, records, masks=kept)

    if client is not None:
        client.known_routes = known
    try:
        with shares:
            yield make_turn
    finally:
        if client is not None:
            client.known_routes = None


def _share(trainer: SamplingTrainer, everything: list | None, count: int) -> list:
    """Give each process what was recorded of its samples; the main process has asked the server for all."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        assert everything is not None
        return everything
    # the shares that TRL cuts the completions into
    shares = None
    if everything is not None:
        shares = [everything[rank * count : (rank + 1) * count] for rank in range(accelerator.num_processes)]
    received: list[Any] = [None]
    torch.distributed.scatter_object_list(received, shares, src=0)
    return received[0]
