"""Names under which shares are logged; a file of its own, because TRL takes seconds to import."""

SHARES = (
    "routing_replay/replayed_frac",
    "routing_replay/missing_frac",
    "routing_replay/changed_router_frac",
    "routing_replay/changed_token_frac",
    "routing_replay/agreement",
    "routing_replay/contrast",
    "sampling/k3_kl",
    "sampling/extreme_token_frac",
    "sampling/live/k3_kl",
    "sampling/live/extreme_token_frac",
)
