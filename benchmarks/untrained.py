"""What stands in for models and rows where a benchmark measures all but the training."""

import numpy as np


class Untrained:
    """Stands in for the model: a client's values are the adapter's and a little."""

    num_truncated, num_own = 0, 10

    def load(self, party, observer):
        """Stand in for the process's models, too."""
        return self

    def rows(self, party, train, *, group_by=None):
        """Return ten rows, of which nothing is looked at."""
        return self

    def __len__(self) -> int:
        return 10

    def counts(self) -> dict:
        """Return nothing that is odd."""
        return {"left_out": {}, "notes": {}, "first_cases": {}, "unused": {}}

    def select(self, party, train, adapter, beside) -> None:
        """Choose no rows."""

    def train(self, adapter, train, *, party, **_):
        """Return the values after the round's steps, and the steps' losses."""
        return {name: array + np.float32(0.01) for name, array in adapter.items()}, [1.0] * train.steps
