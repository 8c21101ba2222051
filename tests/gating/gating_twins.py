"""The two implementations of the gate that every test of it runs on."""

from trl_r3.gating import masked_topk_gating, masked_topk_gating_ref

TWINS = {"op": masked_topk_gating, "ref": masked_topk_gating_ref}
