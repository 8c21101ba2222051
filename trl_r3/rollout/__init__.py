"""What each rollout engine returns, turned into records."""

from trl_r3.rollout.decode import (
    check_vllm_version,
    decode_sglang,
    decode_vllm_http,
    decode_vllm_output,
    vllm_engine_kwargs,
)

__all__ = [
    "check_vllm_version",
    "decode_sglang",
    "decode_vllm_http",
    "decode_vllm_output",
    "vllm_engine_kwargs",
]
