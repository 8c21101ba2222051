#!/usr/bin/env bash
# Reading the GGUF file of a Mixtral with Transformers
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0, gguf 0.19.0.
# Expected: a mixture of experts comes back as one, or it is refused as a model without support, as other types are.
# Behaviour: GGUF calls a Mixtral "llama" and tells it by llama.expert_count. Transformers does not read that key: it
# builds a dense Llama from the attention of the file, fills the MLP of every layer with random numbers and leaves all
# routers and experts in the file. What it says is that some weights are newly initialized.
# Output seen:
#     in the file: Mixtral, 8 experts; loaded: LlamaForCausalLM
#     attention and embeddings as saved True, MLP of a layer random: True, experts loaded: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "gguf==0.19.0"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys

import numpy
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
routing = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
saved = MixtralForCausalLM(MixtralConfig(**sizes, **routing))
writer = GGUFWriter("mixtral.gguf", "llama")  # keys and names as llama.cpp's converter writes them
writer.add_name("mixtral")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(2)
writer.add_feed_forward_length(48)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_rope_dimension_count(16)
writer.add_layer_norm_rms_eps(saved.config.rms_norm_eps)
writer.add_vocab_size(64)
writer.add_expert_count(8)
writer.add_expert_used_count(2)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"token{i}" for i in range(64)])
writer.add_token_scores([0.0] * 64)
writer.add_token_types([1] * 64)
names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
for name, weight in saved.state_dict().items():
    array, block = weight.numpy(), "blk." + (name.split(".") + [""] * 3)[2]
    if name.endswith("gate_up_proj"):
        gate, up = (numpy.ascontiguousarray(half) for half in numpy.split(array, 2, axis=1))
        writer.add_tensor(f"{block}.ffn_gate_exps.weight", gate)
        writer.add_tensor(f"{block}.ffn_up_exps.weight", up)
    elif name.endswith("experts.down_proj"):
        writer.add_tensor(f"{block}.ffn_down_exps.weight", array)
    elif name.endswith("mlp.gate.weight"):
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", array)
    else:
        if "q_proj" in name or "k_proj" in name:  # rotary halves are interleaved there
            array = numpy.ascontiguousarray(array.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32))
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
loaded, about = AutoModelForCausalLM.from_pretrained(
    ".", gguf_file="mixtral.gguf", dtype=torch.float32, output_loading_info=True
)
kind, before, after = type(loaded).__name__, saved.state_dict(), loaded.state_dict()
same = all(torch.equal(after[name], weight) for name, weight in before.items() if ".mlp." not in name)
mlps = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("gate", "up", "down")]
random = all(name in about["missing_keys"] for name in mlps)
experts = sum("experts" in name for name in after)
print(f"in the file: Mixtral, 8 experts; loaded: {kind}")
print(f"attention and embeddings as saved {same}, MLP of a layer random: {random}, experts loaded: {experts}")
sys.exit((kind, same, random, experts) != ("LlamaForCausalLM", True, True, 0))
PYTHON
