"""A federation of three clients with an algorithm of one's own: `python docs/federation_in_60_lines.py FOLDER`.

One process plays the three clients and the server. In a real federation each runs its part on its own machine.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import fedcli
from fedcli.algos import ALGORITHMS, Algorithm


@dataclass(frozen=True, kw_only=True)
class HalfWay(Algorithm):
    """The server goes part of the way to the mean of the clients' adapters: x+ = x + eta D."""

    name: Literal["halfway"] = "halfway"
    eta: float = 0.5

    def apply(self, adapter, merged, state):
        """Return the next global adapter, and no state of the server's own."""
        step = {name: self.eta * difference for name, difference in merged.difference.items()}
        return {name: (x + step[name]).astype("float32") for name, x in adapter.items()}, {}


ALGORITHMS.add("halfway", HalfWay)

SETTINGS = {
    "algorithm": {"name": "halfway", "eta": 0.9},
    "federation.clients": 3,
    "federation.rounds": 3,
    "train.steps": 4,
}


def main(folder: str) -> None:
    """Train and merge three rounds, score the result, and check the history."""
    federation = fedcli.Federation.create(folder, preset="demo", settings=SETTINGS)

    while (status := federation.status()).state == "open":
        for client in status.missing:
            training = federation.client(client).train().training
            print(f"round {status.round}, client {client}: {training.num_samples} rows, loss {training.mean_loss:.3f}")
        merged = federation.server.aggregate().aggregation
        print(f"round {status.round}: weights", {entry.client: round(entry.weight, 2) for entry in merged.counted})

    federation.evaluate("demo")  # the base, and the adapter of the last round
    print("best:", federation.scores("demo").best())
    print("last adapter:", sum(array.size for array in federation.round().adapter().values()), "numbers")
    print("violations of the protocol:", len(federation.verify().violations))


if __name__ == "__main__":
    main(sys.argv[1])
