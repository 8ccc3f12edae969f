"""Federated fine-tuning of language models over a shared directory."""

__version__ = "0.1.0"
