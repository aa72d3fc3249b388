"""The model of memory: what one training step allocates, and when it frees it."""
