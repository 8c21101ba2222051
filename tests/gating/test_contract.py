"""What the op returns about each row, and what it refuses by name."""

import pytest
import torch

from trl_r3.gating import RowStatus


def test_every_row_has_its_status(gating):
    recorded = torch.tensor([[0, 1], [1, 0], [3, 2], [-1, -1], [-1, 0], [1, 1], [4, 0], [-7, 0], [9, -1]])
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(9, 4)
    same, differs, missing, invalid = RowStatus
    expected = [same, same, differs, missing, missing, invalid, invalid, invalid, missing]
    out = gating(logits, 2, recorded)
    assert out.status.dtype == torch.uint8
    assert out.status.tolist() == expected == [0, 0, 1, 2, 2, 3, 3, 3, 2]
    assert out.expert_ids.tolist() == [[0, 1], [1, 0], [3, 2]] + [[0, 1]] * 6
    uncompared = gating(logits, 2, recorded, compare_live=False)
    assert uncompared.status.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 2]
    assert torch.equal(uncompared.expert_ids, out.expert_ids)
    assert torch.equal(uncompared.weights, out.weights)


def test_without_a_record_every_status_is_zero(gating):
    for compare_live in (True, False):
        assert gating(torch.zeros(3, 4), 2, compare_live=compare_live).status.tolist() == [0, 0, 0]


X = torch.zeros(3, 8)
IDS = torch.zeros(3, 2, dtype=torch.int64)
BAD = [
    (ValueError, "must be .T, E., got 3 dimensions", lambda f: f(torch.zeros(1, 3, 8), 2)),
    (TypeError, "router_logits is torch.int64", lambda f: f(X.long(), 2)),
    (ValueError, "top_k is 9, but there are 8", lambda f: f(X, 9)),
    (ValueError, "top_k is 0", lambda f: f(X, 0)),
    (ValueError, "top_k is 1, but there are 0", lambda f: f(X[:, :0], 1)),
    (ValueError, "recorded is .2, 2., expected .3, 2.", lambda f: f(X, 2, IDS[:2])),
    (ValueError, "recorded is .3, 2., expected .3, 3.", lambda f: f(X, 3, IDS)),
    (TypeError, "recorded is torch.float32", lambda f: f(X, 2, IDS.float())),
    (TypeError, "recorded is uint8.*256 experts", lambda f: f(torch.zeros(3, 256), 2, IDS.to(torch.uint8))),
    (ValueError, "recorded is on meta", lambda f: f(X, 2, IDS.to("meta"))),
    (ValueError, "score is 'tanh'", lambda f: f(X, 2, score="tanh")),
    (ValueError, "group_score is 'mean'", lambda f: f(X, 2, group_score="mean")),
    (ValueError, "8 experts cannot be split into n_group=3", lambda f: f(X, 2, n_group=3)),
    (ValueError, "topk_group is 3, but n_group is 2", lambda f: f(X, 2, n_group=2, topk_group=3)),
    (ValueError, "hold 2, fewer than top_k=3", lambda f: f(X, 3, n_group=4, topk_group=1)),
    (ValueError, "needs 2 experts a group, got 1", lambda f: f(X, 1, n_group=8, topk_group=2)),
    (ValueError, "bias is .7,.", lambda f: f(X, 2, bias=torch.zeros(7))),
    (TypeError, "bias is torch.int64", lambda f: f(X, 2, bias=torch.zeros(8, dtype=torch.int64))),
    (ValueError, "eps is -1", lambda f: f(X, 2, eps=-1.0)),
    (TypeError, "weights_dtype is torch.int32", lambda f: f(X, 2, weights_dtype=torch.int32)),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
def test_bad_input_is_named(gating, error, message, call):
    with pytest.raises(error, match=message):
        call(gating)
