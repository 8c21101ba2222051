"""A run that replay decides, and where deciding begins. See docs/when_it_helps.md."""
