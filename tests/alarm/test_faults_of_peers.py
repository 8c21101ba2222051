"""
Bugs of other implementations of routing replay that leave a record which looks right: live routing tells.

Legend: B samples, T tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from misrouted import Bench, engine_of, record_of
from model_zoo import build_tiny
from peft import LoraConfig, get_peft_model

BLOCK = 64  # tokens whose rows come with a block of a cache


@pytest.fixture(scope="module")
def bench():
    generator = torch.Generator().manual_seed(2)
    model = build_tiny("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[])
    return Bench(model, torch.randint(1, 128, (8, 140), generator=generator))


@pytest.fixture(scope="module")
def right(bench):
    record = record_of(engine_of(bench.model, "bf16"), bench.tokens)
    assert bench.verdict(record).fault is None
    return record


def fault_of(bench, record, right):
    assert not torch.equal(record, right)
    fault = bench.verdict(record).fault
    assert fault is not None
    return fault


def test_the_router_of_a_draft_in_layer_0(bench, right):
    """A draft model counts its layers from 0, too, and its router writes last."""
    draft = build_tiny("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[], seed=5)
    record = right.clone()
    record[:, :, 0] = record_of(draft, bench.tokens)[:, :, 0]
    assert re.search(r"layer 0 \(the lowest of 1 of 4\)", fault_of(bench, record, right))


def test_physical_ids_without_redundant_experts(bench, right):
    """Expert balancing moved experts between devices: all ids are ids of the model, of other experts."""
    generator = torch.Generator().manual_seed(0)
    record = right.clone()
    for layer in range(right.shape[2]):
        place_E = torch.randperm(bench.model.config.num_experts, generator=generator)
        record[:, :, layer] = place_E.to(record.dtype)[right[:, :, layer].long()]
    assert re.search(r"layer \d \(the lowest of 4 of 4\)", fault_of(bench, record, right))


@pytest.mark.parametrize("blocks", [1, 2])
def test_stale_rows_behind_a_hit_in_an_external_cache(bench, right, blocks):
    """Keys and values of a block were loaded, its rows are those of the request that had the block before."""
    record = right.clone()
    record[:, : blocks * BLOCK] = right.roll(1, 0)[:, : blocks * BLOCK]
    fault_of(bench, record, right)


def test_base_weights_that_serve_the_rollouts_of_an_adapter(bench, right):
    """The engine was not given the merged weights: its record is that of the base."""
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    adapted = get_peft_model(copy.deepcopy(bench.model), LoraConfig(r=4, init_lora_weights=False, **targets))
    trained = Bench(adapted.merge_and_unload().eval(), bench.tokens)
    assert trained.verdict(record_of(engine_of(trained.model, "bf16"), bench.tokens)).fault is None
    fault = fault_of(trained, right, record_of(trained.model, bench.tokens))
    assert re.search(r"layer 1 \(the lowest of 3 of 4\)", fault)
