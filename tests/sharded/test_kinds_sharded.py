"""The other trainers, and GRPO with tools and environments: each process replays what it rolled out."""

from __future__ import annotations

import pytest
from sharded.cases import KINDS_BY
from sharded.launching import KINDS as DISTRIBUTED
from sharded.launching import needs_deepspeed


@pytest.mark.parametrize(
    ("by", "kind"),
    [
        pytest.param(by, kind, marks=needs_deepspeed if by == "zero3" else ())
        for by, kinds in KINDS_BY.items()
        for kind in kinds
    ],
)
def test_every_row_of_every_process_is_that_of_its_rollout(results, by, kind):
    ranks = results(f"{by} {kind}")
    for report in ranks:
        assert (report["kind"], report["processes"]) == (DISTRIBUTED.get(by.split()[0], "NO"), len(ranks))
        assert (report["updates"], len(report["log"])) == (2, 2)
        assert report["wrong"] == 0 < report["rows"]
        assert report["wrong by a token"] > 0.5 * report["rows"]
        for log in report["log"]:
            assert log["routing_replay/replayed_frac"] == 1
            assert log["routing_replay/changed_router_frac"] > 0.9, "live routing is no replay"
        assert report["prefills"] == {"GRPO": 2, "Distillation": 2, "IWOPD": 2}.get(kind, 1)  # turns, and rollouts
    if len(ranks) == 2:
        assert ranks[0]["samples"] != ranks[1]["samples"], "each process has sequences of its own"
