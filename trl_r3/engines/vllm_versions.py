"""Which vLLM returns routes in the format that is read here, and how it is asked to."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

_FIRST_VLLM = (0, 22)
_FIRST_VLLM_AUX_OUTPUT = (0, 31)
_VLLM_SLEEPS_IN_MODE_KEEP = (0, 31)  # with routes on; 0.30 and 0.32 reset their caches in any mode
_FIRST_VLLM_MASKS = (0, 28)
_FIRST_VLLM_SCALE_OUT = (0, 30)  # a flag for the endpoint that returns masks
_LAST_VLLM = (0, 33)

VLLM_FLAG = (
    "Pass `enable_return_routed_experts=True` to `LLM`, or start the server with `--enable-return-routed-experts`. "
    "From vLLM 0.31 on it also needs prefix caching, and VLLM_USE_V2_MODEL_RUNNER=1 in the environment where it falls "
    "back to the first model runner."
)


def check_vllm_version(version: str, tensor_parallel_size: int = 1) -> None:
    """
    Refuse a vLLM whose routes cannot be used.

    Args:
        version (`str`):
            Version of vLLM, as in `vllm.__version__` or `GET /version`. A local part such as `+cpu` is ignored.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Ranks that share one engine inside the training processes (`vllm_tensor_parallel_size` in colocate mode). A
            server schedules in one process, whatever its ranks: leave it at 1.

    Raises:
        `ValueError`: If the version is outside 0.22 to 0.33, or is 0.31 to 0.33 with more than one rank.
    """
    minor = _minor_version(version)
    if minor < _FIRST_VLLM:
        raise ValueError(
            f"vLLM {version} is installed, routing replay needs 0.22 or later: earlier versions return no routes, or "
            f"return them without the rows that the prefix cache served. Upgrade vLLM to 0.22 to 0.30."
        )
    if minor > _LAST_VLLM:
        raise ValueError(
            f"vLLM {version} is installed, routing replay knows the format of 0.22 to 0.33. Install one of these."
        )
    if minor >= _FIRST_VLLM_AUX_OUTPUT and tensor_parallel_size > 1:
        raise ValueError(
            f"vLLM {version} crashes in colocate mode when it returns routes with tensor parallel size "
            f"{tensor_parallel_size}: every rank schedules, but only the first one of a group has routes. Set "
            f"`vllm_tensor_parallel_size=1`, use `vllm_mode='server'`, or install vLLM 0.22 to 0.30."
        )


def check_vllm_masks(version: str) -> None:
    """
    Refuse a vLLM that returns no sampling masks.

    Args:
        version (`str`):
            Version of vLLM.

    Raises:
        `ValueError`: If the version is outside 0.28 to 0.33.
    """
    if not _FIRST_VLLM_MASKS <= _minor_version(version) <= _LAST_VLLM:
        raise ValueError(
            f"vLLM {version} is installed, but sampling masks are known from 0.28 to 0.33. Install one of these, or "
            "set `use_sampling_mask_replay=False`."
        )


def sleeps_in_mode_keep(version: str) -> bool:
    """
    Whether a vLLM that returns routes sleeps only in mode "keep".

    Args:
        version (`str`):
            Version of vLLM.

    Returns:
        `bool`: `True` for 0.31 alone.
    """
    return _minor_version(version) == _VLLM_SLEEPS_IN_MODE_KEEP


def vllm_engine_kwargs(version: str) -> dict[str, bool]:
    """
    Arguments of `vllm.LLM` that switch the capture of routes on.

    vLLM 0.31 and later also need their second model runner, which no argument selects: where vLLM falls back to the
    first one, the user sets VLLM_USE_V2_MODEL_RUNNER=1 in the environment.

    Args:
        version (`str`):
            Version of vLLM.

    Returns:
        `dict[str, bool]`: Keyword arguments to add.

    Raises:
        `ValueError`: If [`check_vllm_version`] refuses the version.
    """
    check_vllm_version(version)
    kwargs = {"enable_return_routed_experts": True}
    if _minor_version(version) >= _FIRST_VLLM_AUX_OUTPUT:
        kwargs["enable_prefix_caching"] = True
    return kwargs


def vllm_serve_command(version: str, model: str, routes: bool = True, masks: bool = False) -> str:
    """The shell line that starts a server which returns routes, sampling masks, or both, with what TRL needs of it."""
    minor, environment, flags = _minor_version(version), "VLLM_SERVER_DEV_MODE=1", []
    if masks or (routes and minor >= _FIRST_VLLM_AUX_OUTPUT):
        environment += " VLLM_USE_V2_MODEL_RUNNER=1"
    if routes:
        flags.append("--enable-return-routed-experts")
        flags += ["--enable-prefix-caching"] if minor >= _FIRST_VLLM_AUX_OUTPUT else []
    if masks:
        flags.append("--return-sampling-mask")
        flags += ["--enable-scale-out"] if minor >= _FIRST_VLLM_SCALE_OUT else []
    return (
        f"{environment} vllm serve {model} {' '.join(flags)} "
        f"""--weight-transfer-config '{{"backend": "nccl"}}' --logprobs-mode processed_logprobs --max-logprobs -1"""
    )


def _minor_version(version: str) -> tuple[int, int]:
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ValueError(
            f"{version!r} is no version of vLLM, expected one of 0.22 to 0.33. Install a release of vLLM."
        ) from error
    return parsed.major, parsed.minor
