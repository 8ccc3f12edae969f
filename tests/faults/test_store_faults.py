"""A federation over S3 that has bad days: it answers 409, 429, 500 and 503, drops connections, dies and comes back.

Commands are run again after an exit. $FEDCLI_FAULTS faults an algorithm (40; docs/RELIABILITY.md has a longer run).
"""

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

import pytest
from support.fault_proxy import KINDS, FaultProxy, Faults
from support.faults import recorded
from support.federation import configure, restart
from support.object_stores import contents, upload
from support.processes import ENVIRONMENT, warm
from support.servers import new_bucket, s3_environment, s3_server

from fedcli import Federation
from fedcli.stores.url import open_objects

NUM_FAULTS = int(os.environ.get("FEDCLI_FAULTS", "40").replace("all", "500"))
ROUNDS = 3
RATES = {"latency": 0.01, "slow": 0.01, "409": 0.1} | dict.fromkeys(
    ("429", "500", "503", "dropped before", "dropped midway", "stale", "dropped after", "500 after", "truncated"), 0.015
)
DOWN = 0.1
"""How often the server dies while a command runs, for a second."""
GONE = 0.04
"""How often it dies, and is back when the command has given up."""
MOST_TRIES = 30


@dataclass
class Campaign:
    """What happened so far; `faults` by kind, `exits` by exit code."""

    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    commands: int = 0
    federations: int = 0
    lost: int = 0
    doubled: int = 0
    left_over: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Party:
    """Runs commands on a workspace through a proxy, on a machine of its own."""

    proxy: FaultProxy
    url: str
    folder: Path
    campaign: Campaign
    random: random.Random

    def __call__(self, *arguments: object) -> int:
        """Run a command; return its exit code."""
        chance = self.random.random() if self.proxy.faults.rates else 1.0
        if chance < GONE:
            self._dies(before=self.random.uniform(0.1, 0.6))
        elif chance < GONE + DOWN:
            self._dies(before=self.random.uniform(0.1, 0.6), until=1.6)
        environment = s3_environment(self.proxy.url) | {"XDG_DATA_HOME": str(self.folder / "data")}
        environment |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "FEDCLI_WORKSPACE": self.url}
        done = warm()(*arguments, cwd=self.folder, environment=ENVIRONMENT | environment)
        if chance < GONE:
            while self.proxy.is_up:  # the command was quicker
                time.sleep(0.05)
            self.proxy.start()
        self.campaign.commands += 1
        self.campaign.exits[done.returncode] += 1
        if done.returncode:
            print(arguments, done.returncode, done.stderr, sep="\n")
        if "Traceback" in done.stderr or done.returncode not in (0, 4, 6):
            self.campaign.problems.append(f"{arguments}: {done.returncode}: {done.stderr}")
        return done.returncode

    def _dies(self, before: float, until: float | None = None) -> None:
        self.proxy.faults.happened("died and came back" if until else "died until the command had given up")
        Timer(before, self.proxy.stop).start()
        if until is not None:
            Timer(until, self.proxy.start).start()


@contextmanager
def served(faults: Faults, small: Path, folder: Path, campaign: Campaign, seed: int) -> Iterator[Party]:
    """Put a workspace into a bucket of its own behind a proxy."""
    server = s3_server()
    url = f"s3://{new_bucket(server.url)}/study"
    with FaultProxy(server.url, faults) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(server.url).items():
            patch.setenv(name, value)
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        upload(small, url)
        yield Party(proxy, url, folder, campaign, random.Random(seed))
        while not proxy.is_up:
            time.sleep(0.1)


def go_on(party: Party) -> None:
    """Run commands until the federation is finished; those that fail are run again."""
    for _ in range(ROUNDS * MOST_TRIES):
        for client in range(3):
            party("client", "train", "--id", client)
        party("status")
        party("server", "aggregate")
        if Federation.open(party.url).state.head.manifest.state == "finished":
            return
    party.campaign.lost += 1
    party.campaign.problems.append("the federation does not end")


def ends(url: str) -> list[object]:
    """Return what each round holds, by hash, and whose updates it counted."""
    found: list[object] = []
    for number in range(ROUNDS + 1):
        manifest = json.loads(open_objects(url).get(f"rounds/{number:05d}/manifest.json", 2**20))
        counted = (manifest["aggregation"] or {"counted": []})["counted"]
        found += [manifest["files"], [(entry["client"], entry["num_samples"], entry["update"]) for entry in counted]]
    return found


def left_over(url: str) -> list[str]:
    """Return the objects of attempts that no record names, and of uploads that were not completed."""
    found = contents(open_objects(url))
    records = {
        name.rpartition("/")[0]: hashlib.sha256(found[name]).hexdigest()[:16] for name in found if is_record(name)
    }
    attempts = [name for name in found if "/." in name]
    return [
        name for name in attempts if records.get(name.partition("/.")[0]) != name.partition("/.")[2].partition("/")[0]
    ]


def is_record(name: str) -> bool:
    """Return whether an object is what a folder is there by."""
    return name.endswith(("/manifest.json", "/update.json"))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_federation_whose_store_has_bad_days_ends_as_one_whose_has_none(small, algorithm, tmp_path):
    configure(small, f"federation.rounds={ROUNDS}")
    restart(small, algorithm)
    campaign = Campaign()
    (tmp_path / "undisturbed").mkdir()
    with served(Faults(), small, tmp_path / "undisturbed", Campaign(), 0) as party:
        go_on(party)
        undisturbed = ends(party.url)
    for seed in range(1, 1000):
        if campaign.faults.total() >= NUM_FAULTS:
            break
        folder = tmp_path / str(seed)
        folder.mkdir()
        with served(Faults(RATES, seed=seed), small, folder, campaign, seed) as party:
            go_on(party)
            campaign.federations += 1
            campaign.faults += party.proxy.faults.counts
            if ends(party.url) != undisturbed:
                campaign.lost += 1
                campaign.problems.append(f"{seed}: another end")
            if violations := Federation.open(party.url).verify().violations:
                campaign.doubled += 1
                campaign.problems.append(f"{seed}: {violations}")
            campaign.left_over += len(left_over(party.url))
    counts = {"federations": campaign.federations, "commands": campaign.commands}
    counts |= {f"exit {code}": number for code, number in sorted(campaign.exits.items())}
    counts |= {"lost": campaign.lost, "doubled": campaign.doubled, "left over": campaign.left_over}
    counts |= {"faults": campaign.faults.total()} | dict(sorted(campaign.faults.items()))
    recorded("store_faults.json", algorithm, counts, campaign.problems)
    assert not campaign.problems, "\n".join(campaign.problems)
    if NUM_FAULTS >= 200:
        assert set(campaign.faults) >= {*KINDS, "died and came back", "died until the command had given up"}
