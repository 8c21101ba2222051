"""An honest map: GRPO with and without replay, over settings and seeds. See README.md."""
