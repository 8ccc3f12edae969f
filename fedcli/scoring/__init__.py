"""Scores of models on benchmarks, and tables of them."""
