"""An honest map: GRPO with and without replay, over settings and seeds. See docs/when_it_helps.md."""
