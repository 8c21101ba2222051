"""What the package relies on in TRL, Transformers, PEFT, Accelerate and PyTorch, and where: one line each.

A seam that has moved fails here, with the file of `trl_r3` to look at.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import accelerate
import accelerate.inference
import accelerate.utils
import peft
import pytest
import torch
import transformers
import trl
from model_zoo import build_tiny
from peft.tuners.glora import model as glora_model
from peft.tuners.hira import model as hira_model
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.road import model as road_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils import _python_dispatch, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.distributed import DistributedConfig
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, requests
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer, async_rollout_worker, packing
from trl.experimental.async_grpo import vllm_client as async_vllm_client
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.generation import vllm_client, vllm_generation
from trl.import_utils import is_vllm_available
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

import trl_r3
from trl_r3._compat import checkpoint_functions, implementations, swapped, uses_kernels
from trl_r3.routers._compat_routers import _OF_SHAPE
from trl_r3.trainers.construction import _NEEDED

PACKAGE = Path(trl_r3.__file__).parent
TRAINERS = (trl.GRPOTrainer, GMPOTrainer, trl.RLOOTrainer)
CONFIGS = (trl.GRPOConfig, GMPOConfig, trl.RLOOConfig)
STUDENTS = (trl.DistillationTrainer, SDPOTrainer, IWOPDTrainer)
STUDENT_CONFIGS = (trl.DistillationConfig, SDPOConfig, IWOPDConfig)
HOOKS_OF_SHAPE = (
    neftune_post_forward_hook,
    lora_model._alora_offsets_pre_forward_hook,
    *(each._adapter_names_pre_forward_hook for each in (lora_model, road_model, glora_model, hira_model)),
)
CLIENT, GENERATION = vllm_client.VLLMClient, vllm_generation.VLLMGeneration
ASYNC_TRAINER = async_grpo_trainer.AsyncGRPOTrainer
WORKER, LOOP = async_rollout_worker.AsyncRolloutWorker, async_rollout_worker._AsyncRolloutLoop
PROCESSOR = continuous_api.ContinuousBatchProcessor


def takes(function: Callable, *names: str) -> bool:
    """Whether it has these parameters; `*` ends those that have to come first, in this order."""
    own = [name for name in inspect.signature(function).parameters if name != "self"]
    first = names[: names.index("*")] if "*" in names else ()
    rest = names[len(first) + 1 :] if first else names
    return own[: len(first)] == list(first) and set(rest) <= set(own)


def tree(thing) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def sets(owner: type, *names: str) -> bool:
    """Whether its methods, or those of its parents, assign these attributes of `self`."""
    stores = {
        node.attr
        for each in owner.__mro__[:-1]
        if each.__module__.split(".")[0] in ("trl", "transformers")
        for node in ast.walk(tree(each))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return set(names) <= stores | set(dir(owner))


def says(function: Callable, *texts: str) -> bool:
    """Whether these are string constants of its code: keys of what it returns or reads."""
    return set(texts) <= {node.value for node in ast.walk(tree(function)) if isinstance(node, ast.Constant)}


def calls(function: Callable, *names: str) -> bool:
    """Whether its code mentions these attributes, in this order."""
    found = [node for node in ast.walk(tree(function)) if isinstance(node, ast.Attribute) and node.attr in names]
    found.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
    return list(dict.fromkeys(node.attr for node in found)) == list(names)


def returns(function: Callable, *names: str) -> bool:
    """Whether every `return` of its own gives a tuple that begins with variables of these names."""
    (definition,) = tree(function).body
    inner = [node for node in ast.walk(definition) if isinstance(node, ast.FunctionDef) and node is not definition]
    nested = {id(each) for node in inner for each in ast.walk(node)}
    found = [node.value for node in ast.walk(definition) if isinstance(node, ast.Return) and id(node) not in nested]
    tuples = [[getattr(item, "id", None) for item in each.elts] for each in found if isinstance(each, ast.Tuple)]
    return len(tuples) == len(found) > 0 and all(each[: len(names)] == list(names) for each in tuples)


def fields(owner: type, *names: str) -> bool:
    return set(names) <= {field.name for field in dataclasses.fields(owner)}


def checkpointed(by: str) -> bool:
    """Whether the function that checkpoints is kept where it is replaced, on the module itself."""
    if by == "checkpoint_fn":
        modules = [checkpoint_wrapper(torch.nn.Linear(1, 1))]
    else:
        model = build_tiny("qwen3_moe").train()
        assert not checkpoint_functions(model.modules())
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        modules = [layer for layer in model.modules() if type(layer).__name__.endswith("DecoderLayer")]
    return bool(modules) and [name for _, name, _ in checkpoint_functions(modules)] == [by] * len(modules)


def kernels_are_seen() -> bool:
    model = build_tiny("qwen3_moe")
    before = uses_kernels(model)
    model._use_kernels = True
    return not before and model.use_kernels is True


def compiled_calls_are_seen() -> bool:
    module = torch.nn.Linear(1, 1)
    before = module._compiled_call_impl
    module.compile(backend="eager")
    return before is None and module._compiled_call_impl is not None


def offloading_is_seen() -> bool:
    """Whether Accelerate says on a module where it runs, and runs it by a forward or hooks of its own."""
    (embedding,) = model = torch.nn.Sequential(torch.nn.Embedding(2, 2))
    accelerate.cpu_offload(model)
    fetched = "forward" in vars(embedding) or bool(embedding._forward_pre_hooks)
    return embedding.weight.is_meta and fetched and embedding._hf_hook.execution_device is not None


def hooks_on_all_modules_are_held() -> bool:
    modules = torch.nn.modules.module
    handles = modules.register_module_forward_hook(print), modules.register_module_forward_pre_hook(print)
    held = modules._global_forward_hooks.keys(), modules._global_forward_pre_hooks.keys()
    try:
        return all(handle.id in ids for handle, ids in zip(handles, held, strict=True))
    finally:
        for handle in handles:
            handle.remove()


def head_is_called() -> bool:
    """
    Whether TRL's scoring forward looks its function up on each call, and hands over nine arguments in this order.
    """
    model, seen = build_tiny("qwen3_moe"), []
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))

    class Function:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
            seen.append((hidden.shape[0], weight is model.lm_head.weight, bias, targets.shape, temperature, softcap))
            seen.append((logit_scale, outputs))
            return torch.zeros(hidden.shape[0]), torch.zeros(hidden.shape[0]), None, None, None

    ids = torch.arange(2, 8)[None]
    with swapped(trl.trainer.utils, "_ChunkedLogProbFunction", Function):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    return seen == [(5, True, None, (5,), 0.5, None), (1.0, ("log_probs", "entropy"))]


def imports(module, name: str, source: str) -> bool:
    """Whether a module takes a name from another one, be that installed or not."""
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
    return any(node.module == source and name in [alias.name for alias in node.names] for node in nodes)


def zero_says(module: str, text: str) -> bool:
    """Whether a file of DeepSpeed's ZeRO has this text, where it is installed. Importing it would patch PyTorch."""
    found = find_spec("deepspeed")
    if found is None:
        return True
    (package,) = found.submodule_search_locations
    return text in (Path(package) / "runtime" / "zero" / f"{module}.py").read_text()


def attention_is_looked_up() -> bool:
    """Whether a forward takes the attention that its config names then."""
    model, seen, own = build_tiny("qwen3_moe"), [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["seen"] = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)
    try:
        model.config._attn_implementation = "seen"
        model(input_ids=torch.arange(2, 8)[None])
    finally:
        del ALL_ATTENTION_FUNCTIONS["seen"]
    return bool(seen)


@dataclass(frozen=True)
class Seam:
    """What has to be there, and the file that relies on it."""

    file: str
    what: str
    is_there: Callable[[], bool]


LIFE = ("_prepare_for_training", "_prepare_inputs", "training_step", "prediction_step", "train")


def gives_beside_tokens(trainer, *names):
    taken = {*inspect.signature(getattr(trainer, SCORES)).parameters} - {"self", "compute_entropy", "compute_aux_loss"}
    return taken == {*names, *SCORE_BEGINS} - {"*"} and says(trainer._generate_and_score_completions, *names)


GENERATE = transformers.GenerationMixin.generate
SCORES = "_get_per_token_logps_and_entropies"
SCORE_BEGINS = ("model", "input_ids", "attention_mask", "logits_to_keep", "*", "batch_size")
DECODING = "num_beams prompt_lookup_num_tokens assistant_early_exit use_mtp guidance_scale use_cache pad_token_id"
DECODING += " cache_implementation disable_compile eos_token_id stop_strings max_time return_dict_in_generate"
BATCHING = "allow_block_sharing use_async_batching use_cuda_graph varlen_compile_config decode_compile_config"
BATCHING += " default_compile_level"
STATE = "use_vllm use_transformers_continuous_batching continuous_batching_config generation_config temperature"
STATE += " pad_to_multiple_of model model_wrapped accelerator ref_model vllm_mode vllm_generation state args"
SETTINGS = "torch_compile model_init_kwargs gradient_accumulation_steps steps_per_generation num_iterations use_vllm"
SETTINGS += " vllm_mode vllm_tensor_parallel_size gradient_checkpointing_kwargs per_device_train_batch_size"
SETTINGS += " generation_kwargs temperature top_p top_k min_p repetition_penalty"
BESIDE_TOKENS = "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes"
BESIDE_TOKENS += " token_type_ids mm_token_type_ids image_position_ids"
BATCH = "prompt_ids prompt_mask completion_ids completion_mask"
STUDENT_STATE = "use_vllm generation_config temperature model model_wrapped accelerator state args _buffered_inputs"
STUDENT_SETTINGS = "torch_compile model_init_kwargs gradient_accumulation_steps use_vllm vllm_mode"
STUDENT_SETTINGS += " vllm_tensor_parallel_size per_device_train_batch_size"

SEAMS = [
    *(
        Seam(
            "trainers/lifecycle.py" if name in LIFE else "trainers/mixin.py",
            f"{trainer.__name__}.{name}",
            lambda t=trainer, n=name: hasattr(t, n),
        )
        for trainer in TRAINERS
        for name in (*_NEEDED, "train")
    ),
    *(
        Seam("trainers/checkpoints.py", f"Trainer.{name}", lambda n=name: hasattr(transformers.Trainer, n))
        for name in ("_load_from_checkpoint", "_load_best_model", "_issue_warnings_after_load")
    ),
    *(
        seam
        for trainer in TRAINERS
        for seam in (
            Seam(
                "trainers/mixin.py",
                f"{trainer.__name__}.{SCORES}({', '.join(SCORE_BEGINS)})",
                lambda t=trainer: takes(getattr(t, SCORES), *SCORE_BEGINS),
            ),
            Seam(
                "trainers/mixin.py",
                f"{trainer.__name__}._generate_single_turn(prompt_ids, images, multimodal_fields)",
                lambda t=trainer: takes(t._generate_single_turn, "prompt_ids", "images", "multimodal_fields", "*"),
            ),
            Seam(
                "trainers/mixin.py",
                f"{trainer.__name__}._generate returns prompt_ids, completion_ids first",
                lambda t=trainer: returns(t._generate, "prompt_ids", "completion_ids"),
            ),
            Seam(
                "trainers/construction.py",
                f"{trainer.__name__}._compute_loss(model, inputs)",
                lambda t=trainer: takes(t._compute_loss, "model", "inputs", "*"),
            ),
            Seam(
                "trainers/lifecycle.py",
                f"{trainer.__name__}.log(logs, start_time)",
                lambda t=trainer: takes(t.log, "logs", "start_time", "*"),
            ),
            Seam(
                "trainers/lifecycle.py",
                f"{trainer.__name__}._paper, _name and _tag_names",
                lambda t=trainer: all(hasattr(t, name) for name in ("_paper", "_name", "_tag_names")),
            ),
            Seam(
                "engines/turns.py",
                f"{trainer.__name__} sets {STATE}",
                lambda t=trainer: sets(t, *STATE.split()),
            ),
            Seam(
                "engines/generate.py",
                f"{trainer.__name__} cuts what `generate` returns behind the first of its eos_token_ids",
                lambda t=trainer: calls(t._generate_single_turn, "isin", "eos_token_ids"),
            ),
            Seam(
                "trainers/_compat_trainers.py",
                f"{trainer.__name__} gives a forward {BESIDE_TOKENS}, and nothing else beside tokens",
                lambda t=trainer: gives_beside_tokens(t, *BESIDE_TOKENS.split()),
            ),
            Seam(
                "trainers/live_comparison.py",
                f"{trainer.__name__} scores a batch of {BATCH}",
                lambda t=trainer: says(t._generate_and_score_completions, *BATCH.split()),
            ),
        )
    ),
    *(
        Seam("trainers/config.py", f"{config.__name__} has {SETTINGS}", lambda c=config: fields(c, *SETTINGS.split()))
        for config in CONFIGS
    ),
    Seam(
        "trainers/config.py",
        "GRPOConfig.vllm_importance_sampling_correction",
        lambda: fields(trl.GRPOConfig, "vllm_importance_sampling_correction"),
    ),
    Seam(
        "trainers/config.py",
        "GRPOTrainer skips the old-policy forward by gradient_accumulation_steps % generate_every",
        lambda: "generate_every" in inspect.getsource(trl.GRPOTrainer._generate_and_score_completions),
    ),
    Seam(
        "_compat.py",
        "GRPOTrainer._generate returns extra_fields sixth",
        lambda: returns(
            trl.GRPOTrainer._generate,
            "prompt_ids",
            "completion_ids",
            "tool_mask",
            "completions",
            "logprobs",
            "extra_fields",
        ),
    ),
    *(
        Seam(
            "_compat.py",
            f"{trainer.__name__} sets _buffered_inputs",
            lambda t=trainer: sets(t, "_buffered_inputs"),
        )
        for trainer in TRAINERS
    ),
    *(
        Seam(
            "engines/turns.py",
            f"{student.__name__} sets {STUDENT_STATE}",
            lambda t=student: sets(t, *STUDENT_STATE.split()),
        )
        for student in STUDENTS
    ),
    *(
        Seam(
            "trainers/construction.py",
            f"{config.__name__} has {STUDENT_SETTINGS}",
            lambda c=config: fields(c, *STUDENT_SETTINGS.split()),
        )
        for config in STUDENT_CONFIGS
    ),
    *(
        Seam("trainers/mixin.py", f"DistillationTrainer.{name}", lambda n=name: hasattr(trl.DistillationTrainer, n))
        for name in ("_generate_single_turn", "_generate_and_score_completions", "_compute_loss")
    ),
    Seam(
        "trainers/mixin.py",
        "DistillationTrainer._generate returns prompt_ids, completion_ids first",
        lambda: returns(trl.DistillationTrainer._generate, "prompt_ids", "completion_ids"),
    ),
    Seam(
        "trainers/distillation.py",
        "DistillationTrainer._get_last_hidden_state(unwrapped_model, input_ids, attention_mask, logits_to_keep) "
        "scores the student with a graph and its teacher under no_grad",
        lambda: (
            takes(
                trl.DistillationTrainer._get_last_hidden_state,
                "unwrapped_model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "*",
            )
            and calls(trl.DistillationTrainer._compute_loss, "_get_last_hidden_state", "no_grad")
        ),
    ),
    Seam(
        "trainers/sdpo.py",
        "SDPOTrainer._forward_logits(model, input_ids, attention_mask, logits_to_keep) scores old policy, student, "
        "and its teacher under no_grad",
        lambda: (
            takes(SDPOTrainer._forward_logits, "model", "input_ids", "attention_mask", "logits_to_keep")
            and calls(SDPOTrainer._compute_rollout_logps, "no_grad", "_forward_logits")
            and calls(SDPOTrainer._compute_teacher_student_logits, "_forward_logits", "no_grad")
        ),
    ),
    Seam(
        "trainers/sdpo.py",
        "SDPOTrainer._generate(prompt_ids) returns prompts and completions, _prepare_training_batch(inputs) a batch",
        lambda: (
            takes(SDPOTrainer._generate, "prompt_ids")
            and takes(SDPOTrainer._prepare_training_batch, "inputs")
            and says(SDPOTrainer.sample_rollouts, *BATCH.split(), "old_per_token_logps")
        ),
    ),
    Seam(
        "trainers/iw_opd.py",
        "IWOPDTrainer._generate_student_completions(slices, on_policy_indices) fills the buffer, slice by slice",
        lambda: (
            takes(IWOPDTrainer._generate_student_completions, "slices", "on_policy_indices")
            and says(IWOPDTrainer._generate_with_model, "prompts", "input_ids", "attention_mask")
            and sets(IWOPDTrainer, "lmbda")
        ),
    ),
    Seam(
        "trainers/iw_opd.py",
        "IWOPDTrainer.compute_loss(model, inputs) calls model for the student alone",
        lambda: (
            inspect.getsource(IWOPDTrainer.compute_loss).count(" model(") == 1
            and "self.teacher_model(" in inspect.getsource(IWOPDTrainer._get_teacher_logits)
        ),
    ),
    Seam("trainers/mixin.py", "GRPOTrainer sets rollout_func", lambda: sets(trl.GRPOTrainer, "rollout_func")),
    Seam(
        "trainers/mixin.py",
        "GRPOTrainer._generate_single_turn returns completion_ids, logprobs",
        lambda: returns(trl.GRPOTrainer._generate_single_turn, "completion_ids", "logprobs"),
    ),
    Seam(
        "trainers/log.py",
        "GRPOTrainer scores a batch with tool_mask and sampling_per_token_logps",
        lambda: says(trl.GRPOTrainer._generate_and_score_completions, "tool_mask", "sampling_per_token_logps"),
    ),
    Seam(
        "trainers/session.py",
        "GRPOTrainer scores a batch with old_per_token_logps",
        lambda: says(trl.GRPOTrainer._generate_and_score_completions, "old_per_token_logps"),
    ),
    Seam(
        "trainers/session.py",
        "RLOOTrainer scores a batch with old_logps",
        lambda: says(trl.RLOOTrainer._generate_and_score_completions, "old_logps"),
    ),
    Seam(
        "trainers/mixin.py",
        "trl.models.utils.disable_gradient_checkpointing(model, gradient_checkpointing_kwargs)",
        lambda: takes(disable_gradient_checkpointing, "model", "gradient_checkpointing_kwargs", "*"),
    ),
    Seam(
        "_compat.py",
        "trl.trainer.utils calls _ChunkedLogProbFunction.apply by name, with the head gathered",
        head_is_called,
    ),
    *(
        Seam(
            "masks/restricted_head.py",
            f"{trainer.__name__} scores model(labels=labels, fused_lm_head=True)",
            lambda t=trainer: "labels=labels, fused_lm_head=True)" in inspect.getsource(getattr(t, SCORES)),
        )
        for trainer in (trl.GRPOTrainer, trl.RLOOTrainer)
    ),
    Seam(
        "masks/kept_logprobs.py",
        "trl.trainer.utils.maybe_gather_lm_head_ctx(*params)",
        lambda: takes(maybe_gather_lm_head_ctx, "params"),
    ),
    Seam(
        "engines/_compat_engines.py",
        "GenerationMixin._get_logits_processor makes the list of one generate, and of continuous batching",
        lambda: (
            "self._get_logits_processor(" in inspect.getsource(GENERATE)
            and "_get_logits_processor(generation_config)" in inspect.getsource(continuous_api)
        ),
    ),
    Seam(
        "engines/_compat_engines.py",
        "GenerationMixin._get_stopping_criteria makes the list that tells which sequences are fed padding",
        lambda: (
            "self._get_stopping_criteria(" in inspect.getsource(GENERATE)
            and all(
                text in inspect.getsource(transformers.GenerationMixin._sample)
                for text in (
                    'any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)',
                    "unfinished_sequences & ~stopping_criteria(input_ids, scores)",
                    "next_tokens * unfinished_sequences + pad_token_id * (1 - unfinished_sequences)",
                )
            )
        ),
    ),
    Seam(
        "engines/_compat_engines.py",
        "ContinuousBatchProcessor.model_runner, ModelRunner._sample(scores, output_ids)",
        lambda: (
            sets(PROCESSOR, "model_runner")
            and takes(model_runner.ModelRunner._sample, "scores", "output_ids", "*")
            and "self._sample(scores, output_ids)" in inspect.getsource(model_runner)
        ),
    ),
    Seam(
        "engines/vllm_server.py",
        "trl.generation.vllm_generation takes VLLMClient by name",
        lambda: vllm_generation.VLLMClient is CLIENT and " VLLMClient(" in inspect.getsource(GENERATION),
    ),
    Seam(
        "engines/vllm_colocate.py",
        "trl.generation.vllm_generation takes LLM by name, from vllm",
        lambda: imports(vllm_generation, "LLM", "vllm") and " LLM(" in inspect.getsource(GENERATION),
    ),
    Seam(
        "engines/_compat_engines.py",
        "VLLMGeneration calls llm.sleep(level=2) without a mode, and keeps the engine in llm",
        lambda: "self.llm.sleep(level=2)" in inspect.getsource(GENERATION),
    ),
    Seam(
        "engines/vllm_colocate.py",
        "VLLMGeneration sets llm, vllm_client, tensor_parallel_size and tp_group",
        lambda: sets(GENERATION, "llm", "vllm_client", "tensor_parallel_size", "tp_group"),
    ),
    Seam(
        "engines/vllm_server.py",
        "VLLMClient.generate with features asks /inference/v1/generate through _post, `sampling_params` in the body",
        lambda: (
            "_generate_from_features" in CLIENT.generate.__code__.co_names
            and all(
                part in inspect.getsource(CLIENT._generate_from_features)
                for part in ("self._post(", "/inference/v1/generate", '"sampling_params": sampling_params')
            )
        ),
    ),
    Seam(
        "engines/vllm_server.py",
        "VLLMClient.generate puts generation_kwargs among the sampling parameters, those into the body",
        lambda: all(
            part in inspect.getsource(CLIENT.generate)
            for part in ("sampling_params.update(generation_kwargs or {})", "**sampling_params,")
        ),
    ),
    Seam(
        "engines/vllm_server.py",
        "VLLMClient._get(url), ._post(url), .get_server_info(), .generate(prompts, features)",
        lambda: (
            takes(CLIENT._get, "url", "*")
            and takes(CLIENT._post, "url", "*")
            and takes(CLIENT.get_server_info)
            and takes(CLIENT.generate, "prompts", "*", "features")
        ),
    ),
    Seam(
        "engines/vllm_server.py",
        "VLLMClient sets base_url and model, and asks through _post",
        lambda: sets(CLIENT, "base_url", "model") and "_post" in CLIENT.generate.__code__.co_names,
    ),
    Seam(
        "engines/weight_sync.py",
        "VLLMGeneration.sync_weights reads named_parameters between merge_adapter and unmerge_adapter",
        lambda: (
            "_iter_named_params" in GENERATION.sync_weights.__code__.co_names
            and calls(GENERATION._iter_named_params, "merge_adapter", "named_parameters", "unmerge_adapter")
            and calls(GENERATION._iter_fsdp2_params, "named_parameters", "full_tensor")
        ),
    ),
    Seam(
        "engines/weight_sync.py",
        "BaseTuner.merge_adapter(adapter_names), BaseTunerLayer.merge() and get_base_layer()",
        lambda: (
            takes(BaseTuner.merge_adapter, "adapter_names", "*")
            and callable(BaseTunerLayer.merge)
            and callable(BaseTunerLayer.get_base_layer)
        ),
    ),
    Seam(
        "engines/_compat_engines.py",
        "BaseTunerLayer.merged_adapters, LoraLayer._caches",
        lambda: all(
            f"self.{name}" in inspect.getsource(LoraLayer.__init__) for name in ("merged_adapters", "_caches")
        ),
    ),
    Seam(
        "trainers/construction.py",
        "trl.import_utils.is_vllm_available",
        lambda: takes(is_vllm_available),
    ),
    Seam(
        "_compat.py",
        "Transformers keeps _gradient_checkpointing_func on each decoder layer",
        lambda: checkpointed("_gradient_checkpointing_func"),
    ),
    Seam("_compat.py", "torch.distributed keeps checkpoint_fn", lambda: checkpointed("checkpoint_fn")),
    Seam("_compat.py", "PreTrainedModel._use_kernels", kernels_are_seen),
    Seam(
        "_compat.py",
        "PreTrainedConfig._attn_implementation, ._experts_implementation",
        lambda: implementations(build_tiny("qwen3_moe"))[0] in ("sdpa", "eager"),
    ),
    Seam(
        "traces/trace_replay.py",
        "trl.trainer.utils.add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)",
        lambda: takes(add_fused_lm_head, "model", "*", "temperature", "cast_lm_head_to_fp32", "outputs"),
    ),
    *(
        Seam(
            "traces/trace_replay.py",
            f"{trainer.__name__} scores with fused_lm_head=True and outputs log_probs, entropy",
            lambda t=trainer: "fused_lm_head=True" in inspect.getsource(getattr(t, SCORES)),
        )
        for trainer in (trl.GRPOTrainer, trl.RLOOTrainer)
    ),
    Seam("_compat.py", "torch.nn.Module._compiled_call_impl", compiled_calls_are_seen),
    Seam("_compat.py", "accelerate.cpu_offload sets _hf_hook.execution_device", offloading_is_seen),
    Seam("_compat.py", "torch.distributed.fsdp.FSDPModule.reshard()", lambda: takes(FSDPModule.reshard)),
    *(
        Seam("_compat.py", f"deepspeed.runtime.zero.{module} has {text}", lambda m=module, t=text: zero_says(m, t))
        for module, text in (
            ("parameter_offload", "self.module.register_forward_pre_hook(_start_of_forward_hook)"),
            ("parameter_offload", "def get_param_coordinator(self)"),
            ("partition_parameters", "param.ds_id = "),
            ("partitioned_param_coordinator", "def is_invalid_trace(self)"),
            ("partitioned_param_coordinator", "def _invalidate_trace(self)"),
        )
    ),
    Seam(
        "_compat.py",
        "transformers.distributed.DistributedConfig has pp_size, accelerate.prepare_pippy sets hf_split_points",
        lambda: (
            fields(DistributedConfig, "pp_size")
            and "hf_split_points" in inspect.getsource(accelerate.inference.prepare_pippy)
        ),
    ),
    Seam(
        "routers/probe.py",
        "torch.nn.Module._forward_pre_hooks holds the hooks that fetch weights",
        lambda: torch.nn.Linear(1, 1)._forward_pre_hooks == {},
    ),
    Seam(
        "_compat.py",
        "torch.nn.Module._forward_hooks and _forward_pre_hooks hold hooks by the ids of their handles",
        lambda: (
            [*(module := torch.nn.Linear(1, 1))._forward_hooks] == []
            and (_handle := module.register_forward_hook(print)).id in module._forward_hooks
        ),
    ),
    Seam(
        "_compat.py",
        "torch.nn.modules.module._global_forward_hooks and _global_forward_pre_hooks hold those on all modules",
        hooks_on_all_modules_are_held,
    ),
    Seam("_compat.py", "torch._dynamo.OptimizedModule", lambda: isinstance(torch._dynamo.OptimizedModule, type)),
    Seam("records/samples.py", "torch.Tensor._version", lambda: torch.zeros(1).add_(1)._version == 1),
    Seam(
        "_compat.py",
        "PreTrainedConfig._attn_implementation names an entry of ALL_ATTENTION_FUNCTIONS",
        lambda: build_tiny("qwen3_moe").config._attn_implementation in ALL_ATTENTION_FUNCTIONS,
    ),
    Seam(
        "routers/packing.py",
        "create_causal_mask asks ALL_MASK_ATTENTION_FUNCTIONS with the mask_function",
        lambda: "mask_function" in {k.arg for k in ast.walk(tree(create_causal_mask)) if isinstance(k, ast.keyword)},
    ),
    Seam("_compat.py", "torch._C._current_graph_task_id", lambda: torch._C._current_graph_task_id() == -1),
    Seam(
        "_compat.py",
        "torch._C._functorch.get_interpreter_stack",
        lambda: torch.vmap(lambda x: x + len(torch._C._functorch.get_interpreter_stack()))(torch.zeros(1)) == 1,
    ),
    Seam("_compat.py", "torch._C._len_torch_dispatch_stack", lambda: torch._C._len_torch_dispatch_stack() == 0),
    Seam(
        "_compat.py",
        "torch.utils._python_dispatch._get_current_dispatch_mode_stack and _disable_current_modes",
        lambda: not _python_dispatch._get_current_dispatch_mode_stack() and _python_dispatch._disable_current_modes,
    ),
    Seam(
        "_compat.py",
        "torch.utils.checkpoint._CachingTorchDispatchMode and _CachedTorchDispatchMode, one each of a pair",
        lambda: (
            [type(each).__name__ for each in create_selective_checkpoint_contexts([])]
            == [checkpoint._CachingTorchDispatchMode.__name__, checkpoint._CachedTorchDispatchMode.__name__]
        ),
    ),
    Seam(
        "gating/native.py",
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        lambda: torch._C._dispatch_has_kernel_for_dispatch_key("aten::topk", "CPU"),
    ),
    Seam(
        "routers/gated.py",
        "torch.nn.modules.dropout._DropoutNd",
        lambda: issubclass(torch.nn.Dropout, torch.nn.modules.dropout._DropoutNd),
    ),
    Seam(
        "_compat.py",
        "AutoModelForCausalLM._model_mapping",
        lambda: transformers.Qwen3MoeConfig in transformers.AutoModelForCausalLM._model_mapping,
    ),
    Seam(
        "_compat.py",
        "PeftModel.active_adapters, .peft_config[...].is_prompt_learning, BaseTunerLayer.disable_adapters",
        lambda: (
            hasattr(peft.PeftModel, "active_adapters")
            and hasattr(peft.LoraConfig, "is_prompt_learning")
            and hasattr(BaseTunerLayer, "disable_adapters")
        ),
    ),
    Seam(
        "routers/_compat_routers.py",
        "hooks whose __module__ and __qualname__ are those of neftune and of PEFT's LoRA",
        lambda: {f"{hook.__module__}.{hook.__qualname__}" for hook in HOOKS_OF_SHAPE} == _OF_SHAPE,
    ),
    Seam(
        "routers/attachable.py",
        "accelerate.utils.extract_model_from_parallel(model, keep_torch_compile)",
        lambda: takes(accelerate.utils.extract_model_from_parallel, "model", "*", "keep_torch_compile"),
    ),
    Seam(
        "trainers/log.py",
        "accelerate.utils.gather_object",
        lambda: takes(accelerate.utils.gather_object, "object"),
    ),
    Seam(
        "trainers/log.py",
        "Accelerator.reduce(tensor, reduction)",
        lambda: takes(accelerate.Accelerator.reduce, "tensor", "*", "reduction"),
    ),
    Seam(
        "trainers/async_worker.py",
        "async_rollout_worker._SampleBuilder, taken by name: tokens, append_turn(turn, kind), to_training_sequence",
        lambda: (
            "_SampleBuilder(fork_threshold)" in inspect.getsource(async_rollout_worker._chain_to_sequences)
            and takes(async_rollout_worker._SampleBuilder.append_turn, "turn", "kind", "*")
            and takes(async_rollout_worker._SampleBuilder.to_training_sequence, "rollout_id", "*")
            and "self.tokens: list[int] = []" in inspect.getsource(async_rollout_worker._SampleBuilder)
        ),
    ),
    Seam(
        "trainers/async_worker.py",
        "async_rollout_worker.RolloutSample, .TrainingSequence and .TurnRecord are data",
        lambda: (
            fields(async_rollout_worker.RolloutSample, "input_ids", "model_version")
            and fields(async_rollout_worker.TrainingSequence, "input_ids")
            and fields(async_rollout_worker.TurnRecord, "prompt_ids", "output_ids")
        ),
    ),
    *(
        Seam("trainers/async_worker.py", f"_AsyncRolloutLoop.{what}", is_there)
        for what, is_there in (
            (
                "_post(path, payload), asked for /v1/completions with a prompt",
                lambda: (
                    takes(LOOP._post, "path", "payload", "*")
                    and says(LOOP._generate_one_turn, "/v1/completions", "prompt", "token_ids", "choices")
                ),
            ),
            (
                "_generate_one is a task of its own for each conversation",
                lambda: calls(LOOP._generate_loop, "create_task", "_generate_one"),
            ),
            (
                "_score_group(group) gives a sample for each of completions_sequences, in order",
                lambda: (
                    takes(LOOP._score_group, "group", "*")
                    and all(
                        text in inspect.getsource(LOOP._score_group)
                        for text in ("group.completions_sequences,", "for seq in sequences:", "samples.append(")
                    )
                ),
            ),
            (
                "run(), model_version and rollout_buffer",
                lambda: takes(LOOP.run) and sets(LOOP, "rollout_buffer", "model_version"),
            ),
        )
    ),
    Seam(
        "trainers/async_session.py",
        "AsyncRolloutWorker._loop_cls is what the rollout process is made of",
        lambda: "self._loop_cls," in inspect.getsource(WORKER.start),
    ),
    Seam(
        "trainers/async_construction.py",
        "AsyncRolloutWorker._loop_kwargs, with harness_session_factory and harness_adapter of a harness",
        lambda: (
            sets(WORKER, "_loop_kwargs")
            and all(
                name in (Path(async_rollout_worker.__file__).parent / "openenv_harness.py").read_text()
                for name in ("harness_session_factory", "harness_adapter", "_loop_cls = _HarnessRolloutLoop")
            )
        ),
    ),
    Seam(
        "trainers/_compat_trainers.py",
        "AsyncRolloutWorker._process is the rollout process, which stop() looks for",
        lambda: "if self._process is None:" in inspect.getsource(WORKER.stop),
    ),
    Seam(
        "trainers/async_session.py",
        "async_grpo_trainer takes RolloutQueueDataset and DataCollatorForRollout by name in get_train_dataloader",
        lambda: (
            {"RolloutQueueDataset", "DataCollatorForRollout"}
            <= set(ASYNC_TRAINER.get_train_dataloader.__code__.co_names)
        ),
    ),
    Seam(
        "trainers/async_queue.py",
        "RolloutQueueDataset reads queue.get and yields input_ids, completion_mask",
        lambda: (
            "self.queue.get(" in inspect.getsource(async_grpo_trainer.RolloutQueueDataset)
            and says(async_grpo_trainer.RolloutQueueDataset.__iter__, "input_ids", "completion_mask")
        ),
    ),
    Seam(
        "trainers/async_queue.py",
        "TreeRow.pack() gives tokens[node] as input_ids; TreeRow sets tokens, samples, sample_nodes",
        lambda: (
            all(f"self.{name}: list" in inspect.getsource(packing.TreeRow) for name in ("tokens", "sample_nodes"))
            and "input_ids.append(self.tokens[node])" in inspect.getsource(packing.TreeRow.pack)
        ),
    ),
    Seam(
        "trainers/async_queue.py",
        "DataCollatorForRollout.torch_call(examples) packs one micro-batch of rows",
        lambda: (
            takes(async_grpo_trainer.DataCollatorForRollout.torch_call, "examples", "*")
            and "(rows,) = examples" in inspect.getsource(async_grpo_trainer.DataCollatorForRollout)
        ),
    ),
    *(
        Seam("trainers/async_grpo.py", f"AsyncGRPOTrainer.{name}", lambda n=name: hasattr(ASYNC_TRAINER, n))
        for name in (
            *(
                "_sync_weight",
                "_sync_weight_merged",
                "compute_loss",
                "training_step",
                "log",
                "train",
                "get_train_dataloader",
            ),
            *("_prepare_for_training", "_load_from_checkpoint", "_paper", "_name", "_tag_names"),
        )
    ),
    Seam(
        "trainers/async_session.py",
        "AsyncGRPOTrainer sets rollout_worker and model_version",
        lambda: sets(ASYNC_TRAINER, "rollout_worker", "vllm_client", "model_version"),
    ),
    Seam(
        "trainers/async_session.py",
        "AsyncGRPOTrainer sets weight_transfer, and reads named_parameters between merge_adapter and unmerge_adapter",
        lambda: (
            sets(ASYNC_TRAINER, "weight_transfer")
            and calls(ASYNC_TRAINER._sync_weight_merged, "merge_adapter", "send_weights", "unmerge_adapter")
            and calls(async_grpo_trainer._iter_vllm_named_params, "named_parameters")
        ),
    ),
    Seam(
        "trainers/async_grpo.py",
        "AsyncGRPOTrainer sets vllm_client; PreTrainedConfig._name_or_path is what the server serves",
        lambda: sets(ASYNC_TRAINER, "vllm_client") and build_tiny("qwen3_moe").config._name_or_path == "",
    ),
    Seam(
        "trainers/async_construction.py",
        "VLLMClient of async_grpo: server_url, wait_for_server_ready(), get_server_info()",
        lambda: (
            sets(async_vllm_client.VLLMClient, "server_url")
            and takes(async_vllm_client.VLLMClient.get_server_info)
            and callable(async_vllm_client.VLLMClient.wait_for_server_ready)
        ),
    ),
    Seam(
        "trainers/async_construction.py",
        "AsyncGRPOConfig has top_p, top_k, min_p, repetition_penalty, temperature",
        lambda: fields(AsyncGRPOConfig, "top_p", "top_k", "min_p", "repetition_penalty", "temperature"),
    ),
    Seam(
        "trainers/_compat_trainers.py",
        "PreTrainedConfig._attn_implementation is read in each forward",
        lambda: attention_is_looked_up(),
    ),
    Seam(
        "engines/generate.py",
        f"GenerationConfig has {DECODING}",
        lambda: set(DECODING.split()) <= set(vars(transformers.GenerationConfig())),
    ),
    Seam(
        "engines/generate.py",
        "generate(inputs, generation_config, stopping_criteria, assistant_model, custom_generate)",
        lambda: takes(
            GENERATE, "inputs", "generation_config", "*", "stopping_criteria", "assistant_model", "custom_generate"
        ),
    ),
    Seam(
        "engines/_compat_engines.py",
        "ContinuousBatchProcessor._generation_step(model)",
        lambda: takes(PROCESSOR._generation_step, "model", "*"),
    ),
    Seam(
        "engines/continuous_batching.py",
        "ContinuousBatchProcessor.inputs_and_outputs.requests_in_batch and .output_ids",
        lambda: (
            sets(PROCESSOR, "inputs_and_outputs")
            and sets(input_outputs.ContinuousBatchingIOs, "requests_in_batch", "output_ids")
        ),
    ),
    Seam(
        "engines/continuous_batching.py",
        "FutureRequestState.state, .query_length and .has_new_token",
        lambda: sets(requests.FutureRequestState, "state", "query_length", "has_new_token"),
    ),
    Seam(
        "engines/continuous_batching.py",
        "RequestState.request_id and .position_offset",
        lambda: fields(requests.RequestState, "request_id", "position_offset"),
    ),
    Seam(
        "engines/continuous_batching.py",
        "GenerationOutput.prompt_ids, .generated_tokens and .error",
        lambda: fields(requests.GenerationOutput, "prompt_ids", "generated_tokens", "error"),
    ),
    Seam(
        "engines/continuous_batching.py",
        "a step of continuous batching passes logits_indices",
        lambda: "logits_indices" in inspect.getsource(input_outputs.ContinuousBatchingIOs.get_model_kwargs),
    ),
    Seam(
        "engines/continuous_batching.py",
        f"ContinuousBatchingConfig has {BATCHING}",
        lambda: fields(transformers.ContinuousBatchingConfig, *BATCHING.split()),
    ),
    Seam(
        "engines/continuous_batching.py",
        "generate_batch(inputs)",
        lambda: takes(transformers.GenerationMixin.generate_batch, "inputs", "*"),
    ),
]

INSTALLED = ", ".join(
    f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "peft", "accelerate", "torch")
)


def check(seam: Seam) -> None:
    try:
        reason = "is not there" if not seam.is_there() else None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"cannot be looked at ({type(error).__name__}: {error})"
    assert reason is None, f"{seam.what} {reason} in {INSTALLED}. Look at trl_r3/{seam.file}, which relies on it."


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.what[:80])
def test_seam(seam):
    check(seam)


def test_a_seam_that_moved_names_the_file():
    gone = [
        lambda: hasattr(trl.GRPOTrainer, "_generate_twice"),
        lambda: takes(trl.GRPOTrainer._compute_loss, "inputs", "model", "*"),
        lambda: takes(trl.GRPOTrainer._compute_loss, "batch"),
        lambda: returns(trl.GRPOTrainer._generate, "completion_ids", "prompt_ids"),
        lambda: returns(trl.RLOOTrainer._generate, "prompt_ids", "completion_ids", "tool_mask"),
        lambda: returns(trl.RLOOTrainer._generate_single_turn, "completion_ids"),
        lambda: sets(trl.RLOOTrainer, "rollout_func"),
        lambda: says(trl.RLOOTrainer._generate_and_score_completions, "tool_mask"),
        lambda: fields(trl.RLOOConfig, "vllm_importance_sampling_correction"),
        lambda: imports(vllm_generation, "LLM", "sglang"),
        lambda: transformers.PreTrainedModel._no_such_thing(),
    ]
    for is_there in gone:
        with pytest.raises(AssertionError, match=r"this .* in trl .* Look at trl_r3/gating/ops\.py"):
            check(Seam("gating/ops.py", "this", is_there))


def private_names() -> dict[str, str]:
    """Private names that the package uses and does not define, and a file of each."""
    defined, used = set(), {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used[node.attr] = str(path.relative_to(PACKAGE))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used[node.value] = str(path.relative_to(PACKAGE))
    private = {name: file for name, file in used.items() if name.startswith("_") and name[1:2].isalpha()}
    return {name: file for name, file in private.items() if name.isidentifier() and name not in defined}


def test_every_private_name_is_a_seam():
    named = " ".join(seam.what for seam in SEAMS)
    names = private_names()
    assert {"_generation_step", "_gradient_checkpointing_func", "_use_kernels", "_model_mapping"} <= set(names)
    assert {name: file for name, file in names.items() if name not in named} == {}


def test_files_use_what_they_rely_on():
    """The table names files that exist, and each of them mentions what it is said to rely on."""
    owners = {each.__name__ for each in (*TRAINERS, *CONFIGS, *STUDENTS, *STUDENT_CONFIGS)}
    for seam in SEAMS:
        text = (PACKAGE / seam.file).read_text(encoding="ascii")
        words = set(re.findall(r"\w{4,}", seam.what)) - owners
        assert words & set(re.findall(r"\w+", text)), seam
