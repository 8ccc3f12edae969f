"""Studies: many federations that differ in algorithm, data or seed, run in one go, and compared in tables."""
