"""The VLM with its MLPs replaced by a cross-layer transcoder: PyTorch, never jax."""
