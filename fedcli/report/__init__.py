"""A federation to look at: what a report shows, its pictures, its page, and the same series as TensorBoard's events."""
