"""Two selections of a gate that differ only in experts which tie: `torch.topk` takes of these whichever it likes.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..gating.reference import expert_scores
from .gate_formula import GateFormula


def same_but_for_ties(
    one_NK: Tensor, other_NK: Tensor, formula: GateFormula, module: nn.Module, logits_NE: Tensor
) -> bool:
    """
    Whether two selections are the same sets, or of experts that are worth the same to a formula. Logits in bfloat16
    tie at the edge of a selection in every tenth row or so.

    Where most rows differ, as where logits say nothing yet, or groups limit them, ties excuse none.

    Args:
        one_NK, other_NK (`torch.Tensor` of shape `(N, K)`):
            Distinct ids of any integer dtype.
        formula ([`GateFormula`]):
            What may be the gate.
        module (`torch.nn.Module`):
            The router.
        logits_NE (`torch.Tensor` of shape `(N, E)`):
            Its logits.
    """
    one_NK, other_NK = (ids_NK.long().sort(-1).values for ids_NK in (one_NK, other_NK))
    same_N = (one_NK == other_NK).all(-1)
    if bool(same_N.all()):
        return True
    choice_NE = _choice(formula, module, logits_NE)
    if choice_NE is None or float(same_N.double().mean()) < 0.5:
        return False
    one, other = (choice_NE.gather(1, ids_NK).sort(-1).values for ids_NK in (one_NK, other_NK))
    return torch.equal(one, other)


def _choice(formula: GateFormula, module: nn.Module, logits_NE: Tensor) -> Tensor | None:
    """(N, E) what the experts are selected by, if it is known."""
    if formula.n_group > 1:
        return None
    if formula.bias is not None:
        return expert_scores(logits_NE.float(), formula.score) + getattr(module, formula.bias)
    return logits_NE
