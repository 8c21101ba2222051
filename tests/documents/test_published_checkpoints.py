"""The page of checkpoints says what the configs say, and the configs what the names of the checkpoints say.

Legend: N tokens, E experts, K experts per token.
"""

import json
import re

import pytest
import torch
import transformers
from documents import checkpoint_page
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

PATHS = {path.parent.name: path for path in checkpoint_page.CONFIGS}

# Billions of parameters, as its name says or those who publish it; towers, where left out, are small beside them.
BILLIONS = {
    "deepseek-v3": 671, "gemma-4-26b-a4b": 26, "glm-4.5-air": 106, "glm-4.7-flash": 30, "gpt-oss-20b": 21,
    "kimi-linear-48b-a3b": 48, "llama-4-scout-17b-16e": 109, "minimax-m2": 230, "mixtral-8x7b": 46.7,
    "moonlight-16b-a3b": 16, "nemotron-3-nano-30b-a3b": 31.6, "olmoe-1b-7b": 6.9, "qwen3-30b-a3b": 30.5,
    "qwen3-next-80b-a3b": 80, "qwen3.6-35b-a3b": 35,
}  # fmt: skip

# As the arguments for Megatron in the sources say: --moe-router-score-function, --moe-router-enable-expert-bias.
SIGMOID = {"deepseek_v3", "glm4_moe", "glm4_moe_lite", "kimi_linear", "llama4_text", "minimax_m2", "nemotron_h"}
WITHOUT_BIAS = {"llama4_text"}
# Transformers has no key for these.
NOT_DIVIDED = {"llama4_text"}
NOT_THE_OPS = {"gemma4_text", "llama4_text", "minimax_m2"}
# Pinned: whoever trains these types wants to know when it changes.
SYNC = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "kimi_linear", "minimax_m2", "mixtral"), "refused"),
    "nemotron_h": "lost (0.30.0), yes (0.32.0)",
}
CAPTURE = dict.fromkeys(("gemma4_text", "glm4_moe", "llama4_text", "mixtral", "olmoe", "qwen3_moe"), "run")


def text_of(config: dict) -> dict:
    return config.get("text_config", config)


def moe_layers(text: dict) -> int:
    if pattern := text.get("hybrid_override_pattern"):
        return pattern.count("E")
    layers = text["num_hidden_layers"] - text.get("first_k_dense_replace", 0)
    assert layers % text.get("interleave_moe_layer_step", 1) == 0
    return layers // text.get("interleave_moe_layer_step", 1)


def first_of(text: dict, *names: str) -> int:
    (value,) = {text[name] for name in names if name in text}
    return value


def words_of(config: dict) -> list[str]:
    """The gate, without attaching to a model."""
    text, kind = text_of(config), config["model_type"]
    words = ["sigmoid" if kind in SIGMOID else "softmax"]
    words += ["renormalised"] * text.get("norm_topk_prob", kind not in NOT_DIVIDED)
    scale = text.get("routed_scaling_factor", 1)
    words += [f"times {scale}"] * (scale != 1)
    words += ["bias"] * (kind in SIGMOID and kind not in WITHOUT_BIAS)
    words += [f"best {text.get('topk_group')} of {text.get('n_group')} groups"] * (text.get("n_group", 1) > 1)
    return words


def test_the_page_is_fresh():
    page = checkpoint_page.PAGE.read_text(encoding="ascii")
    made_with = re.search(r"Found with Transformers ([\d.]+) ", page)[1]
    text = checkpoint_page.render(page)
    if made_with != transformers.__version__:  # the page names what it was made with; all else is the same
        text = text.replace(
            f"Found with Transformers {transformers.__version__} ", f"Found with Transformers {made_with} "
        )
    assert page == text, "run python tests/documents/checkpoint_page.py"


@pytest.mark.parametrize("name", PATHS)
def test_it_agrees_with_the_files(name):
    """Read without the package, by the keys that these files have."""
    page = checkpoint_page.PAGE.read_text(encoding="ascii")
    config = json.loads(PATHS[name].read_text())
    text, kind = text_of(config), config["model_type"]
    experts = first_of(text, "num_experts", "num_local_experts", "n_routed_experts")
    top_k = first_of(text, "num_experts_per_tok", "top_k_experts")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == [f"`{kind}`", str(moe_layers(text)), f"{top_k} of {experts}"]
    own = {"times a learned scale of the expert", "of the input of the experts"}
    assert [word for word in cells[4].split(", ") if word not in own] == words_of(config)
    assert cells[5] == ("no" if kind in NOT_THE_OPS else "yes")
    assert cells[6:] == [CAPTURE.get(kind, "attaches"), SYNC.get(kind, "yes")]


@pytest.mark.parametrize("name", PATHS)
def test_the_sizes_make_the_model_of_the_name(name):
    config = AutoConfig.from_pretrained(PATHS[name].parent)
    causal = type(config) in AutoModelForCausalLM._model_mapping and "vision_config" not in config
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config)
    assert model.num_parameters() / 1e9 == pytest.approx(BILLIONS[name], rel=0.04)


@pytest.mark.parametrize(
    ("key", "value", "gate"),
    [
        ("routed_scaling_factor", 3.5, "sigmoid, renormalised, times 3.5, bias"),
        ("norm_topk_prob", False, "sigmoid, times 2.446, bias"),
        ("n_group", 8, "sigmoid, renormalised, times 2.446, bias, best 1 of 8 groups"),
    ],
)
def test_the_gate_is_read_from_the_router(key, value, gate, tmp_path):
    config = json.loads(PATHS["moonlight-16b-a3b"].read_text())
    assert checkpoint_page.examine(PATHS["moonlight-16b-a3b"]).gate != gate
    config |= {key: value, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = checkpoint_page.examine(tmp_path / "config.json")
    assert (changed.gate, changed.layers) == (gate, 2)


@pytest.mark.parametrize("found", [{"capture_attaches": False}, {"rows_that_differ": [3, 90]}])
def test_a_capture_that_does_not_hold_is_no_cell(found, monkeypatch):
    results = {"1.0": {"olmoe": {"capture_attaches": True, "weights": "yes"} | found}}
    monkeypatch.setattr(checkpoint_page, "VLLM", results)
    with pytest.raises(ValueError, match="no word"):
        checkpoint_page.vllm_cells("olmoe")


def test_versions_are_named_where_they_differ(monkeypatch):
    found = {"capture_attaches": True}
    results = {"1.0": {"olmoe": found | {"weights": "lost"}}, "2.0": {"olmoe": found | {"weights": "yes"}}}
    monkeypatch.setattr(checkpoint_page, "VLLM", results)
    assert checkpoint_page.vllm_cells("olmoe") == ("attaches", "lost (1.0), yes (2.0)")


def test_a_source_is_missed(tmp_path):
    config = json.loads(PATHS["olmoe-1b-7b"].read_text())
    del config["_source"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeyError, match="_source"):
        checkpoint_page.examine(tmp_path / "config.json")


def gate_of_a_twin(name: str) -> tuple[torch.Tensor, ...]:
    """Logits, ids and weights of the first router of a twin, and its scales and biases of the experts, if any."""
    config = AutoConfig.from_pretrained(PATHS[name].parent)
    config.num_hidden_layers = 6
    twin = checkpoint_page.twin_of(config, name)
    router = next(module for module in twin.modules() if type(module).__name__.endswith("Router"))
    seen = {}
    router.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    if hasattr(router, "proj"):
        router.proj.register_forward_hook(lambda module, args, output: seen.update(logits=output))
    with torch.no_grad():
        twin(input_ids=torch.arange(2, 66)[None], use_cache=False)
    one, bias = torch.ones(router_experts(config)), torch.zeros(router_experts(config))
    if config.model_type == "llama4_text":
        scores_NE, logits_NE = seen["output"]
        ids_NK = logits_NE.topk(1).indices
        return logits_NE, ids_NK, scores_NE.gather(1, ids_NK), one, bias
    if config.model_type == "minimax_m2":
        logits_NE, weights_NK, ids_NK = seen["output"]
        return logits_NE, ids_NK, weights_NK, one, seen["args"][1]
    return seen["logits"], seen["output"][2], seen["output"][1], router.per_expert_scale.detach(), bias


def router_experts(config) -> int:
    return getattr(config, "num_experts", None) or config.num_local_experts


@pytest.mark.parametrize("name", ["gemma-4-26b-a4b", "llama-4-scout-17b-16e", "minimax-m2"])
def test_the_words_of_the_other_gates_compute_them(name):
    logits_NE, ids_NK, weights_NK, scale_E, bias_E = gate_of_a_twin(name)

    def is_gate(words: str) -> bool:
        scores_NE = logits_NE.float().sigmoid() if words.startswith("sigmoid") else logits_NE.float().softmax(-1)
        weights = scores_NE.gather(1, ids_NK)
        if "renormalised" in words:
            weights = weights / weights.sum(-1, keepdim=True)
        if "learned scale" in words:
            weights = weights * scale_E[ids_NK]
        chosen_NK = (scores_NE + bias_E * ("bias" in words)).topk(ids_NK.shape[1]).indices
        same = torch.equal(chosen_NK.sort(-1).values, ids_NK.sort(-1).values)
        return same and torch.allclose(weights, weights_NK.float(), atol=1e-6)

    words = checkpoint_page.examine(PATHS[name]).gate
    assert is_gate(words)
    assert not any(map(is_gate, ("softmax", "softmax, renormalised", "sigmoid, renormalised")))
