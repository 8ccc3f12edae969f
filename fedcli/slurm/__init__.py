"""SLURM: batch scripts as text, and its commands; knows nothing of a workspace."""
