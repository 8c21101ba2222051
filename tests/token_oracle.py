"""Models whose routers encode the token id, so that a row tells whose it is.

Legend: B batch, T tokens of a sequence, V vocabulary, L MoE layers, K experts per token.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from model_zoo import build_tiny
from oracles import changed_rows, stacked

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids
from trl_r3.records.record import pack
from trl_r3.records.samples import Sample

VOCAB, EXPERTS, TOP_K, LAYERS = 32, 16, 3, (1, 3)
_SETS = list(itertools.combinations(range(EXPERTS), TOP_K))
random.Random(0).shuffle(_SETS)


def table(first):
    """`(V, L, K)`: a set of experts for each token and layer, no two of them the same."""
    return torch.tensor(_SETS[first : first + VOCAB * len(LAYERS)]).reshape(VOCAB, len(LAYERS), TOP_K)


OF_ROLLOUT, OF_TRAINING = table(0), table(VOCAB * len(LAYERS))


@torch.no_grad()
def oracle(choice):
    """A Qwen3-MoE that routes token v in MoE layer l to `choice[v, l]`, whatever surrounds it."""
    model = build_tiny(
        "qwen3_moe",
        vocab_size=VOCAB,
        num_hidden_layers=4,
        mlp_only_layers=[0, 2],
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))  # and no layer adds anything to it
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "mlp.down_proj.weight", "experts.down_proj")):
            p.zero_()
    for slot, layer in enumerate(LAYERS):
        preferred = torch.zeros(VOCAB, EXPERTS).scatter(1, choice[:, slot], torch.tensor([[3.0, 2.0, 1.0]] * VOCAB))
        model.model.layers[layer].mlp.gate.weight.copy_(preferred.T)
    return model


class Pair(tuple):
    """A handle and its model; a failing example need not print the model."""

    def __repr__(self):
        return f"Pair({self[0]})"


@pytest.fixture(scope="module")
def rollout():
    return Pair((RouterReplay(model := oracle(OF_ROLLOUT)), model))


@pytest.fixture(scope="module")
def training():
    """What is trained has other weights, so that no token would go live where it went in the rollout."""
    assert changed_rows(OF_ROLLOUT, OF_TRAINING).all()
    return Pair((RouterReplay(model := oracle(OF_TRAINING)), model))


settings.register_profile("models", max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
with_models = settings(settings.get_profile("models"))
tokens_of = st.lists(st.integers(1, VOCAB - 2), min_size=1, max_size=6)
samples = st.lists(st.tuples(tokens_of, tokens_of), min_size=1, max_size=6)


@torch.no_grad()
def engine(rollout, tokens):
    """What an engine returns for one sequence: packed rows of all tokens but the last."""
    replay, model = rollout
    with replay.record() as recorded:
        model(torch.tensor([tokens]))
    return pack(recorded.routed_experts[0, :-1], replay.layout)


def pad(drawn, prompt_width, width):
    """Left-padded prompts, right-padded completions: ids, mask, and where a row was recorded."""
    ids, mask = (torch.zeros(len(drawn), width, dtype=torch.long) for _ in range(2))
    recorded = torch.zeros(len(drawn), width, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(drawn):
        start, end = prompt_width - len(prompt), prompt_width + len(completion)
        ids[i, start:end] = torch.tensor(prompt + completion)
        mask[i, start:end] = 1
        recorded[i, start : end - 1] = True
    return ids, mask, recorded


def wrong_rows(executed, ids, recorded):
    """How many (token, layer) pairs did not run through the experts of their own token."""
    expected = torch.where(recorded[..., None, None], OF_ROLLOUT[ids], OF_TRAINING[ids])
    return int(changed_rows(executed, expected).sum())


@torch.no_grad()
def replayed(training, record, ids, mask=None, **kwargs):
    replay, model = training
    with executed_ids(model) as seen, replay.replay(record):
        model(ids, attention_mask=mask, **kwargs)
    return stacked(seen, ids.shape[0])


def samples_of(drawn, records):
    return [
        Sample(i, torch.tensor([*prompt, *completion]), len(prompt), record)
        for i, ((prompt, completion), record) in enumerate(zip(drawn, records, strict=True))
    ]
