"""A plan as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .job import GB, Job
from .memory import Plan
from .remedies import Remedy
from .sizes import ModelFacts


def as_dict(model: ModelFacts, job: Job, plan: Plan, changes: Sequence[Remedy]) -> dict[str, Any]:
    """All figures of a plan, in bytes and seconds."""
    layout = model.layout
    facts = asdict(model)
    facts["layout"] = {
        "moe_layers": list(layout.moe_layers),
        "num_decoder_layers": layout.num_decoder_layers,
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
    }
    derived = ("gpu", "left", "gpu_missing", "host_missing", "engine_fits")
    figures = {**asdict(plan), **{name: getattr(plan, name) for name in derived}}
    return {
        "fits": plan.fits,
        "model": facts,
        "job": {**asdict(job), "samples": job.samples},
        "plan": figures,
        "changes": [{"change": remedy.change, "gpu": remedy.plan.gpu, "host": remedy.plan.host} for remedy in changes],
    }


def show(model: ModelFacts, job: Job, plan: Plan, changes: Sequence[Remedy]) -> None:
    """Print the tables, and what to change."""
    console = Console(soft_wrap=True)
    console.print(_model_table(model))
    if model.quantization is not None:
        console.print(model.quantization, markup=False)
    console.print(_record_table(job, plan))
    console.print(_gpu_table(model, job, plan))
    if plan.loading > plan.host_available:
        console.print(
            f"While they load, {job.gpus_of_a_host} processes hold {_gb(plan.loading)} of weights in the "
            f"{_gb(plan.host_available)} of a host. Let one of them load: with FSDP2 by "
            "`fsdp_cpu_ram_efficient_loading: true` in the config of accelerate, or with `--strategy zero3`."
        )
    if plan.fits:
        condition = " if one process loads" if plan.loading > plan.host_available else ""
        console.print(f"It fits{condition}: {_gb(plan.left)} of each GPU are left for activations and logits.")
        return
    for problem in _problems(model, job, plan):
        console.print(problem)
    if not changes:
        console.print("No single change makes it fit: shorten `--tokens`, or use a smaller model.")
        return
    first, *others = changes
    console.print(f"First: {first.change}. Then {_then(first)}.")
    for remedy in others:
        console.print(f"Or: {remedy.change}. Then {_then(remedy)}.")


def _then(remedy: Remedy) -> str:
    plan = remedy.plan
    return f"{_gb(plan.gpu)} of {_gb(plan.gpu_available)} on a GPU, {_gb(plan.host)} on a host"


def _problems(model: ModelFacts, job: Job, plan: Plan) -> list[str]:
    found = []
    if plan.gpu_missing:
        found.append(
            f"It does not fit: a GPU needs {_gb(plan.gpu)} and has {_gb(plan.gpu_available)}, which is "
            f"{_gb(plan.gpu_missing)} too little."
        )
    if plan.host_missing:
        found.append(
            f"It does not fit: the records of a host take {_gb(plan.host)} of its {_gb(plan.host_available)}, which "
            f"is {_gb(plan.host_missing)} too much."
        )
    if not plan.engine_fits:
        found.append(
            f"It does not fit: a colocated vLLM has {_gb(job.engine_share * job.gpu_memory * GB)} of each GPU, less "
            f"than its share of {_gb(model.parameters * 2)} of weights in bfloat16, 1 / {job.engine_tensor_parallel}."
        )
    return found


def _model_table(model: ModelFacts) -> Table:
    layout = model.layout
    table = Table(title=f"{model.name}: {model.architecture}", show_header=False)
    table.add_row("parameters", f"{model.parameters / 1e9:.2f} billion")
    table.add_row("of them in experts", f"{model.expert_parameters / 1e9:.2f} billion")
    table.add_row("trained", f"{model.trainable / 1e9:.3f} billion")
    table.add_row("MoE layers of decoder layers", f"{len(layout.moe_layers)} of {layout.num_decoder_layers}")
    table.add_row("experts a token of experts", f"{layout.top_k} of {layout.num_experts}")
    return table


def _record_table(job: Job, plan: Plan) -> Table:
    table = Table(title=f"records of {job.samples:,} x {job.tokens:,} tokens", show_header=False)
    table.add_row("a token", f"{plan.record_a_token:,} bytes")
    table.add_row("the rollout", _gb(plan.records))
    table.add_row(f"a process of {job.gpus}", _gb(plan.records_of_a_rank))
    if job.queue:
        table.add_row(f"the queue of {job.queue:,} samples", _gb(plan.queue))
    table.add_row("host memory, token ids included", f"{_gb(plan.host)} of {_gb(plan.host_available)}")
    if job.spill:
        table.add_row("the same in training, records in files", _gb(plan.host_training))
    table.add_row("device, one micro-batch", _gb(plan.records_on_device))
    table.add_row("to the device, each pass", f"{plan.seconds_to_move:.2g} s at {job.bandwidth:g} GB/s")
    return table


def _gpu_table(model: ModelFacts, job: Job, plan: Plan) -> Table:
    adapters = f", LoRA of rank {job.rank}" if job.rank else ""
    table = Table(title=f"each GPU of {job.gpus}: {job.strategy}{adapters}", show_header=False)
    table.add_row("weights", _gb(plan.weights))
    if job.load_in_4bit:
        stays = model.parameters - model.quantizable
        table.add_row("in 4 bits", f"{model.quantizable / 1e9:.2f} billion; {stays / 1e9:.2f} billion stay")
    table.add_row("gradients", _gb(plan.gradients))
    table.add_row("optimizer", _gb(plan.optimizer))
    if plan.reference:
        table.add_row("reference model (beta > 0)", _gb(plan.reference))
    table.add_row("weights gathered at a time", _gb(plan.gathered))
    table.add_row("records", _gb(plan.records_on_device))
    table.add_row("together", f"{_gb(plan.gpu)} of {_gb(plan.gpu_available)}")
    table.add_row("left for activations and logits", _gb(plan.left))
    if job.engine_share and plan.engine_fits:
        table.add_row("left to the colocated vLLM for its cache", _gb(plan.engine_left))
    table.add_row("in the memory of a host while weights load", _gb(plan.loading))
    return table


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"
