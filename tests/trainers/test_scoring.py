"""A pass is one of an update where it has a batch, and one with an old policy where TRL has scored that."""

from __future__ import annotations

import pytest

from trl_r3.trainers.scoring import Scoring


@pytest.mark.parametrize(
    ("batch", "is_update", "has_old_policy"),
    [
        (None, False, False),
        ({"completion_ids": 0}, True, False),
        ({"old_per_token_logps": 0}, True, True),  # of GRPO
        ({"old_logps": 0}, True, True),  # of RLOO
    ],
)
def test_what_is_scored(batch, is_update, has_old_policy):
    scoring = Scoring(batch=batch)
    assert (scoring.is_update, scoring.has_old_policy) == (is_update, has_old_policy)


def test_samples_are_of_one_scoring():
    one, other = Scoring(), Scoring()
    one.samples.append(object())
    assert other.samples == []
