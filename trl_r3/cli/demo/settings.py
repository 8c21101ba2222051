"""How much work a demo does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..._compat import without_checkpointing


@dataclass(frozen=True)
class DemoSettings:
    """
    Sizes of a demo.

    Args:
        largest (`int`):
            Largest operand of the sums.
        held_out (`int`):
            Number of sums that neither training sees, for the accuracy.
        warm_up_steps, warm_up_batch (`int`):
            Supervised updates, and sums in each.
        warm_up_learning_rate (`float`):
            Peak of their schedule.
        grpo_steps (`int`):
            GRPO updates of each run, one a rollout.
        prompts, generations (`int`):
            Sums in a rollout, and completions of each.
        learning_rate (`float`):
            Of GRPO: its peak, reached after a twentieth of the steps and from there on falling to 0.
        measure_every (`int`):
            Every so many steps the mismatch is measured.
        seed (`int`):
            Of everything random.
    """

    largest: int = 49
    held_out: int = 512
    warm_up_steps: int = 180
    warm_up_batch: int = 64
    warm_up_learning_rate: float = 2e-3
    grpo_steps: int = 200
    prompts: int = 32
    generations: int = 4
    learning_rate: float = 3e-4
    measure_every: int = 5
    seed: int = 0


FULL = DemoSettings()
SMOKE = DemoSettings(
    largest=9,
    held_out=20,
    warm_up_steps=30,
    warm_up_batch=32,
    grpo_steps=6,
    prompts=8,
    generations=4,
    measure_every=2,
)


def of_small_runs(seed: int) -> dict[str, Any]:
    """Arguments of TRL that small runs on a CPU share: float32, every step logged, nothing saved or reported."""
    return {
        "bf16": False,
        "use_cpu": True,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **without_checkpointing(),
    }
