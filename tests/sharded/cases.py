"""What runs in which launch: the trainings and commands that the tests ask for, by the name of each."""

from __future__ import annotations

import importlib.util

from sharded.launching import TORCHRUN, TRAIN, Case, Launch, accelerate_launch, of_config
from sharded.train_kinds import KINDS

VERIFY = "sharded.verify_sharded"
SYNC = "sharded.sync_sharded"
SHARDED = ["ddp", "fsdp2", "zero3"]
WAYS = {"full": [], "lora": ["--lora"]}
KEEPS = ["--checkpointing", "non-reentrant"]

# Both ways to gate and all ways to checkpoint occur with full training, with adapters, and with each kind of shards.
RUNS = {
    "ddp": ("ddp", "MULTI_CPU", "none", "op"),
    "fsdp2": ("fsdp2", "FSDP", "none", "intercept"),
    "fsdp2 and op": ("fsdp2", "FSDP", "non-reentrant", "op"),
    "fsdp2 checkpoints": ("fsdp2_activation_checkpointing", "FSDP", "none", "intercept"),
    "zero2": ("zero2", "DEEPSPEED", "non-reentrant", "op"),
    "zero3": ("zero3", "DEEPSPEED", "none", "intercept"),
    "zero3 and op": ("zero3", "DEEPSPEED", "reentrant", "op"),
}


def of_any_processes(config: str, url: str) -> dict[str, list]:
    """What is trained whether weights are sharded or not; the server at a URL answers some."""
    found = {f"{config} server {way}": ["--rollouts", "mock", "--url", url, *KEEPS, *WAYS[way]] for way in WAYS}
    found |= {f"{config} {rollouts}": ["--rollouts", rollouts, *KEEPS] for rollouts in ("own", "batching")}
    found |= {f"{config} unpadded {way}": ["--padding", "auto", *KEEPS, *WAYS[way]] for way in WAYS}
    return {**found, f"{config} masks": ["--masks", *KEEPS]}


def of_shards(config: str) -> dict[str, list]:
    """What is trained where weights are sharded."""
    resumable = ["--lora", "--optim", "adamw_torch"]  # PyTorch restores no optimizer that has no state
    checkpoint = f"{config} straight/checkpoint-2"  # in the folder that the launch runs in
    return {
        f"{config} own masks": ["--masks", "--rollouts", "own"],
        f"{config} straight": [*resumable, "--save-steps", 2],
        f"{config} resumed": [*resumable, "--resume", checkpoint],
    }


def trainings(config: str, url: str) -> list[Case]:
    """All of one config."""
    found = {
        f"{name} {way}": ["--checkpointing", checkpointing, "--gating", gating, *WAYS[way]]
        for name, (launched, _, checkpointing, gating) in RUNS.items()
        for way in WAYS
        if launched == config
    }
    if config == "single_gpu":
        found |= {"alone full": [], "alone lora": ["--lora"], "alone masks": ["--masks"], "alone without": []}
    if config in SHARDED:
        found |= of_any_processes(config, url)
    if config in ("fsdp2", "zero3"):
        found |= of_shards(config)
    if config == "fsdp2":
        found |= {"once": [], "twice": ["--twice"], "fails": ["--fails-on", 1]}
    if config == "zero3":
        found |= {"refused": ["--dense"]}
    syncs = synced(config, url) if config in ("single_gpu", *SHARDED) else []
    return [Case(name, TRAIN, options) for name, options in found.items()] + syncs


ADAPTED = {"attention": [], "experts": ["--experts"]}


def synced(config: str, url: str) -> list[Case]:
    """What sends the weights of adapters over a bfloat16 base."""
    options = [
        "--lora",
        "--dtype",
        "bfloat16",
        "--rollouts",
        "mock",
        "--url",
        url,
        *(["--bf16"] if config == "zero3" else []),
    ]
    return [Case(f"{config} synced {what}", SYNC, [*options, *ADAPTED[what]]) for what in ADAPTED]


def verified(name: str, model: str, *options: str, spoiled: int | str = "none") -> Case:
    """`trl-r3 verify`, where the routes of one rank may be spoiled."""
    return Case(f"verify {name}", VERIFY, [spoiled, "verify", model, *options])


VERIFIED = {
    "ddp": [
        verified("ddp", "model", "--json"),
        verified("continuous", "model", "--engine", "continuous"),
        verified("cuda", "model", "--device", "cuda"),
    ],
    "fsdp2": [
        verified("fsdp2", "model", "--json"),
        verified("fsdp2 adapter", "adapter", "--json"),
        *(verified(f"spoiled {rank}", "model", spoiled=rank) for rank in range(2)),
    ],
}


def attached() -> list[Case]:
    """Models that are sharded before replay is attached."""
    scripts = {"attached": "sharded.attach_sharded"}
    if importlib.util.find_spec("deepspeed") is not None:
        scripts["partitioned"] = "sharded.attach_zero3"
    pairs = [(name, gating) for name in scripts for gating in ("intercept", "op")]
    return [Case(f"{name} {gating}", scripts[name], [gating]) for name, gating in pairs]


def biased(config: str) -> list[Case]:
    """Routers with a selection bias, under every config of FSDP2."""
    return [Case(f"{config} biased", "sharded.train_biased", [])] if config.startswith("fsdp2") else []


ONE_OF_EACH = ["RLOO", "GRPO", "Distillation"]  # a sequence's ratio, turns, and hidden states of a student
KINDS_BY = {
    "single_gpu lora": list(KINDS),
    "ddp": list(KINDS),
    "fsdp2": ONE_OF_EACH,
    "fsdp2 lora": list(KINDS),
    "zero3": ONE_OF_EACH,
}


def of_kinds(config: str) -> list[Case]:
    """The other trainers, and GRPO with tools."""
    return [
        Case(f"{by} {kind}", "sharded.train_kinds", [kind, *(["--lora"] if "lora" in by else [])])
        for by, kinds in KINDS_BY.items()
        for kind in kinds
        if by.split()[0] == config
    ]


def asynchronous(config: str) -> list[Case]:
    """TRL's AsyncGRPO, which knows DDP and FSDP2."""
    options: dict[str, list] = {"async": [], "async error": ["--fails"], "async lora": ["--lora"]}
    known = {"ddp": ["async", "async error"], "fsdp2": list(options), "zero3": ["async"]}.get(config, [])
    if importlib.util.find_spec("aiohttp") is None:
        return []
    return [Case(f"{config} {name}", "trainers.two_async", options[name]) for name in known]


def launches(url: str) -> dict[str, Launch]:
    """Each config is launched once, as users launch it."""
    alone = trainings("single_gpu", url) + of_kinds("single_gpu")
    found = {"single_gpu": Launch(of_config("single_gpu", 1), alone, 1)}
    for config in ("ddp", "fsdp2", "fsdp2_activation_checkpointing", "zero2", "zero3"):
        more = VERIFIED.get(config, []) + biased(config) + of_kinds(config) + asynchronous(config)
        found[config] = Launch(of_config(config), trainings(config, url) + more)
    settings = ["--use_deepspeed", "--deepspeed_config_file", "zero3.json", "--zero3_init_flag", "true"]
    found["zero3.json"] = Launch(accelerate_launch(settings), [verified("zero3", "model", "--json")])
    return {**found, "attached": Launch(TORCHRUN, attached())}
