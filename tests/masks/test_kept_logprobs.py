"""Log-probabilities over kept tokens against a loop in float64 over full logits with -inf outside the kept set.

Legend: N predictions, H hidden size, V vocabulary.
"""

import pytest
import torch
from masks.kept_oracle import HIDDEN, VOCAB, oracle, random_rows

from trl_r3.masks import kept_logprobs
from trl_r3.masks.kept_logprobs import Head, KeptLogProbs
from trl_r3.masks.masked_batch import KeptRows
from trl_r3.records.sampling_mask import SamplingMask

N = 40


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    targets = torch.randint(0, VOCAB, (N,), generator=generator)
    rows = random_rows(generator, targets, VOCAB)
    return draw(N, HIDDEN), draw(VOCAB, HIDDEN), draw(VOCAB), targets, rows, (draw(N), draw(N))


def expected(hidden, weight, bias, targets, rows, head, grads):
    """Log-probabilities, entropies and gradients by the loop."""
    leaves = [each.double().requires_grad_() if each is not None else None for each in (hidden, weight, bias)]
    y = leaves[0] @ leaves[1].T
    z = (y if bias is None else y + leaves[2]) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    pairs = [oracle(z[i] / head.temperature, int(targets[i]), rows[i]) for i in range(N)]
    scores = [torch.stack(each) for each in zip(*pairs, strict=True)]
    total = sum((score * grad).sum() for score, grad in zip(scores, grads, strict=True))
    found = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    return scores, found


def of_package(hidden, weight, bias, targets, rows, head, grads):
    leaves = [each.clone().requires_grad_() if each is not None else None for each in (hidden, weight, bias)]
    kept = KeptRows.sorted(torch.arange(N), SamplingMask.of(rows), torch.arange(N))
    scores = KeptLogProbs.apply(*leaves, targets, kept, head, True)
    total = sum((score * grad).sum() for score, grad in zip(scores, grads, strict=True))
    return scores, torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])


HEADS = {
    "plain": Head(1.0, None, 1.0, torch.float32),
    "temperature": Head(0.6, None, 1.0, torch.float32),
    "softcap": Head(1.3, 2.5, 1.0, torch.float32),
    "scale": Head(1.0, None, 0.25, torch.float32),
    "all": Head(0.7, 3.0, 1.5, torch.float32),
}
TILES = {"one tile": (2**23, 512), "tiles of three": (2**23, 3), "a row each": (1, 512), "by elements": (500, 512)}


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_loop(problem, monkeypatch, head, with_bias, tiles):
    elements, rows = TILES[tiles]
    monkeypatch.setattr(kept_logprobs, "_TILE_ELEMENTS", elements)
    monkeypatch.setattr(kept_logprobs, "_TILE_ROWS", rows)
    hidden, weight, bias, *rest = problem
    problem = (hidden, weight, bias if with_bias else None, *rest)
    targets, kept, grads = rest
    right = expected(*problem[:3], targets, kept, HEADS[head], grads)
    found = of_package(*problem[:3], targets, kept, HEADS[head], grads)
    for one, other in zip((*found[0], *found[1]), (*right[0], *right[1]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)


def test_the_comparison_sees_one_id_more(problem):
    """Or the test above would not be one of the kept sets."""
    *fixed, targets, rows, grads = problem
    wrong = [list(row) for row in rows]
    wrong[3] = sorted({*rows[3], next(v for v in range(VOCAB) if v not in rows[3])})
    right = expected(*fixed, targets, rows, HEADS["plain"], grads)[0]
    found = of_package(*fixed, targets, wrong, HEADS["plain"], grads)[0]
    assert abs(found[0][3] - right[0][3]) > 1e-4
    assert abs(found[1][3] - right[1][3]) > 1e-4


def test_rows_that_nothing_keeps_have_no_gradient(problem):
    """Exactly: not what rounding leaves of a difference."""
    hidden, weight, bias, targets, _, grads = problem
    used = list(range(0, VOCAB, 3))
    rows = [sorted({int(token), *used[i % 5 :: 5]}) for i, token in enumerate(targets)]
    unused = [v for v in range(VOCAB) if not any(v in row for row in rows)]
    assert len(unused) > 20
    for dtype in (torch.float32, torch.bfloat16):
        head = Head(0.8, 3.0, 1.5, dtype)
        _, (_, of_weight, of_bias) = of_package(
            hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, rows, head, grads
        )
        assert not of_weight[unused].any()
        assert not of_bias[unused].any()
        kept_somewhere = [v for v in range(VOCAB) if v not in unused]
        assert of_weight[kept_somewhere].abs().sum(1).min() > 0


def test_a_prediction_learns_from_its_own_row_only(problem):
    """A tile shares the union of its ids: what only its neighbour keeps must not reach a prediction."""
    hidden, weight, _, targets, _, _ = problem
    rows = [sorted({int(targets[i]), (int(targets[i]) + 1 + i) % VOCAB}) for i in range(N)]
    grads = torch.zeros(N)
    grads[5] = 1.0
    _, (of_hidden, of_weight) = of_package(
        hidden, weight, None, targets, rows, HEADS["plain"], (grads, torch.zeros(N))
    )
    assert of_weight.abs().sum(1).nonzero()[:, 0].tolist() == rows[5]
    assert of_hidden.abs().sum(1).nonzero()[:, 0].tolist() == [5]


def test_bfloat16_rounds_as_its_projection_does(problem):
    """The projection in bfloat16, everything after it in float32, as TRL's head."""
    *fixed, targets, rows, grads = problem
    low = [each.bfloat16() for each in fixed]
    head = Head(0.7, None, 1.0, torch.bfloat16)
    found = of_package(*low, targets, rows, head, grads)[0]
    z = ((low[0] @ low[1].T) + low[2]).double() / head.temperature
    for i in range(N):
        logprob, entropy = oracle(z[i], int(targets[i]), rows[i])
        torch.testing.assert_close(found[0][i].double(), logprob, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found[1][i].double(), entropy, rtol=2e-5, atol=2e-5)
