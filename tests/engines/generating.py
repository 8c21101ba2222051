"""What `generate()` returns with routes, held against full forwards of a model that nothing was attached to."""

from __future__ import annotations

import torch
from oracles import changed_rows, stacked

from trl_r3.cli.experts import executed_ids

WITH_ROUTES = {"return_dict_in_generate": True, "output_routed_experts": True}


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


def mask_of(out, mask, ends=()):
    """Which tokens of the returned sequences are real: written here as a loop over each."""
    width = mask.shape[1]
    repeats = out.sequences.shape[0] // mask.shape[0]
    real = torch.ones_like(out.sequences)
    real[:, :width] = mask.repeat_interleave(repeats, 0)
    for i, sequence in enumerate(out.sequences.tolist()):
        end = next((p for p in range(width, len(sequence)) if sequence[p] in ends), len(sequence))
        real[i, end + 1 :] = 0
    return real


@torch.no_grad()
def full_forward(model, sequences, mask):
    """What an untouched copy executes when it is fed the whole sequences."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with executed_ids(model) as seen:
        model(sequences, attention_mask=mask, position_ids=positions)
    return stacked(seen, sequences.shape[0])


def check_routes(out, real, untouched):
    """Routes are those of a full forward; -1 exactly where nothing was routed: padding, after the end, the last."""
    fed = real.bool()
    for i, row in enumerate(real):
        fed[i, int(row.nonzero().max())] = False
    routes = out.routed_experts
    assert routes.dtype == torch.int16 and routes.shape[:2] == out.sequences.shape
    assert torch.equal((routes == -1).all(-1).all(-1), ~fed)
    assert torch.equal((routes == -1).any(-1).any(-1), ~fed)
    expected = full_forward(untouched, out.sequences, real)
    assert not changed_rows(routes, expected)[fed].any()
    assert changed_rows(routes, expected.roll(1, 1))[fed].any(), "a shift by one would be seen"
    assert fed.any()
