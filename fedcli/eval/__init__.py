"""Scoring models; knows nothing of the workspace."""
