"""What asynchronous GRPO refuses, or warns of, while a trainer with replay is built."""

from __future__ import annotations

from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from .._compat import warn
from ..engines.vllm_server import returns_routes
from ..engines.vllm_versions import check_vllm_version, vllm_serve_command
from .config import check_types
from .log import penalties, truncation

IN_FLIGHT = ("replay", "live")
SHARED_ROWS = ("first", "exact")

_ONLY = {  # settings of replay that have one value here, and why
    "routing_replay_mode": ("R3", "there is no old-policy forward that could record"),
    "routing_replay_compare_every": (0, "TRL scores a batch once"),
    "routing_replay_load_every": (0, "there are no rollouts to log the load of"),
    "routing_replay_padding": ("keep", "its packed rows have no padding"),
    "routing_replay_trace_dir": (None, "a trace holds a whole rollout"),
    "routing_replay_spill_dir": (None, "records wait in the queue, not for a whole rollout"),
    "use_sampling_mask_replay": (False, "its requests return no masks"),
}
_TIMEOUT = 60  # seconds


def check_async_config(args: Any) -> None:
    """
    Refuse settings that asynchronous GRPO has no use for.

    Args:
        args ([`R3AsyncGRPOConfig`]):
            The config.

    Raises:
        `ValueError`: Naming the field, its value and what to set instead.
    """
    check_types(args)
    for name, (only, reason) in _ONLY.items():
        if getattr(args, name) != only:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which asynchronous GRPO cannot do: {reason}. Set "
                f"`{name}={only!r}`."
            )
    for name, choices in (("routing_replay_in_flight", IN_FLIGHT), ("routing_replay_shared_rows", SHARED_ROWS)):
        if getattr(args, name) not in choices:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, expected one of {choices}. Set it so, or leave it out for the "
                f"default, {choices[0]!r}."
            )


def check_partitions() -> None:
    """
    Refuse ZeRO-3, whose weights TRL's asynchronous trainer does not gather before it sends them.

    Raises:
        `ValueError`: If DeepSpeed is set to stage 3.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "the ZeRO stage is 3, and TRL's asynchronous GRPO would send the server empty weights: it gathers those "
            "of FSDP2 alone. Launch with FSDP2, `fsdp_version: 2` in the config of Accelerate."
        )


def check_worker(worker: Any) -> None:
    """
    Refuse rollout workers whose samples would come without routes.

    Args:
        worker ([`~trl.experimental.async_grpo.async_grpo_trainer.RolloutWorkerProtocol`]):
            That of the trainer.

    Raises:
        `TypeError`: If it spawns no loop of TRL's.
        `ValueError`: If the agent talks to the server itself.
    """
    if not isinstance(worker, AsyncRolloutWorker):
        raise TypeError(
            f"`rollout_worker` is a {type(worker).__name__}, whose samples carry no routes. Derive it from TRL's "
            "AsyncRolloutWorker, whose loop is made to record, or set `use_routing_replay=False`."
        )
    if "harness_session_factory" in worker._loop_kwargs and worker._loop_kwargs.get("harness_adapter") is None:
        raise ValueError(
            f"`rollout_worker` is a {type(worker).__name__} without `harness_adapter`: the agent asks the server "
            "itself, and its trace has no routes. Pass a `harness_adapter`, so that TRL samples each turn, or set "
            "`use_routing_replay=False`."
        )


def check_server(client: Any, model: str) -> dict[str, Any]:
    """
    Refuse a server that returns no routes.

    Args:
        client ([`~trl.experimental.async_grpo.vllm_client.VLLMClient`]):
            That of the trainer.
        model (`str`):
            What the server is to serve.

    Returns:
        dict of `str`: The config of the server.

    Raises:
        `ValueError`: With the line that starts one which does.
    """
    import requests  # which TRL needs for a server only

    client.wait_for_server_ready()
    version = requests.get(f"{client.server_url}/version", timeout=_TIMEOUT).json()["version"]
    check_vllm_version(version)
    info = client.get_server_info()
    if not returns_routes(info):
        raise ValueError(
            f"the vLLM server at {client.server_url} (version {version}) does not return routed experts. Start it "
            f"with: {vllm_serve_command(version, model)}"
        )
    return info


def warn_of_ratio(args: Any, info: dict[str, Any]) -> None:
    """
    Say once what makes the server's log-probabilities, which the importance ratio is made of, those of another
    distribution.

    Args:
        args ([`R3AsyncGRPOConfig`]):
            The config.
        info (dict of `str`):
            The config of the server.
    """
    named = ", ".join(filter(None, (truncation(args), penalties(args))))
    mode = (info.get("model_config") or {}).get("logprobs_mode")
    if named:
        warn(
            f"{named} changes the distribution that rollouts are drawn from, but training normalises over the whole "
            "vocabulary, so that every importance ratio is off. Set `top_p=1.0`, `top_k=0`, `min_p=None` and "
            "`repetition_penalty=1.0`."
        )
    if mode is not None and mode.endswith("_logits"):
        warn(
            f"the server returns logits in place of log-probabilities (mode {mode}), so that every importance ratio "
            "is off. Start it with `--logprobs-mode processed_logprobs`."
        )
    if mode == "raw_logprobs" and (named or args.temperature != 1.0):
        warn(
            f"the server returns log-probabilities in mode {mode}, without temperature {args.temperature} and what "
            "else shapes its distribution, so that every importance ratio is off. Start it with `--logprobs-mode "
            "processed_logprobs`."
        )
