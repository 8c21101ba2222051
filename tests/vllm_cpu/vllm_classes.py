"""What vLLM's own class of a model type takes: the parameters that TRL sends it, and the capture of routes.

`python tests/vllm_cpu/vllm_classes.py` adds the installed vLLM to tests/documents/vllm_classes.json, from which the
page of checkpoints has its columns; `--run` also runs those that can run on a CPU. The other classes are only built,
so no kernel has repacked their weights. Qwen3.5 wants torchvision.

Legend: R rows of a record, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import cpu_engine
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_zoo import build_tiny, tiny_config  # noqa: E402

from trl_r3 import RouterReplay, decode_vllm_output  # noqa: E402
from trl_r3.engines.vllm_versions import vllm_engine_kwargs  # noqa: E402

RESULTS = Path(__file__).parents[1] / "documents" / "vllm_classes.json"

ENGINE: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
_GROUPED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# Keys of the Hub's configs that vLLM reads, and Transformers does not write.
CONFIG_KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _GROUPED,
    "glm4_moe_lite": _GROUPED | {"first_k_dense_replace": 1, "moe_layer_freq": 1},
    "kimi_linear": {
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "head_dim": 8,
            "kda_layers": [1, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 4,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "use_grouped_topk": True,
    },
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True},
}
# Scout has no dense layer, attends to all tokens in each fourth, and K is 1.
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
    }
}
# Of those whose gate and attention vLLM has kernels for on a CPU: heads and widths in multiples of 32.
RUNNABLE = ("gemma4_text", "glm4_moe", "llama4_text", "mixtral", "olmoe", "qwen3_moe")
_RUN_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
}
WITH_IMAGES = ("gemma4", "llama4", "qwen3_5_moe")
MODEL_TYPES = (
    "deepseek_v3", "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss", "kimi_linear", "llama4_text", "minimax_m2",
    "mixtral", "nemotron_h", "olmoe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What the constructors of Nemotron-H and Kimi-Linear ask of a GPU; none of it takes part in loading."""
    from vllm.model_executor.layers.fused_moe import config, unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    triton = UnquantizedMoeBackend.TRITON
    chosen = (triton, backend_to_kernel_cls(triton)[0])
    platform = Mock(wraps=config.current_platform, is_cuda_alike=lambda: True)
    with (
        patch.object(config, "current_platform", platform),
        patch.object(unquantized_fused_moe_method, "select_unquantized_moe_backend", lambda *args, **kwargs: chosen),
        patch.object(torch.cuda, "Stream", SimpleNamespace),
    ):
        yield


def text_model(model_type: str) -> PreTrainedModel:
    """A small model of Transformers for text alone."""
    return build_tiny(model_type, **OVERRIDES.get(model_type, {}))


def image_model(model_type: str) -> PreTrainedModel:
    """A small model of Transformers that also takes images."""
    config = tiny_config(model_type, **OVERRIDES.get(f"{model_type}_text", {}))
    if model_type == "gemma4":  # none by default
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
        config.vision_config = Gemma4VisionConfig(**sizes, intermediate_size=32, num_hidden_layers=1)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def build(model: PreTrainedModel, folder: Path) -> tuple[Any, Any]:
    """vLLM's class for a model of Transformers, with weights that are not its own, and vLLM's config."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    model_type = model.config.model_type
    save(model, folder)
    caching = model_type != "kimi_linear"  # it has no layer whose cache could be shared here
    engine_args = EngineArgs(str(folder), skip_tokenizer_init=True, enable_prefix_caching=caching, **ENGINE)
    config = engine_args.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, (folder / "store").as_uri(), 0, "gloo")
            initialize_model_parallel(1, 1)
        if model_type in ("kimi_linear", "nemotron_h"):
            with as_on_a_gpu():
                return initialize_model(vllm_config=config), config
        return initialize_model(vllm_config=config), config


def rows_that_differ(model_type: str) -> tuple[int, int]:
    """
    Let vLLM's engine sample on a CPU, and hold the ids that it returns against a forward of Transformers.

    Returns:
        `tuple[int, int]`: How many pairs of row and MoE layer differ as sets, and how many there are.
    """
    from vllm import LLM, SamplingParams, __version__

    model = build_tiny(model_type, **_RUN_SIZES | OVERRIDES.get(model_type, {}))
    prompts = [torch.randint(2, 120, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 14)]
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        llm = LLM(folder, skip_tokenizer_init=True, max_model_len=128, **ENGINE, **vllm_engine_kwargs(__version__))
    try:
        sampling = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], sampling, use_tqdm=False)
        with RouterReplay(model, "intercept") as replay:
            differ = [_differ(replay, model, output) for output in outputs]
    finally:
        cpu_engine.close(llm)
    pairs = torch.cat(differ)
    return int(pairs.sum()), pairs.numel()


@torch.no_grad()
def _differ(replay: RouterReplay, model: PreTrainedModel, output: Any) -> torch.Tensor:
    (completion,) = output.outputs
    with replay.record() as recorded:
        model(torch.tensor([[*output.prompt_token_ids, *completion.token_ids]]), use_cache=False)
    live_RLK = recorded.routed_experts[0, :-1].long().sort(-1).values
    ids_RLK = torch.from_numpy(decode_vllm_output(completion).astype(int))[:, list(replay.moe_layers)].sort(-1).values
    return (ids_RLK != live_RLK).any(-1).flatten()


def save(model: PreTrainedModel, folder: Path) -> None:
    """As a checkpoint that vLLM reads."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | CONFIG_KEYS.get(model.config.model_type, {})
    if "hidden_size" in config:
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    file.write_text(json.dumps(config))


def loaded(vllm_model: Any, config: Any, calls: list[list[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The weights after these calls of `load_weights`; NaN where nothing was written."""
    from vllm.config import set_current_vllm_config

    with torch.no_grad(), set_current_vllm_config(config):
        for parameter in vllm_model.parameters():
            parameter.fill_(torch.nan)
        for weights in calls:
            vllm_model.load_weights(weights)
    return {name: parameter.detach().clone() for name, parameter in vllm_model.named_parameters()}


def sync(model: PreTrainedModel, vllm_model: Any, config: Any, folder: Path) -> str:
    """
    Load the model's parameters as TRL does: by their names in Transformers, one a call.

    Returns:
        `str`: `"yes"` if vLLM's weights are then those that it loads from the checkpoint, `"refused"` if it raises,
        `"lost"` if it does not raise, but weights of experts are not written.
    """
    try:
        sent = loaded(vllm_model, config, [[(name, value.data)] for name, value in model.named_parameters()])
    except (KeyError, TypeError, ValueError):
        return "refused"
    files = [weight for file in folder.glob("*.safetensors") for weight in load_file(file).items()]
    wanted = loaded(vllm_model, config, [files])
    assert not any(value.isnan().any() for value in wanted.values())
    wrong = [name for name, value in wanted.items() if not torch.equal(value, sent[name])]
    # a buffer in Transformers, which TRL does not send; it does not train it either
    wrong = [name for name in wrong if not name.endswith("e_score_correction_bias")]
    assert all("experts" in name and sent[name].isnan().all() for name in wrong)
    return "lost" if wrong else "yes"


def captured_layers(vllm_model: Any) -> list[int]:
    """The layers to which vLLM's capture of routes attaches, which raises where it cannot."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    bind_routed_experts_capturer(vllm_model, SimpleNamespace(capture=print))
    return [module.layer_id for module in vllm_model.modules() if isinstance(module, MoERunner)]


def examine(model: PreTrainedModel) -> dict[str, Any]:
    """What vLLM's class of a model does with TRL's weights, and whether capture attaches to its MoE layers."""
    with tempfile.TemporaryDirectory() as name:
        vllm_model, config = build(model, Path(name))
        with RouterReplay(model, "intercept") as replay:
            moe_layers = list(replay.moe_layers)
        attaches = captured_layers(vllm_model) == moe_layers
        return {"weights": sync(model, vllm_model, config, Path(name)), "capture_attaches": attaches}


if __name__ == "__main__":
    os.environ |= cpu_engine.ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_KIMI_K3_GEMM_AR": "0"}
    import vllm

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {model_type: examine(text_model(model_type)) for model_type in MODEL_TYPES}
    found |= {f"{model_type}, images": examine(image_model(model_type)) for model_type in WITH_IMAGES}
    for model_type in RUNNABLE if "--run" in sys.argv else ():
        found[model_type]["rows_that_differ"] = rows_that_differ(model_type)
    results[vllm.__version__] = found
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
