"""Base models and LoRA adapters; knows nothing of the workspace."""
