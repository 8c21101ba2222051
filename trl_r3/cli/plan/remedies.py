"""What to change first where a job does not fit, each tried by the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .job import GB, Job, PlanError
from .memory import Plan, estimate
from .sizes import ModelFacts, with_adapters

_MOST_GPUS = 1024
_SERVE = "serve vLLM on other GPUs (`--engine-share 0`)"


@dataclass(frozen=True)
class Remedy:
    """A change with which a job fits: what to set, and what the fullest memory is then."""

    change: str
    plan: Plan


def remedies(model: ModelFacts, job: Job) -> list[Remedy]:
    """
    Changes with which the job fits, the least first.

    Args:
        model ([`ModelFacts`]):
            Sizes of the model.
        job ([`Job`]):
            Settings that do not fit.

    Returns:
        list of [`Remedy`].
    """
    plan = estimate(model, job)
    fixed_job, host_changes = _for_host(plan, job)
    found = []
    for change, changed in _for_gpu(plan, model, fixed_job):
        try:
            facts = with_adapters(model, changed) if changed.rank != job.rank else model
            after = estimate(facts, changed)
        except PlanError:
            continue
        if after.fits:
            found.append(Remedy(" and ".join(filter(None, [host_changes, change])), after))
    return found


def _for_host(plan: Plan, job: Job) -> tuple[Job, str]:
    if not plan.host_missing:
        return job, ""
    if job.queue:  # training waits for no more of it than a step takes
        a_sample = plan.queue / job.queue
        queue = max(int((job.host_memory * GB - (plan.host - plan.queue)) / a_sample), 1)
        return replace(job, queue=queue), f"lower `queue_maxsize` (`--queue {queue}`)"
    a_prompt = plan.host / job.prompts
    prompts = max(int(job.host_memory * GB / a_prompt), 1)
    return replace(job, prompts=prompts), f"lower `--prompts` from {job.prompts} to {prompts}"


def _for_gpu(plan: Plan, model: ModelFacts, job: Job) -> Iterator[tuple[str, Job]]:
    """Changes of what lies on the GPUs; nothing to change is the first of them."""
    if not plan.gpu_missing and plan.engine_fits:
        yield "", job
        return
    if not job.engine_share:
        yield from _for_training(model, job)
        return
    yield from _split_engines(job)
    served = replace(job, engine_share=0.0, engine_tensor_parallel=1)
    yield _SERVE, served
    if not estimate(model, served).fits:
        for change, changed in _for_training(model, served):
            yield f"{_SERVE} and {change}", changed


def _for_training(model: ModelFacts, job: Job) -> Iterator[tuple[str, Job]]:
    """Changes of weights, gradients and optimizer."""
    if job.dtype == "float32" and job.strategy in ("ddp", "lora"):
        yield "load the weights in bfloat16 (`--dtype bfloat16`)", replace(job, dtype="bfloat16")
    if job.has_reference:
        yield "train without a reference model (`--beta 0`)", replace(job, beta=0.0)
    base = replace(job, strategy="ddp", lora_rank=16) if job.strategy == "lora" else job
    if job.gpus > 1 and job.strategy in ("ddp", "zero2", "lora"):
        rank = f" --lora-rank {base.rank}" if base.rank else ""
        yield f"shard the weights, too (`--strategy fsdp2{rank}`)", replace(base, strategy="fsdp2")
    gpus = _enough_gpus(model, base)
    if gpus is not None:
        rank = f" --lora-rank {base.rank}" if base.rank else ""
        strategy = base.strategy if base.strategy == "zero3" else "fsdp2"
        yield (
            f"raise `--gpus` from {job.gpus} to {gpus} (`--gpus {gpus} --strategy {strategy}{rank}`)",
            replace(base, gpus=gpus, strategy=strategy),
        )
    if not job.rank:
        adapters = "lora" if job.gpus == 1 else "fsdp2"
        option = "--strategy lora" if job.gpus == 1 else "--strategy fsdp2 --lora-rank 16"
        yield f"train adapters (`{option}`)", replace(job, strategy=adapters, lora_rank=16)


def _split_engines(job: Job) -> Iterator[tuple[str, Job]]:
    """More GPUs to each colocated engine, the fewest first."""
    for gpus in range(job.engine_tensor_parallel + 1, job.most_gpus_of_an_engine + 1):
        if job.most_gpus_of_an_engine % gpus == 0:
            yield (
                f"split vLLM's weights over {gpus} GPUs (`--engine-tensor-parallel {gpus}`)",
                replace(job, engine_tensor_parallel=gpus),
            )


def _enough_gpus(model: ModelFacts, job: Job) -> int | None:
    """The fewest GPUs that the sharded model fits on, if any number does."""
    strategy = job.strategy if job.strategy == "zero3" else "fsdp2"
    for gpus in range(job.gpus + 1, _MOST_GPUS + 1):
        if estimate(model, replace(job, gpus=gpus, strategy=strategy)).fits:
            return gpus
    return None
