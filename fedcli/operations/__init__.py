"""What works on a whole federation: runs, SLURM, status, reports, exports, baselines."""
