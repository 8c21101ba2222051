"""Healthy ranges follow how many experts there are, and how many a token takes."""

import math
from pathlib import Path

import pytest

from trl_r3.traces.healthy_ranges import A_NUMBER, MAX_OVER_MEAN, HealthyRange, healthy_ranges

ROOT = Path(__file__).parents[2]

CHANGED = "routing_replay/changed_router_frac"
# measured on a Mixtral of (E, K), rollouts in bfloat16 and with weights in eight bits: `trl_r3.traces.healthy_ranges`
MEASURED = {
    (4, 1): (0.0082, 0.0467),
    (16, 1): (0.0189, 0.0789),
    (16, 4): (0.0208, 0.1695),
    (64, 8): (0.0549, 0.3554),
    (128, 8): (0.0612, 0.4059),
    (256, 8): (0.0808, 0.4779),
}


@pytest.mark.parametrize("sizes", MEASURED, ids=str)
def test_changed_routers_tell_bfloat16_from_eight_bits(sizes):
    healthy = healthy_ranges(top_k=sizes[1], num_experts=sizes[0])[CHANGED]
    assert [share in healthy for share in MEASURED[sizes]] == [True, False]


def test_one_bound_for_all_would_not():
    one = healthy_ranges()[CHANGED]
    assert one == healthy_ranges(8, 128)[CHANGED] and one.high == pytest.approx(0.2)
    assert any(eight_bits in one for _, eight_bits in MEASURED.values())


def test_a_load_that_is_everything_is_never_healthy():
    for top_k, experts in ((2, 8), (8, 128), (8, 256), (1, 4)):
        assert experts / top_k not in healthy_ranges(top_k, experts)[MAX_OVER_MEAN]
    assert (healthy_ranges(2, 8)[MAX_OVER_MEAN].high, healthy_ranges(8, 256)[MAX_OVER_MEAN].high) == (3.0, 4.0)


def test_the_page_says_for_which_model_its_bounds_are():
    page = " ".join((ROOT / "docs" / "watching.md").read_text().split())
    paper, mixtral = healthy_ranges(8, 128), healthy_ranges(2, 8)
    for name in (CHANGED, MAX_OVER_MEAN):
        (row,) = [line for line in (ROOT / "docs" / "watching.md").read_text().splitlines() if f"| `{name}` |" in line]
        assert f"| below {paper[name].high:g} |" in row
    bounds = f"{mixtral[CHANGED].high:.2g} and {mixtral[MAX_OVER_MEAN].high:g}"
    assert "are for 8 of 128 experts" in page and f"Mixtral's 2 of 8 are {bounds}." in page


def test_every_expert_for_every_token():
    """Nothing can change, and the load is even."""
    healthy = healthy_ranges(4, 4)
    assert 0.0 in healthy[CHANGED] and 1e-3 not in healthy[CHANGED] and 1.0 in healthy[MAX_OVER_MEAN]


def test_in_words():
    ranges = [HealthyRange(*each, "") for each in ((0.0, 0.0), (0.8, 1.0), (0.0, math.inf), (0.0, 1e-3))]
    assert [str(each) for each in ranges] == ["0", "above 0.8", "above 0", "below 0.001"]


def test_any_number_is_one():
    assert str(A_NUMBER) == "a number" and all(value in A_NUMBER for value in (-1e30, 0.0, 1e30))
    assert not any(value in A_NUMBER for value in (math.nan, math.inf, -math.inf))
