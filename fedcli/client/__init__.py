"""One client's part of a round: what is due, its rows, training, and the update that it drops."""
