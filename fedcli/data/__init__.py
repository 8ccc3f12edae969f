"""Rows, templates and token ids; knows nothing of the workspace."""
