"""Records of nobody, drawn by hypothesis: every number of experts that storage treats in a way of its own."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from trl_r3 import RoutingLayout

EXPERTS = (2, 8, 128, 254, 255, 256, 257, 512)


@st.composite
def records(draw, min_rows=0, experts=EXPERTS, missing=True):
    """A shape and int64 ids `(R, L, K)` of distinct experts, some rows missing."""
    num_experts = draw(st.sampled_from(experts))
    top_k = draw(st.integers(1, min(num_experts, 8)))
    decoder_layers = draw(st.integers(1, 6))
    layers = draw(st.sets(st.integers(0, decoder_layers - 1), min_size=1).map(sorted))
    layout = RoutingLayout(tuple(layers), decoder_layers, num_experts, top_k)
    rows = draw(st.integers(min_rows, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = rng.permuted(np.tile(np.arange(num_experts), (rows, len(layers), 1)), axis=-1)
    ids = torch.from_numpy(order[..., :top_k].copy())
    if missing:
        ids[torch.from_numpy(rng.random(rows) < draw(st.sampled_from([0.0, 0.3, 1.0])))] = -1
    return layout, ids
