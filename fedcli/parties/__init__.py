"""Who takes part, and where their rows lie."""
