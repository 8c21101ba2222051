"""What each rollout engine returns, turned into records."""
