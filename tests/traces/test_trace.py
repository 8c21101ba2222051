"""A trace as it is held in memory: the batches that were scored, with their padding."""

import torch
from made_traces import make_trace

from trl_r3.traces.trace import Trace


def test_padding_comes_back():
    """Three samples of unequal length in two forwards, with a token that is not attended to and one without loss."""
    trace = make_trace(samples=3, prompt=2, completion=3)
    lengths = torch.tensor([[2, 3], [1, 3], [3, 1]], dtype=torch.int32)
    tokens, rows = int(lengths.sum()), int(lengths.sum()) - 3
    masks = torch.tensor([3, 3, 1, 0, 0, 0, 3], dtype=torch.uint8)
    changes = {"lengths": lengths, "masks": masks, "tokens": torch.arange(1, tokens + 1, dtype=torch.int32)}
    changes["forwards"] = torch.tensor([[2, 3, 7], [1, 3, 6]], dtype=torch.int32)
    trace = Trace(**{**vars(trace), **changes, "records": trace.records[:rows]})
    (first, ids, attended, width), (last, *_) = trace.batches()
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 0, 6, 7, 8, 9, 0]] and width == 3
    assert attended.tolist() == [[0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0]]
    assert [sample.tokens.tolist() for sample in (*first, *last)] == [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert torch.equal(torch.cat([sample.record for sample in (*first, *last)]), trace.records)
    assert trace.counted.tolist() == [True, True, False, False, False, False, True]
