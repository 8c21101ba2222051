"""Bytes of records, weights, gradients and optimizer, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from .job import GB, Job
from .sizes import ModelFacts

_TOKEN_IDS = 8  # bytes; a sample keeps its tokens beside its record, in int64
_QUEUED = 8 + 8 + 4  # bytes of a queued token: its id, whether it is trained, its log-probability
# NF4 keeps half a byte a weight and, for each block of 64, a scale in float32
_FOUR_BIT = 0.5 + 4 / 64


@dataclass(frozen=True)
class Plan:
    """
    Bytes of a job, and whether they fit.

    Args:
        record_a_token (`int`):
            Bytes of a record for each token.
        records (`int`):
            Of the whole rollout.
        records_of_a_rank (`int`):
            Of the samples of one process, in host memory.
        records_on_device (`int`):
            Of one micro-batch.
        host (`int`):
            Records and token ids of all processes of a host, when a rollout has been made, and the queue.
        queue (`int`):
            Samples in the queue of asynchronous GRPO, on the first host.
        host_training (`int`):
            The same while it is trained on; with `routing_replay_spill_dir` the records are in files then.
        seconds_to_move (`float`):
            For the records of a process to reach its device once. Each pass over the rollout moves them.
        weights, gradients, optimizer, gathered, reference (`float`):
            On each GPU; `gathered` is what sharding brings together for the layers that run, or, where that is more,
            for all layers of the reference model, which TRL gives to FSDP2 as one.
        loading (`float`):
            Weights in the memory of the fullest host while they are loaded, before any rollout.
        gpu_available, gpu_total, host_available (`float`):
            What of a GPU these may take, the same and the reserve, and the memory of a host.
        engine_left (`float`):
            What a colocated engine has of a GPU beside its own copy of the weights, for its cache; 0 without one.
    """

    record_a_token: int
    records: int
    records_of_a_rank: int
    records_on_device: int
    host: int
    queue: int
    host_training: int
    seconds_to_move: float
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    reference: float
    loading: float
    gpu_available: float
    gpu_total: float
    host_available: float
    engine_left: float

    @property
    def gpu(self) -> float:
        """Bytes on each GPU."""
        states = self.weights + self.gradients + self.optimizer + self.reference
        return states + self.gathered + self.records_on_device

    @property
    def left(self) -> float:
        """Bytes of a GPU that are left for activations and logits, not below 0."""
        return max(self.gpu_total - self.gpu, 0.0)

    @property
    def gpu_missing(self) -> float:
        """Bytes that a GPU lacks, not below 0."""
        return max(self.gpu - self.gpu_available, 0.0)

    @property
    def host_missing(self) -> float:
        """Bytes that a host lacks, not below 0."""
        return max(self.host - self.host_available, 0.0)

    @property
    def engine_fits(self) -> bool:
        """Whether a colocated engine holds its own copy of the weights."""
        return self.engine_left >= 0

    @property
    def fits(self) -> bool:
        """Whether GPU and host hold what they have to."""
        return not self.gpu_missing and not self.host_missing and self.engine_fits


def record_bytes(model: ModelFacts) -> int:
    """Bytes of a record for each token: one id for each MoE layer and each expert of a token."""
    layout = model.layout
    return len(layout.moe_layers) * layout.top_k * layout.storage_dtype.itemsize


def estimate(model: ModelFacts, job: Job) -> Plan:
    """
    Sizes of a job.

    Args:
        model ([`ModelFacts`]):
            Sizes of the model.
        job ([`Job`]):
            Settings.

    Returns:
        [`Plan`].
    """
    a_token = record_bytes(model)
    of_a_rank = job.samples_of_a_rank * job.tokens * a_token
    ranks = job.gpus_of_a_host
    token_ids = job.samples_of_a_rank * job.tokens * _TOKEN_IDS
    queue = job.queue * job.tokens * (a_token + _QUEUED)
    weights, gradients, optimizer, gathered = _states(model, job)
    engine = job.engine_share * job.gpu_memory * GB - model.parameters * 2 / job.engine_tensor_parallel
    return Plan(
        record_a_token=a_token,
        records=job.samples * job.tokens * a_token,
        records_of_a_rank=of_a_rank,
        records_on_device=job.micro_batch * job.tokens * a_token,
        host=queue + ranks * (token_ids + of_a_rank),
        queue=queue,
        host_training=queue + ranks * (token_ids + (0 if job.spill else of_a_rank)),
        seconds_to_move=of_a_rank / (job.bandwidth * GB),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=max(gathered, model.parameters * 2.0 * (job.has_reference and job.strategy == "fsdp2")),
        reference=_reference(model, job),
        loading=_loading(model, job),
        gpu_available=job.gpu_memory * GB * (1 - job.reserve - job.engine_share),
        gpu_total=job.gpu_memory * GB * (1 - job.engine_share),
        host_available=job.host_memory * GB,
        engine_left=engine if job.engine_share else 0.0,
    )


def _reference(model: ModelFacts, job: Job) -> float:
    """A reference model on each GPU: sharded by FSDP2 and ZeRO-3, else whole; DeepSpeed keeps it in bfloat16."""
    if not job.has_reference:
        return 0.0
    size = 2 if job.strategy.startswith("zero") else job.bytes_of_a_weight
    return model.parameters * size / (job.gpus if job.strategy in ("fsdp2", "zero3") else 1)


def _loading(model: ModelFacts, job: Job) -> float:
    """
    Weights in the memory of a host while they are loaded.

    One process, and one that quantizes, loads onto its GPU. With several each loads all of them, and Accelerate makes
    float32 of those that FSDP2 trains before it shards them. With ZeRO-3 the first process alone reads a checkpoint.
    """
    if job.load_in_4bit or (job.gpus == 1 and job.strategy in ("ddp", "lora")):
        return 0.0
    if job.strategy == "zero3":
        return model.parameters * 2.0
    whole = model.parameters * job.bytes_of_a_weight
    upcast = model.trainable * 4 + (whole if job.rank else 0) if job.strategy == "fsdp2" else whole
    return job.gpus_of_a_host * float(upcast + whole * job.has_reference)


def _states(model: ModelFacts, job: Job) -> tuple[float, float, float, float]:
    """
    Weights, gradients, optimizer and gathered layers on each GPU.

    AdamW keeps two moments in the dtype of what it updates. Accelerate's FSDP2 updates float32 copies wherever mixed
    precision is on; DeepSpeed keeps bfloat16 weights and gradients beside a float32 copy. Adapters are float32.
    """
    size = job.bytes_of_a_weight
    frozen = model.parameters if job.rank else 0
    base = float(frozen * size)
    if job.load_in_4bit:
        base += model.quantizable * (_FOUR_BIT - size)
    shards, trained = job.gpus, model.trainable
    layers = 2 * model.largest_layer * 2 if shards > 1 else 0  # one that runs and the next, in bfloat16
    if job.strategy == "fsdp2":
        return (base + trained * 4) / shards, trained * 4 / shards, trained * 8 / shards, layers
    if job.strategy == "zero3":
        return (base + trained * 2) / shards, trained * 2 / shards, trained * 12 / shards, layers
    if job.strategy == "zero2":
        return base + trained * 2, trained * 2 / shards, trained * 12 / shards, 0.0
    if job.rank:
        size = 4
    # with several processes DDP has a bucket for each gradient, beside it
    return base + trained * size, trained * size * (2 if shards > 1 else 1), trained * size * 2, 0.0
