"""`trl-r3 plan`: whether a job fits, from a config alone."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

from .answer import as_dict, show
from .job import STRATEGIES, Job, PlanError
from .memory import estimate
from .remedies import remedies
from .sizes import ModelFacts, read_model

__all__ = ["STRATEGIES", "Job", "ModelFacts", "PlanError", "estimate", "main", "read_model", "remedies"]


def main(name: str, as_json: bool, settings: dict[str, Any]) -> int:
    """
    Plan a job and print it.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder with a `config.json`.
        as_json (`bool`):
            Whether to print JSON instead of tables.
        settings (`dict[str, Any]`):
            Fields of [`Job`].

    Returns:
        `int`: Exit status: 0 if the job fits, 1 if it does not.

    Raises:
        [`PlanError`]: If there is nothing to plan.
    """
    with redirect_stdout(sys.stderr):  # libraries talk; JSON stays alone
        job = Job(**settings)
        model = read_model(name, job)
        plan = estimate(model, job)
        changes = [] if plan.fits else remedies(model, job)
    if as_json:
        print(json.dumps(as_dict(model, job, plan, changes), indent=1))
    else:
        show(model, job, plan, changes)
    return 0 if plan.fits else 1
