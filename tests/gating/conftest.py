"""The gate, in each of its implementations."""

import pytest
from gating_twins import TWINS


@pytest.fixture(params=TWINS)
def gating(request):
    return TWINS[request.param]
