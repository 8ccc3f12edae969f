"""The library API: joins what lies on disk with the mathematics (open, train, aggregate, evaluate, verify)."""
