"""Generate with routes, then train one step through them: no TRL, any Transformers mixture of experts.

python examples/replay_without_trl.py Qwen/Qwen3-30B-A3B --dtype bfloat16 --device cuda

The model is a hub id or a local folder with a tokenizer.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_r3 import disable_routing_replay, enable_routing_replay


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", default="12+34=")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(args.device)
    print(replay := enable_routing_replay(model))

    # the rollout, in bfloat16 as an inference engine runs it
    with torch.autocast(torch.device(args.device).type, torch.bfloat16):
        out = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            return_dict_in_generate=True,
            output_routed_experts=True,
        )
    print(tokenizer.decode(out.sequences[0]))
    print("routes (batch, tokens, MoE layers, experts a token):", tuple(out.routed_experts.shape))

    # training, through the experts of the rollout
    labels = out.sequences.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    model.train()
    loss = model(out.sequences, labels=labels, routed_experts=out.routed_experts).loss
    loss.backward()  # a recompute replays the same record
    print(f"loss {loss.item():.4f}")

    # how far live routing would have been from it
    with torch.no_grad(), replay.replay(out.routed_experts) as stats:
        model(out.sequences)
    routers = int(stats.recorded_tokens) * len(replay.moe_layers)
    print(f"live routing differs in {int(stats.changed_routers)} of {routers} routers")

    disable_routing_replay(model)


if __name__ == "__main__":
    main()
