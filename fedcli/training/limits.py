"""When training stops before its last step; free of torch."""

import time
from dataclasses import dataclass, field


@dataclass
class TimeLimit:
    """Stops where the longest step so far would not fit into what is left of some seconds; `least` steps are made."""

    seconds: float
    least: int = 1
    _began: float = field(default=0.0, init=False)
    _before: float = field(default=0.0, init=False)
    _longest: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """Begin to count, with the first step."""
        self._began = self._before = time.monotonic()

    def is_over(self, num_steps: int) -> bool:
        """Return whether training stops behind this step, which has just been made."""
        now = time.monotonic()
        self._longest, self._before = max(self._longest, now - self._before), now
        return num_steps >= self.least and now - self._began + self._longest > self.seconds
