"""Which top-k of a mixture decides, by what its experts are given: where none does, the model is refused.

Legend: N tokens of a forward, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch
from oracles import as_sets, foreign_record, stacked
from routers.own_mixtures import E, K, Mixture, live_groups, plain, with_mixtures

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.cli.experts import executed_ids


def one_after_the_other(scores, size):
    first, one = scores.topk(1, dim=-1)
    second, other = scores.scatter(1, one, 0.0).topk(1, dim=-1)
    return torch.cat([first, second], -1), torch.cat([one, other], -1)


def best_then_top_1(scores, size):
    one = scores.argmax(-1, keepdim=True)
    second, other = scores.scatter(1, one, 0.0).topk(1, dim=-1)
    return torch.cat([scores.gather(1, one), second], -1), torch.cat([one, other], -1)


def groups_then_sort(scores, size):
    ids = (scores * live_groups(scores)).argsort(-1, descending=True)[:, :K]
    return scores.gather(1, ids), ids


def each_sample(scores, size):
    top = [torch.topk(rows, K, dim=-1) for rows in scores.unflatten(0, size)]
    return torch.cat([each[0] for each in top]), torch.cat([each[1] for each in top])


def tokens_for_experts(scores, size):
    values, tokens = torch.topk(scores.T, 4, dim=-1)
    taken = torch.zeros_like(scores.T).scatter(1, tokens, values).T + 1e-6 * scores
    weights, ids = taken.sort(-1, descending=True)
    return weights[:, :K], ids[:, :K]


def columns_first(scores, size):
    values, ids = torch.topk(scores.T, K, dim=0)
    return values.T, ids.T


WRONG = [one_after_the_other, best_then_top_1, groups_then_sort, each_sample, tokens_for_experts, columns_first]


@pytest.mark.parametrize("select", WRONG)
def test_what_no_single_top_k_decides_is_refused(select):
    with pytest.raises(UnsupportedRouterError, match=r"layers\.1\.mlp \(Mixture\).* no `torch.topk` that selects all"):
        RouterReplay(with_mixtures(select))


def with_an_unused_top_k(scores, size):
    values, ids = plain(scores, size)
    scores.topk(3, dim=-1)
    return values, ids


def some_skip(scores, size):
    values, ids = plain(scores, size)
    return values, ids.where(ids != E - 1, 0)  # another name for the last expert


@pytest.mark.parametrize("select", [plain, with_an_unused_top_k, some_skip])
def test_what_one_top_k_decides_is_replayed(select, ids):
    """Ids reach the experts by keyword."""
    model = with_mixtures(select)
    replay = RouterReplay(model)
    assert (replay.num_experts, replay.top_k) == (E, K)
    record = foreign_record(replay, *ids.shape)
    with torch.no_grad(), executed_ids(model) as seen, replay.replay(record):
        model(ids)
    expected = record.where(record != E - 1, 0) if select is some_skip else record
    assert torch.equal(as_sets(stacked(seen, len(ids))), as_sets(expected))


class TokenByToken(Mixture):
    def forward(self, hidden_BTH):
        return super().forward(hidden_BTH.transpose(0, 1)).transpose(0, 1)


def test_rows_of_another_order_are_refused(qwen):
    """Shapes are the same, and half of the tokens would get the experts of another one."""
    for layer in qwen.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = TokenByToken(plain, layer.mlp.experts, qwen.config.hidden_size)
    with pytest.raises(UnsupportedRouterError, match=r"layers\.1\.mlp .* go through the batch token by token"):
        RouterReplay(qwen)


class Loop(torch.nn.ModuleList):
    """Experts that are called one by one, as the page of models says to write it."""

    def forward(self, hidden_NH, ids, weights):
        output = torch.zeros_like(hidden_NH)
        for index, expert in enumerate(self):
            token, slot = torch.where(ids == index)
            output = output.index_add(0, token, expert(hidden_NH[token]) * weights[token, slot, None])
        return output


class LoopMixture(Mixture):
    def forward(self, hidden_BTH):
        hidden_NH = hidden_BTH.flatten(0, 1)
        weights, ids = self.select((hidden_NH @ self.weight.T).softmax(-1), hidden_BTH.shape[:2])
        return self.experts(hidden_NH, ids, weights).view_as(hidden_BTH)


def test_a_loop_over_experts_in_the_forward_of_their_list(qwen, ids):
    ran: dict[int, list[int]] = {}
    for layer in (1, 3):
        width = qwen.config.hidden_size
        experts = Loop(torch.nn.Linear(width, width) for _ in range(E))
        qwen.model.layers[layer].mlp = LoopMixture(plain, experts, width)
    replay = RouterReplay(qwen)
    for index, expert in enumerate(qwen.model.layers[3].mlp.experts):
        expert.register_forward_hook(
            lambda module, args, output, index=index: ran.setdefault(index, []).append(len(args[0]))
        )
    record = foreign_record(replay, *ids.shape)
    with replay.replay(record):
        qwen(ids, labels=ids).loss.backward()
    assert {index: calls[0] for index, calls in ran.items()} == dict(
        enumerate(record[:, :, 1].flatten().bincount(minlength=E).tolist())
    )
    assert qwen.model.layers[1].mlp.weight.grad.abs().sum() > 0
