"""Adapters over a bfloat16 base that is sent to a server again and again, on one process and by shards of two."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sharded.cases import ADAPTED
from sharded.launching import needs_deepspeed
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("what", ADAPTED)
@pytest.mark.parametrize("config", ["single_gpu", "ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_base_stays_and_what_is_sent_is_merged(folder, results, config, what):
    """It is, bit for bit, what PEFT merges of the base on disk and the adapter that was saved."""
    for report in results(f"{config} synced {what}"):
        assert report["changed"] == 0 < report["compared"]
        assert report["wrong"] == 0 < report["rows"]
    written, base = folder / f"{config} synced {what}", {"dtype": torch.bfloat16}
    saved = load_file(written / "trained" / "adapter_model.safetensors")
    wide = {value.dtype for value in saved.values()} == {torch.float32}  # DeepSpeed's is bfloat16, and loaded as it is
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **base)
    unmerged = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = PeftModel.from_pretrained(model, str(written / "trained"), autocast_adapter_dtype=wide)
    merged, sent = dict(policy.merge_and_unload().named_parameters()), load_file(written / "sent.safetensors")
    assert set(sent) == set(merged)
    assert [name for name in sent if not torch.equal(sent[name], merged[name])] == []
    changed = [name for name in sent if not torch.equal(sent[name], unmerged[name])]
    assert len(changed) == {"attention": 2 * 4, "experts": 2 * 4 + 2 * 3}[what]
