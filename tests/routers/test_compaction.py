"""Which rows of a padded batch experts see."""

import pytest
import torch
from torch import nn

from trl_r3.routers.compaction import CompactExperts, RealRows
from trl_r3.routers.passes import LivePass
from trl_r3.routers.patches import ActivePass

MASK = torch.tensor([[0, 1, 1], [1, 0, 1]])  # a hole does no harm here


class Doubling(nn.Module):
    """Experts that tell what they are given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden, ids, weights=None):
        self.seen.append((hidden.shape[0], ids.shape[0], None if weights is None else weights.shape[0]))
        return 2 * hidden


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Doubling()


def test_rows_are_taken_out_and_come_back_as_zeros():
    layer, active = Layer(), ActivePass.idle()
    compact = CompactExperts(layer, active)
    hidden, ids = torch.arange(1.0, 13.0).view(6, 2).requires_grad_(), torch.zeros(6, 1).int()
    pass_ = LivePass()
    pass_.real = RealRows.of(MASK.bool())
    with active.use(pass_):
        output = layer.experts(hidden, ids, weights=torch.ones(6, 1))
    assert layer.experts.seen == [(4, 4, 4)] and compact.calls == 1
    assert torch.equal(output, 2 * hidden * MASK.flatten()[:, None])
    output.sum().backward()
    assert torch.equal(hidden.grad, 2.0 * MASK.flatten()[:, None].expand(6, 2))
    layer.experts(hidden, ids)  # in no pass
    with active.use(LivePass()):
        layer.experts(hidden, ids)
    assert layer.experts.seen[1:] == [(6, 6, None)] * 2
    compact.remove()
    assert "forward" not in vars(layer.experts)


def test_experts_of_whole_sequences():
    """Those of DBRX take hidden states as (batch, tokens), and ids by row."""
    layer, active, pass_ = Layer(), ActivePass.idle(), LivePass()
    CompactExperts(layer, active)
    hidden = torch.arange(12.0).view(2, 3, 2)
    pass_.real = RealRows.of(MASK.bool())
    with active.use(pass_):
        output = layer.experts(hidden, torch.zeros(6, 1).int())
    assert layer.experts.seen == [(1, 4, None)]
    assert torch.equal(output, 2 * hidden * MASK[..., None])


@pytest.mark.parametrize("real", [torch.ones(2, 3), torch.zeros(2, 3)])
def test_masks_that_say_nothing(real):
    assert RealRows.of(real.bool()) is None


def test_rows_of_values_and_back():
    rows = RealRows.of(MASK.bool())
    values = torch.arange(12.0).view(6, 2)
    assert rows.size == (2, 3) and rows.rows_N.tolist() == [1, 2, 3, 5]
    assert torch.equal(rows.padded(rows.real(values)), values * MASK.flatten()[:, None])
    assert rows.on(torch.device("cpu")) is rows.rows_N
