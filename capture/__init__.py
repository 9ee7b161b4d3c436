"""Capture: a vision-language model and its prompts become an activation store. Nothing here imports jax."""
