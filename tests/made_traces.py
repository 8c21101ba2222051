"""Traces of nobody: right in shape, with records and numbers that a seed makes."""

import torch

from trl_r3.traces.trace import Trace, TraceFacts


def make_trace(samples=3, prompt=4, completion=6, layers=2, experts=16, top_k=4, step=7, rank=0, seed=0):
    """A trace of nobody, with right padding widths and records."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = samples * (prompt + completion - 1), samples * (prompt + completion)
    first = torch.randint(experts, (rows, layers, 1), generator=generator)
    records = (first + torch.arange(top_k)) % experts
    counts = torch.randint(100, (2, layers, experts), generator=generator, dtype=torch.int32)
    logprobs = -torch.rand(3, samples * completion, generator=generator)
    facts = TraceFacts(
        step=step,
        rank=rank,
        num_ranks=2,
        mode="R3",
        moe_layers=list(range(1, layers + 1)),
        num_decoder_layers=layers + 1,
        num_experts=experts,
        top_k=top_k,
        model_type="qwen3_moe",
        config_digest="0" * 64,
        pad_token_id=0,
        temperature=1.0,
        float32_head=False,
        gating="intercept",
        padding="none",
        dtype="float32",
        buffers="float32",
        autocast="no",
        attention="sdpa",
        experts="grouped_mm",
        device="cpu",
        processor="x86_64 AVX512",
        matmul_precision="highest",
        threads=1,
        versions={"torch": "2.13.0"},
        rows=rows,
        missing=0,
        compared_rows=rows,
        agreement=0.9,
        contrast=0.5,
    )
    return Trace(
        facts=facts,
        lengths=torch.tensor([[prompt, completion]] * samples, dtype=torch.int32),
        forwards=torch.tensor([[samples, prompt, prompt + completion]], dtype=torch.int32),
        tokens=torch.randint(1000, (tokens,), generator=generator, dtype=torch.int32),
        masks=torch.full((samples * completion,), 3, dtype=torch.uint8),
        train_logprobs=logprobs[0].clone(),
        rollout_logprobs=logprobs[1].clone(),
        live_logprobs=logprobs[2].clone(),
        load_live=counts[0].clone(),
        load_recorded=counts[1].clone(),
        changed=torch.zeros(layers, dtype=torch.int32),
        records=records.to(facts.layout.storage_dtype),
    )
