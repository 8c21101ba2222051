"""`trl-r3 plan`: whether a job fits, from a config alone."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

from .answer import as_dict, show
from .config_at_hand import config_at_hand
from .job import Job
from .memory import estimate
from .remedies import remedies
from .sizes import read_model


def main(name: str, as_json: bool, job: Job) -> int:
    """
    Plan a job and print it.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder with a `config.json`.
        as_json (`bool`):
            Whether to print JSON instead of tables.
        job ([`Job`]):
            Settings.

    Returns:
        `int`: Exit status: 0 if the job fits, 1 if it does not.

    Raises:
        [`PlanError`]: If there is nothing to plan.
    """
    with redirect_stdout(sys.stderr):  # libraries talk; JSON stays alone
        at_hand = config_at_hand(name)
        if at_hand != name:
            print(f"The Hub gives no config of {name}, so the plan is that of {at_hand}.")
        model = read_model(at_hand, job)
        plan = estimate(model, job)
        changes = [] if plan.fits else remedies(model, job)
    if as_json:
        print(json.dumps(as_dict(model, job, plan, changes), indent=1))
    else:
        show(model, job, plan, changes)
    return 0 if plan.fits else 1
