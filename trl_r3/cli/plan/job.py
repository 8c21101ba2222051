"""What a job asks for: sizes of a rollout, GPUs and how the model is spread over them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..bad_input import BadInput

GB = 1e9
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3", "lora")


class PlanError(BadInput):
    """What cannot be planned, in one sentence."""


@dataclass(frozen=True)
class Job:
    """
    The settings of a job.

    Args:
        prompts, generations, tokens (`int`):
            Prompts of a rollout, completions of each, and tokens of each sample, the prompt included.
        micro_batch (`int`):
            Samples of a forward on each GPU.
        gpus, gpus_per_host (`int`):
            Processes, and how many of them share the memory of a host.
        strategy (`str`):
            `"ddp"`, `"fsdp2"`, `"zero2"`, `"zero3"`, or `"lora"`, which is `"ddp"` with adapters.
        lora_rank (`int`):
            Rank of adapters, with any strategy; 0 trains all weights.
        lora_target_modules (`str`):
            Modules with adapters, separated by commas, or `"all-linear"`, where PEFT takes the experts, too.
        load_in_4bit (`bool`):
            Whether bitsandbytes loads the base of LoRA.
        dtype (`str`):
            `"bfloat16"` or `"float32"`, that the weights are loaded in.
        gpu_memory, host_memory (`float`):
            GB of a GPU and of a host.
        reserve (`float`):
            Share of the GPU that is left to activations and logits.
        engine_share (`float`):
            Share of the GPU that a colocated vLLM takes (`vllm_gpu_memory_utilization`); 0 for a server.
        engine_tensor_parallel (`int`):
            GPUs that its copy of the weights is split over (`vllm_tensor_parallel_size`).
        bandwidth (`float`):
            GB a second from host to device.
        beta (`float`):
            TRL's `beta`: above 0, and without adapters, a reference model is loaded, too.
        spill (`bool`):
            Whether `routing_replay_spill_dir` is set.
        queue (`int`):
            Samples that the queue of asynchronous GRPO holds (`queue_maxsize`), on the first host; 0 for synchronous
            training.
        trust_remote_code (`bool`):
            Whether code that comes with the config is run.
    """

    prompts: int
    generations: int = 8
    tokens: int = 4096
    micro_batch: int = 1
    gpus: int = 1
    gpus_per_host: int = 8
    strategy: str = "ddp"
    lora_rank: int = 0
    lora_target_modules: str = "q_proj,k_proj,v_proj,o_proj"
    load_in_4bit: bool = False
    dtype: str = "bfloat16"
    gpu_memory: float = 80.0
    host_memory: float = 512.0
    reserve: float = 0.15
    engine_share: float = 0.0
    engine_tensor_parallel: int = 1
    bandwidth: float = 25.0
    beta: float = 0.0
    spill: bool = False
    queue: int = 0
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise PlanError(
                f"`--strategy` is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}: set `--strategy fsdp2`."
            )
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("lora_rank", "queue") else 1
            option = "--" + field.name.replace("_", "-")
            if field.type == "int" and value < least:
                raise PlanError(f"`{option}` is {value}, but it counts: set {least} or more.")
            if field.name in ("gpu_memory", "host_memory", "bandwidth") and not 0 < value < math.inf:
                raise PlanError(f"`{option}` is {value:g}, but it is a number of GB above 0.")
            if field.name == "beta" and not 0 <= value < math.inf:
                raise PlanError(f"`--beta` is {value:g}, but it weights a divergence: set 0 or more.")
            if field.name in ("reserve", "engine_share") and not 0 <= value < 1:
                raise PlanError(f"`{option}` is {value:g}, but it is a share from 0 to below 1.")
        if self.reserve + self.engine_share >= 1:
            raise PlanError(
                f"`--reserve` {self.reserve:g} and `--engine-share` {self.engine_share:g} leave nothing of the GPU: "
                "lower one of them."
            )
        if self.engine_tensor_parallel > 1 and not self.engine_share:
            raise PlanError(
                f"`--engine-tensor-parallel` is {self.engine_tensor_parallel}, but `--engine-share` is 0, so no "
                "engine is on these GPUs: set both, or neither."
            )
        if self.most_gpus_of_an_engine % self.engine_tensor_parallel:
            raise PlanError(
                f"`--engine-tensor-parallel` is {self.engine_tensor_parallel}, but it has to divide all "
                f"{self.gpus} GPUs and the {self.gpus_of_a_host} of a host: set a divisor, or `--gpus` to a multiple."
            )
        if self.load_in_4bit and not self.rank:
            raise PlanError("`--load-in-4bit` freezes what it quantizes, so it needs LoRA: add `--lora-rank 16`.")

    @property
    def gpus_of_a_host(self) -> int:
        """GPUs of the fullest host."""
        return min(self.gpus, self.gpus_per_host)

    @property
    def most_gpus_of_an_engine(self) -> int:
        """GPUs of a host that colocated engines can be split over, such that all engines are alike."""
        return math.gcd(self.gpus, self.gpus_of_a_host)

    @property
    def rank(self) -> int:
        """Rank of the adapters, 0 without."""
        return self.lora_rank or (16 if self.strategy == "lora" else 0)

    @property
    def has_reference(self) -> bool:
        """Whether TRL loads a reference model. With adapters it is the base."""
        return self.beta > 0 and not self.rank

    @property
    def bytes_of_a_weight(self) -> int:
        """As it is loaded."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def samples(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.generations

    @property
    def samples_of_a_rank(self) -> int:
        """Completions whose records one process keeps."""
        return -(-self.samples // self.gpus)
