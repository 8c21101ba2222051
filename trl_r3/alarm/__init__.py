"""Whether a record belongs to its tokens, and what happens when it does not."""
