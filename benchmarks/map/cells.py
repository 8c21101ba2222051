"""What is trained: arms, settings, and the sizes that all runs share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Arm:
    """
    One way to train on the same rollouts.

    Args:
        mode (`str`, *optional*):
            What is replayed, `"R3"` or `"R2"`; nothing by default.
        freezes_routers (`bool`, *optional*, defaults to `False`):
            Whether the gates' weights stay as they are.
        corrects (`bool`, *optional*, defaults to `False`):
            Whether TRL's importance-sampling correction acts, with TRL's defaults.
        floor (`float`, *optional*, defaults to `0.0`):
            A token whose record holds an expert with a live score below this share of the lowest selected one routes
            live in that layer.
    """

    mode: str | None = None
    freezes_routers: bool = False
    corrects: bool = False
    floor: float = 0.0


ARMS = {
    "live": Arm(),
    "R3": Arm("R3"),
    "R2": Arm("R2"),
    "frozen": Arm(freezes_routers=True),
    "live+IS": Arm(corrects=True),
    "R3+IS": Arm("R3", corrects=True),
    "R3 filtered": Arm("R3", floor=0.5),
}


@dataclass(frozen=True)
class Setting:
    """
    What live training and its rivals have in common.

    Args:
        gate (`str`):
            `"softmax"` (Qwen3-MoE) or `"sigmoid"` (GLM-4.7-Flash, with its bias).
        rollout (`str`):
            Numerics of the rollout: `"exact"`, `"bf16"`, `"fp8"` or `"noise X"`, where X is the standard deviation of
            what is added to the input of each router, in units of that input's own.
        updates (`int`):
            Updates a rollout, each on its own share of it.
        learning_rate (`float`):
            Constant after a warm-up.
        steps (`int`, *optional*, defaults to `96`):
            Updates in all.
    """

    gate: str
    rollout: str
    updates: int
    learning_rate: float
    steps: int = 96


@dataclass(frozen=True)
class Cell:
    """A setting and an arm."""

    setting: Setting
    arm: str
    kind: ClassVar[type] = Setting

    def as_dict(self) -> dict[str, Any]:
        """Its values, as a line of the results has them."""
        return {**asdict(self.setting), "arm": self.arm}

    @classmethod
    def of(cls, line: dict[str, Any]) -> Cell:
        """The cell that a line of the results belongs to."""
        return cls(cls.kind(**{field.name: line[field.name] for field in fields(cls.kind)}), line["arm"])


@dataclass(frozen=True)
class Sizes:
    """How much work an update is: it trains on `prompts * generations` completions. Intervals are in updates."""

    largest: int = 49
    held_out: int = 200
    start_accuracy: float = 0.6
    warm_up_steps: int = 500
    warm_up_batch: int = 64
    warm_up_learning_rate: float = 4e-3
    prompts: int = 8
    generations: int = 8
    evaluate_every: int = 12
    measure_every: int = 24
