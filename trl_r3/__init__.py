"""Rollout Routing Replay (R3): train a mixture of experts through the experts that its rollouts used."""

from configparser import ConfigParser
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from .engines.enabled_model import disable_routing_replay, enable_routing_replay
    from .engines.payloads import decode_sglang, decode_vllm_http
    from .engines.turns import Turn, stitch
    from .engines.vllm_colocate import decode_vllm_output
    from .gating import GatingOutput, RowStatus, masked_topk_gating
    from .records.checks import MisalignedRecordError
    from .records.expert_load import ExpertLoad
    from .records.metrics import changed_router_frac, changed_token_frac, extreme_token_frac, k3_kl
    from .records.record import RoutingLayout
    from .records.sampling_mask import SamplingMask
    from .routers.router_replay import RouterReplay
    from .routers.self_check import UnsupportedRouterError
    from .traces.report_callback import RoutingReportCallback
    from .traces.trace_file import load_trace
    from .trainers.async_grpo import R3AsyncGRPOConfig, R3AsyncGRPOTrainer
    from .trainers.distillation import R3DistillationConfig, R3DistillationTrainer
    from .trainers.gmpo import R3GMPOConfig, R3GMPOTrainer
    from .trainers.grpo import R3GRPOConfig, R3GRPOTrainer
    from .trainers.iw_opd import R3IWOPDConfig, R3IWOPDTrainer
    from .trainers.rloo import R3RLOOConfig, R3RLOOTrainer
    from .trainers.sdpo import R3SDPOConfig, R3SDPOTrainer

# TRL takes seconds to import, and a model can be replayed without it
_ROOMS = {
    "engines.enabled_model": ("disable_routing_replay", "enable_routing_replay"),
    "engines.payloads": ("decode_sglang", "decode_vllm_http"),
    "engines.vllm_colocate": ("decode_vllm_output",),
    "engines.turns": ("Turn", "stitch"),
    "gating": ("GatingOutput", "RowStatus", "masked_topk_gating"),
    "records.checks": ("MisalignedRecordError",),
    "records.expert_load": ("ExpertLoad",),
    "records.record": ("RoutingLayout",),
    "records.sampling_mask": ("SamplingMask",),
    "traces.trace_file": ("load_trace",),
    "routers.router_replay": ("RouterReplay",),
    "routers.self_check": ("UnsupportedRouterError",),
    "trainers.async_grpo": ("R3AsyncGRPOConfig", "R3AsyncGRPOTrainer"),
    "trainers.distillation": ("R3DistillationConfig", "R3DistillationTrainer"),
    "trainers.gmpo": ("R3GMPOConfig", "R3GMPOTrainer"),
    "trainers.grpo": ("R3GRPOConfig", "R3GRPOTrainer"),
    "records.metrics": ("changed_router_frac", "changed_token_frac", "extreme_token_frac", "k3_kl"),
    "traces.report_callback": ("RoutingReportCallback",),
    "trainers.iw_opd": ("R3IWOPDConfig", "R3IWOPDTrainer"),
    "trainers.rloo": ("R3RLOOConfig", "R3RLOOTrainer"),
    "trainers.sdpo": ("R3SDPOConfig", "R3SDPOTrainer"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ExpertLoad",
    "GatingOutput",
    "MisalignedRecordError",
    "R3AsyncGRPOConfig",
    "R3AsyncGRPOTrainer",
    "R3DistillationConfig",
    "R3DistillationTrainer",
    "R3GMPOConfig",
    "R3GMPOTrainer",
    "R3GRPOConfig",
    "R3GRPOTrainer",
    "R3IWOPDConfig",
    "R3IWOPDTrainer",
    "R3RLOOConfig",
    "R3RLOOTrainer",
    "R3SDPOConfig",
    "R3SDPOTrainer",
    "RouterReplay",
    "RoutingLayout",
    "RoutingReportCallback",
    "RowStatus",
    "SamplingMask",
    "Turn",
    "UnsupportedRouterError",
    "changed_router_frac",
    "changed_token_frac",
    "decode_sglang",
    "decode_vllm_http",
    "decode_vllm_output",
    "disable_routing_replay",
    "enable_routing_replay",
    "extreme_token_frac",
    "k3_kl",
    "load_trace",
    "masked_topk_gating",
    "stitch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def _version() -> str:
    """That in the `setup.cfg` of the checkout which runs, else that of the installation; a copy may have neither."""
    checkout = ConfigParser()
    checkout.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    if checkout.get("metadata", "name", fallback=None) == "trl-r3":
        return checkout.get("metadata", "version")
    try:
        return metadata.version("trl-r3")
    except metadata.PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
