"""One process that raises ends the run on all of them, with the same text: none waits for it."""

from __future__ import annotations

import re

import pytest
from trainers.two_processes import launched

TEXTS = {
    "missing": "RuntimeError: process 1: .*rows have no record, the first in sample 0",
    "wrong": "MisalignedRecordError: process 1: the record of the rollout is not that of its tokens: layer 0",
    "short": "ValueError: process 1: sample 0: the record has",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_an_error_on_one_process_is_one_on_all(tmp_path_factory, kind):
    first, second = (report["error"] for report in launched(tmp_path_factory)(kind))
    assert first and second, "it goes on"
    assert first == second
    assert re.match(TEXTS[kind], first), first
