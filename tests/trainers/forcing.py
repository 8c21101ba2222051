"""What is logged, and the routers of a model forced into routes: the numbers that the log has to hold, computed apart.

Legend: B batch, T tokens of a padded sequence, C completion tokens, V vocabulary, L MoE layers, K experts per token.
"""

import torch


def logged(trainer, name):
    """{step: value} of one name."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def forced(model, one, routes):
    """
    Scores a pass with a model of its own whose routers are forced into `routes` (B, T, L, K), -1 for live.

    Returns the logits (B, C, V) that predict the completions, and (B, T, L, K) of what would have been live.
    """
    live = []

    def force(layer, module, args, output):
        logits, weights, ids = output
        live.append(ids.unflatten(0, one.input_ids.shape))
        given = routes[:, :, layer].flatten(0, 1)
        chosen = torch.where(given == -1, ids, given)
        scores = logits.softmax(-1, dtype=torch.float).gather(1, chosen)
        return logits, (scores / scores.sum(-1, keepdim=True)).to(weights.dtype), chosen

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [
        router.register_forward_hook(lambda *call, layer=layer: force(layer, *call))
        for layer, router in enumerate(routers)
    ]
    model.load_state_dict(one.weights)
    with torch.no_grad():
        logits = model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[:, one.prompt_width - 1 : -1].double(), torch.stack(live, dim=2)
