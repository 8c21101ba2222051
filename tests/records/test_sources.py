"""A record that is replayed as a whole: what cannot be one is refused before any forward, and leaves no state."""

from __future__ import annotations

import pytest
import torch
from oracles import foreign_record

from trl_r3 import RouterReplay, enable_routing_replay


def test_refused_record_leaves_no_state(qwen, ids):
    live = qwen(ids).logits
    replay = enable_routing_replay(qwen)
    record = foreign_record(replay, *ids.shape)
    bad = record.clone()
    bad[1, 3, 0] = 8
    for wrong in (bad, record[..., :1], record[:, :, :1], record[:1], record.double(), record[0]):
        with pytest.raises(ValueError):
            qwen(ids, routed_experts=wrong)
        with pytest.raises(ValueError), replay.replay(wrong):
            qwen(ids)
        assert torch.equal(qwen(ids).logits, live)


def test_bad_records_are_refused_before_any_forward(qwen, ids):
    replay = RouterReplay(qwen)
    good = foreign_record(replay, *ids.shape)
    fed = []
    qwen.model.layers[0].register_forward_hook(lambda *args: fed.append(1))

    def refused(record, *words):
        with pytest.raises(ValueError) as error, replay.replay(record):
            qwen(ids)
        for word in words:
            assert word in str(error.value)

    def damaged(sample, row, slot, value):
        record = good.clone()
        record[sample, row, slot] = torch.tensor(value)
        return record

    refused(damaged(1, 5, 1, [0, 8]), "sample 1", "decoder layer 3", "row 5", "8")
    refused(damaged(0, 2, 0, [-2, 1]), "sample 0", "decoder layer 1", "row 2", "-2", "8")
    refused(damaged(1, 4, 1, [6, 6]), "sample 1", "decoder layer 3", "row 4", "expert 6", "2 ids")
    refused(damaged(1, 7, 1, [0, 0]), "sample 1", "decoder layer 3", "row 7")
    refused(damaged(1, 7, 1, [-1, -1]), "sample 1", "decoder layer 3", "row 7", "2 of 4")
    refused(damaged(1, 7, 1, [-1, 3]), "sample 1", "row 7", "1 of 4")
    refused(good[:, :-1], "2 x 11", "2 x 12")
    refused(torch.cat([good, good[:, :1]], 1), "2 x 13", "2 x 12")
    refused(good[:1], "1 x 12", "2 x 12")
    refused(good[:, :, :1], "1 layer slots", "2 MoE layers", "4 decoder layers")
    refused(good[:, :, [0, 1, 0]], "3 layer slots", "2 MoE layers", "4 decoder layers")
    refused(good[..., [0, 1, 0]], "(2, 12, 2, 3)", "2 experts")
    refused(good.float(), "torch.float32")
    refused(good.bool(), "torch.bool")
    refused(good[0], "3 dimensions", "4")
    all_missing = good.clone()
    all_missing[1] = -1
    refused(all_missing, "sample 1", "12 rows")
    assert not fed
