"""What is trained: arms, settings, and the sizes that all runs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.map import cells as map_cells


@dataclass(frozen=True)
class Arm:
    """
    One way to train on the same rollouts.

    Args:
        mode (`str`, *optional*):
            What is replayed, `"R3"` or `"R2"`; nothing by default.
        freezes_routers (`bool`, *optional*, defaults to `False`):
            Whether the gates' weights stay as they are.
        correction (`str`, *optional*):
            TRL's `vllm_importance_sampling_mode`; none by default.
        clip_max (`float`, *optional*, defaults to `3.0`):
            TRL's `vllm_importance_sampling_clip_max`.
        shifts (`bool`, *optional*, defaults to `False`):
            Whether `routing_replay_shift_weight` acts.
    """

    mode: str | None = None
    freezes_routers: bool = False
    correction: str | None = None
    clip_max: float = 3.0
    shifts: bool = False
    floor: float = 0.0  # no filter on records here

    @property
    def corrects(self) -> bool:
        """Whether TRL's importance-sampling correction acts."""
        return self.correction is not None


ARMS = {
    "live": Arm(),
    "R3": Arm("R3"),
    "R2": Arm("R2"),
    "frozen": Arm(freezes_routers=True),
    "live+weights": Arm(correction="token_truncate", clip_max=2.0),
    "live+mask": Arm(correction="sequence_mask"),  # TRL's default
    "R3+weights": Arm("R3", correction="token_truncate", clip_max=2.0),
    "R3+shift": Arm("R3", shifts=True),
}


@dataclass(frozen=True)
class Setting:
    """
    What live training and its rivals have in common.

    Args:
        rollout (`str`):
            Numerics of the rollout, as in [`rollout_numerics`].
        top_k (`int`, *optional*, defaults to `2`):
            Experts a token.
        experts (`int`, *optional*, defaults to `8`):
            Experts a layer.
        length (`int`, *optional*, defaults to `10`):
            Letters to sort, and tokens of an answer.
        updates (`int`, *optional*, defaults to `1`):
            Updates a rollout, each on its own share of it.
        learning_rate (`float`, *optional*, defaults to `5e-4`):
            Constant.
        steps (`int`, *optional*, defaults to `300`):
            Updates in all.
    """

    rollout: str
    top_k: int = 2
    experts: int = 8
    length: int = 10
    updates: int = 1
    learning_rate: float = 5e-4
    steps: int = 300


@dataclass(frozen=True)
class Cell(map_cells.Cell):
    """A setting of this study and an arm."""

    setting: Setting  # type: ignore[assignment]
    kind: ClassVar[type] = Setting


@dataclass(frozen=True)
class Sizes:
    """How much work an update is: it trains on `prompts * generations` completions. Intervals are in steps."""

    start_share: float = 0.62
    prompts: int = 16
    generations: int = 8
    average_over: int = 10
    measure_every: int = 20
    held_out: int = 500
