"""The commands: each parses, makes one library call and prints. Heavy imports stand inside the functions."""
