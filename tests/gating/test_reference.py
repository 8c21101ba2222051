"""Both twins compute the definition, and the comparison rejects what is not it."""

import pytest
import torch
from gating_oracle import Case, Tied, TiedRecord, cases, check_case
from gating_twins import TWINS
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_r3.gating import GatingOutput, RowStatus, masked_topk_gating_ref


@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_loops(gating, case):
    check_case(gating, case)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_loops_on_any_record(data):
    num_experts = data.draw(st.integers(1, 70))
    top_k = data.draw(st.integers(1, min(num_experts, 9)))
    rows = data.draw(
        st.lists(st.lists(st.integers(-2, num_experts), min_size=top_k, max_size=top_k), min_size=1, max_size=6)
    )
    case = Case(len(rows), num_experts, top_k, data.draw(st.sampled_from([torch.bfloat16, torch.float32])))

    class Drawn(Case):
        def recorded(self):
            return torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int16, torch.int32, torch.int64])))

    for twin in TWINS.values():
        check_case(twin, Drawn(**{k: getattr(case, k) for k in ("num_tokens", "num_experts", "top_k", "dtype")}))


def wrong_scale(logits, top_k, recorded, **options):
    return masked_topk_gating_ref(logits, top_k, recorded, **options | {"renormalize": False})


def wrong_unasked_renormalize(logits, top_k, recorded, **options):
    return masked_topk_gating_ref(logits, top_k, recorded, **options | {"renormalize": True})


def wrong_masked_probabilities(logits, top_k, recorded, **options):
    out = masked_topk_gating_ref(logits, top_k, recorded, **options)
    live = masked_topk_gating_ref(logits, top_k, **options).expert_ids
    alive = (out.expert_ids.unsqueeze(-1) == live.unsqueeze(-2)).any(-1)
    weights = out.weights * alive
    return GatingOutput(weights / weights.sum(-1, keepdim=True).clamp(min=1e-9), out.expert_ids, out.status)


def wrong_ties(logits, top_k, recorded, **options):
    out = masked_topk_gating_ref(logits.flip(-1), top_k, None, **options)
    return GatingOutput(out.weights, logits.shape[1] - 1 - out.expert_ids, out.status)


def wrong_slot_order(logits, top_k, recorded, **options):
    out = masked_topk_gating_ref(logits, top_k, recorded, **options)
    order = out.weights.argsort(dim=-1, descending=True)
    return GatingOutput(out.weights.gather(1, order), out.expert_ids.gather(1, order), out.status)


def wrong_half_rows(logits, top_k, recorded, **options):
    return masked_topk_gating_ref(logits, top_k, recorded.clamp(0, logits.shape[1] - 1), **options)


def wrong_biased_weights(logits, top_k, recorded, **options):
    bias = options["bias"]
    out = masked_topk_gating_ref(logits, top_k, recorded, **options)
    scores = logits.sigmoid() + bias
    weights = scores.gather(1, out.expert_ids)
    return GatingOutput(weights / weights.sum(-1, keepdim=True), out.expert_ids, out.status)


def wrong_differs_as_lists(logits, top_k, recorded, **options):
    out = masked_topk_gating_ref(logits, top_k, recorded, **options)
    live = masked_topk_gating_ref(logits, top_k, **options).expert_ids
    return GatingOutput(out.weights, out.expert_ids, (live != out.expert_ids).any(-1).to(torch.uint8))


def wrong_compared_unasked(logits, top_k, recorded, **options):
    return masked_topk_gating_ref(logits, top_k, recorded, **options | {"compare_live": True})


def wrong_invalid_as_missing(logits, top_k, recorded, **options):
    out = masked_topk_gating_ref(logits, top_k, recorded, **options)
    return GatingOutput(out.weights, out.expert_ids, out.status.clamp(max=RowStatus.MISSING))


class Own(Case):
    """A record of the live selection, in another order of slots."""

    def recorded(self):
        return masked_topk_gating_ref(self.logits(), self.top_k).expert_ids.flip(-1)


WRONG = [
    (wrong_scale, Case()),
    (wrong_unasked_renormalize, Case(options={"renormalize": False})),
    (wrong_masked_probabilities, Case()),
    (wrong_ties, Tied(ids=None, num_experts=32)),
    (wrong_slot_order, Case()),
    (wrong_half_rows, Case()),
    (wrong_biased_weights, Case(with_bias=True, options={"score": "sigmoid"})),
    (wrong_differs_as_lists, Own()),
    (wrong_compared_unasked, Case(options={"compare_live": False})),
    (wrong_invalid_as_missing, Case()),
]


@pytest.mark.parametrize(("variant", "case"), WRONG, ids=[w.__name__ for w, _ in WRONG])
def test_a_wrong_variant_is_rejected(variant, case):
    check_case(masked_topk_gating_ref, case)
    with pytest.raises(AssertionError):
        check_case(variant, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ties_go_to_the_lowest_id(gating, dtype):
    check_case(gating, Tied(dtype=dtype, num_experts=128, top_k=8, num_tokens=64))
    check_case(gating, Tied(dtype=dtype, num_experts=60, top_k=7, options={"n_group": 4, "topk_group": 2}))
    check_case(gating, TiedRecord(dtype=dtype, num_experts=64, num_tokens=64))
    assert gating(torch.zeros(3, 64, dtype=dtype), 5).expert_ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_groups_tie_to_the_lowest_group(gating):
    out = gating(torch.zeros(1, 12), 4, n_group=4, topk_group=2, group_score="max")
    assert out.expert_ids.tolist() == [[0, 1, 2, 3]]


def test_a_negative_zero_ties_with_zero(gating):
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.zeros(1, 32, dtype=dtype)
        logits[0, :4] = -0.0
        assert gating(logits, 5).expert_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_infinite_and_nan_logits_select_distinct_ids(gating):
    inf, nan = float("inf"), float("nan")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        row = torch.tensor([[-inf, 1.0, -nan, -inf, inf, nan, -inf, -inf] + [-inf] * 24], dtype=dtype)
        assert gating(row, 6).expert_ids.tolist() == [[2, 5, 4, 1, 0, 3]]


def test_masked_experts_get_no_weight(gating):
    logits = torch.randn(8, 32)
    logits[:, ::2] = -float("inf")
    out = gating(logits, 4, torch.tensor([[0, 1, 2, 3]]).expand(8, 4), renormalize=False)
    assert torch.equal(out.weights[:, 0], torch.zeros(8))
    torch.testing.assert_close(out.weights, torch.softmax(logits, -1)[:, :4])


def test_experts_far_below_the_maximum_are_not_zero_by_zero(gating):
    logits = torch.full((1, 32), -200.0)
    logits[0, 0], logits[0, 7] = 50.0, -199.0
    out = gating(logits, 2, torch.tensor([[7, 8]]))
    torch.testing.assert_close(out.weights, torch.tensor([[-199.0, -200.0]]).softmax(-1))


def test_sqrtsoftplus_of_very_negative_logits(gating):
    logits = torch.tensor([[-120.0, -121.0, 5.0] + [-3.0] * 29], requires_grad=True)
    out = gating(logits, 2, torch.tensor([[0, 1]]), score="sqrtsoftplus")
    expected = torch.tensor([[-60.0, -60.5]]).softmax(-1)
    torch.testing.assert_close(out.weights, expected)
    out.weights[0, 0].backward()
    slope = 0.5 * expected[0, 0] * expected[0, 1]
    torch.testing.assert_close(logits.grad[0, :2], torch.stack([slope, -slope]).detach())


def test_weights_follow_their_ids(gating):
    logits, recorded = Case().logits(), Case(missing=0.0, invalid=0.0).recorded()
    order = torch.tensor([2, 0, 3, 1])
    straight, turned = gating(logits, 4, recorded), gating(logits, 4, recorded[:, order])
    torch.testing.assert_close(straight.weights[:, order], turned.weights, rtol=1e-6, atol=0)


def test_replaying_the_own_selection_changes_no_bit(gating):
    logits = Case(dtype=torch.bfloat16, num_experts=64).logits().requires_grad_()
    live = gating(logits, 4)
    again = gating(logits, 4, live.expert_ids)
    assert torch.equal(live.weights, again.weights)
    assert (again.status == RowStatus.AS_RECORDED).all()
    grads = [torch.autograd.grad(out.weights[:, 0].sum(), logits)[0] for out in (live, again)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_rounded_to_nearest(gating, dtype):
    numbers = [2.0**e * m for e in range(-26, 17) for m in (1.0, 1.0009765625, 1.00048828125, 1.0014648, 1.9999)]
    for number in [*numbers, 65519.0, 65520.0, -3.0e-6, -70000.0]:
        single = torch.tensor([[number]], dtype=torch.float32)
        weights = gating(torch.zeros(1, 1), 1, scale=single.item(), weights_dtype=dtype).weights
        assert torch.equal(weights, single.to(dtype)), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_logit_is_ranked(gating, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None, :]
    expected = every.float().sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(gating(every, 2**16, score="topk_softmax").expert_ids, expected)
