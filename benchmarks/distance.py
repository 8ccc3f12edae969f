"""What a round costs over S3: requests, bytes, seconds beyond training and dollars, for few and for many parties.

The server is moto's, behind a proxy that delays each request, drops some and throttles some (tests/support/). Parties
train in no time, so that what is measured is the way there and back. Each keeps its own cache, as on a machine of its
own; in the federation of few each visit and each poll is a process of its own, and signatures are required.

The last line is `distance: ratio R (limit 1)`: the worst of an idle poll's requests over 2, its seconds over 1.5 times
those of the same poll on a disk plus one latency, and a party's bytes over 1.02 times its adapter down and up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from record import record
from support.fault_proxy import FaultProxy, Faults, Handled
from support.servers import new_bucket, s3_environment, s3_server
from untrained import Untrained

from fedcli import Federation, Observer
from fedcli.client.due import train_client
from fedcli.errors import WorkspaceError
from fedcli.stores.url import open_objects
from fedcli.workspace.address import workspace_at
from fedcli.workspace.history import read_identity
from fedcli.workspace.kept_objects import KeptObjects
from fedcli.workspace.layout import Workspace, default_home
from fedcli.workspace.object_store import ObjectStore
from fedcli.workspace.registrations import (
    DataCard,
    PartyRecord,
    Registration,
    make_home,
    save_party,
)
from fedcli.workspace.split_store import SplitStore
from fedcli.workspace.store import DirectoryStore

MOST_VISITS = 5
MOST_REQUESTS, MOST_SECONDS, MOST_BYTES = 2, 1.5, 1.02
PRICES = {"write": 0.005 / 1000, "read": 0.0004 / 1000, "gigabyte out": 0.09}
"""US dollars, S3 Standard in US East (N. Virginia), https://aws.amazon.com/s3/pricing, list prices of 2024.

PUT, COPY, POST and LIST are writes; GET and HEAD are reads; DELETE, and what goes in, is free. `gigabyte out` is to the
internet, for the first 10 TB a month; within a region it is nothing.
"""
WORLDS = {
    "quiet": {},
    "50 ms": {"latency": 0.05},
    "50 ms, 1 % lost, 2 % throttled": {"latency": 0.05, "rates": {"dropped before": 0.01, "503": 0.02}},
}


def main() -> int:
    """Play a round in each world, for few and for many, and poll; write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=2048, help="of the adapter of the few: 2048 is 4.2 MB")
    parser.add_argument("--repeats", type=int, default=9, help="of each poll")
    parser.add_argument("--come", nargs=2, metavar=("WORKSPACE", "ID"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.come:
        come(Federation.open(arguments.come[0]), int(arguments.come[1]))
        return 0
    with tempfile.TemporaryDirectory() as scratch, FaultProxy(s3_server().url) as proxy:
        os.environ |= s3_environment(proxy.url) | {
            "XDG_DATA_HOME": f"{scratch}/data",
            "XDG_CACHE_HOME": f"{scratch}/cache",
            "FEDCLI_CACHE": os.environ.get("FEDCLI_CACHE", f"{scratch}/models"),
        }
        poll = measure_poll(Path(scratch), proxy, arguments.repeats)
        print("poll:", poll, flush=True)
        few = {name: play_few(Path(scratch), proxy, world, arguments) for name, world in WORLDS.items()}
        many = {}
        for name, world in WORLDS.items():
            if arguments.many and name != "50 ms":  # the third is it with more
                many[name] = play_many(Path(scratch), proxy, world, arguments.many)
                print(arguments.many, name, many[name], flush=True)
    ratios = {
        "poll requests": poll["requests"] / MOST_REQUESTS,
        "poll seconds": poll["ratio"] / MOST_SECONDS,
        "bytes": few["quiet"]["party bytes over adapter down and up"] / MOST_BYTES,
    }
    figures = {"poll": poll, f"{arguments.few} parties": few, f"{arguments.many} parties": many, "prices": PRICES}
    print({name: round(ratio, 3) for name, ratio in ratios.items()})
    is_kept = (arguments.few, arguments.many) == (10, 1000)
    return record("distance", round(max(ratios.values()), 3), 1, figures | {"ratios": ratios}, is_kept=is_kept)


def come(federation: Federation, client: int) -> None:
    """Let a party come by, do what is due, and send."""
    done = train_client(federation.state, client, Untrained(), observer=Observer())
    assert done.status == "submitted", done.status


# --- polls


def measure_poll(scratch: Path, proxy: FaultProxy, repeats: int) -> dict[str, float]:
    """Return what `client train` takes of an idle party: processes, on a disk and over S3, in turn."""
    latency = 0.05
    seconds: dict[str, list[float]] = {}
    requests: list[int] = []
    places = {"disk": str(scratch / "poll"), "s3": f"s3://{new_bucket(proxy.url)}/poll"}
    for address in places.values():
        make(address, 2, rank=1, signed=False)
        join(workspace_at(address), 1, scratch)
        come(Federation.open(address), 0)
        fedcli("client", "train", "--id", "0", "-w", address)  # the first poll notes what there is
    proxy.faults = Faults(latency=latency)
    for _ in range(repeats):
        for name, address in places.items():
            proxy.forget()
            seconds.setdefault(name, []).append(
                timed(lambda a=address: fedcli("client", "train", "--id", "0", "-w", a))
            )
            if name == "s3":
                requests.append(proxy.count())
    proxy.faults = Faults()
    disk, s3 = (statistics.median(seconds[name]) for name in ("disk", "s3"))
    return {
        "requests": max(requests),
        "disk seconds": round(disk, 4),
        "s3 seconds": round(s3, 4),
        "latency": latency,
        "ratio": round(s3 / (disk + latency), 3),
    }


# --- a federation of few, each visit a process


def play_few(scratch: Path, proxy: FaultProxy, world: dict, arguments: argparse.Namespace) -> dict[str, object]:
    """Play two rounds of signed parties whose adapter is large; measure the second, when all is known but the round."""
    proxy.faults = Faults()
    address = f"s3://{new_bucket(proxy.url)}/few"
    make(address, arguments.few, rank=arguments.rank, signed=True)
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "output": f"{n}"}) + "\n" for n in range(10)))
    federation = Federation.open(address)
    for client in range(arguments.few):
        joined = federation.client(client).join(rows, share="minimal").commit()
        federation.server.enrol(client, joined)
    visits: list[list[Handled]] = []
    seconds: list[float] = []
    for number in range(2):
        proxy.faults = Faults(**world, seed=number)
        visits.clear()
        seconds.clear()
        for client in range(arguments.few):
            proxy.forget()
            own = {"XDG_CACHE_HOME": str(scratch / f"cache-{urlsplit(address).netloc}-{client}")}
            command = [sys.executable, __file__, "--come", address, str(client)]
            seconds.append(timed(lambda c=command, e=own: subprocess.run(c, env=os.environ | e, check=True)))
            visits.append(list(proxy.log))
        proxy.forget()
        merged = timed(lambda: fedcli("server", "aggregate", "-w", address))
        server = list(proxy.log)
    imports = [sys.executable, "-c", IMPORTS]
    idle = statistics.median(timed(lambda: subprocess.run(imports, check=True)) for _ in range(3))
    cost = Federation.open(address).round().manifest.cost
    num_bytes = statistics.median(moved(visit) for visit in visits)
    found = {
        **describe(visits),
        "party bytes over adapter down and up": round(num_bytes / (cost.client_bytes_down + cost.client_bytes_up), 4),
        "party seconds beyond training": round(statistics.median(seconds) - idle, 2),
        "server requests": len(server),
        "server seconds": round(merged, 2),
        "dollars a party and round, out to the internet": round(dollars(visits) / len(visits), 8),
        "dollars per 1,000 parties and round": round((dollars(visits) + dollars([server])) / len(visits) * 1000, 4),
        "without what goes out": round((dollars(visits, 0) + dollars([server], 0)) / len(visits) * 1000, 4),
    }
    print(arguments.few, world, found, flush=True)
    return found


IMPORTS = "import fedcli.client.local_round, fedcli.trust.chain, fedcli.stores.cloud, obstore, numpy"
"""What a visit loads before it asks for anything."""


# --- a federation of many, in threads


def play_many(scratch: Path, proxy: FaultProxy, world: dict, count: int) -> dict[str, object]:
    """Play a round of parties without signatures, many at once, and merge it."""
    proxy.faults = Faults()
    address = f"s3://{new_bucket(proxy.url)}/many"
    make(address, count, rank=1, signed=False)
    join(workspace_at(address), count, scratch)
    proxy.faults = Faults(**world)
    proxy.forget()
    seconds: list[float] = []
    given_up: list[int] = []

    def visit(client: int) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            workspace = own_machine(address, Path(cache))
            for _ in range(MOST_VISITS):
                try:
                    seconds.append(timed(lambda: come(Federation(workspace), client)))
                    return
                except WorkspaceError:  # whoever runs it, runs it again
                    given_up.append(client)
            raise AssertionError(f"client {client} did not come through")

    with ThreadPoolExecutor(16) as pool:
        taken = timed(lambda: list(pool.map(visit, range(count))))
    visits = list(proxy.log)
    proxy.forget()
    merged = timed(lambda: fedcli("server", "aggregate", "-w", address))
    server = list(proxy.log)
    return {
        "party requests": round(len(visits) / count, 2),
        "party bytes": round(moved(visits) / count),
        "party seconds beyond training, 16 at once": round(statistics.median(seconds), 2),
        "all parties' seconds": round(taken, 1),
        "server requests a party": round(len(server) / count, 2),
        "server seconds": round(merged, 1),
        "failed requests": sum(bool(each.faults) for each in visits + server),
        "visits that were made again": len(given_up),
        "kinds": dict(Counter(each.method for each in visits)),
        "dollars per 1,000 parties and round": round(dollars([visits, server]) / count * 1000, 4),
        "without what goes out": round(dollars([visits, server], 0) / count * 1000, 4),
    }


def own_machine(address: str, cache: Path) -> Workspace:
    """Return a workspace as a machine of its own sees it, which has read nothing of it yet."""
    objects = open_objects(address)
    root = cache / "remote"
    remote = ObjectStore(objects, KeptObjects(cache / "kept"))
    return Workspace(root, SplitStore(DirectoryStore(root), remote), objects.address)


# --- what both need


def make(address: str, clients: int, *, rank: int, signed: bool) -> None:
    """Make a workspace for parties."""
    settings = {
        "data.source": "null",
        "federation.clients": clients,
        "federation.rounds": 3,
        "federation.signatures": "required" if signed else '"off"',
        "adapter.rank": rank,
        "adapter.target_modules": "[q_proj, v_proj]",
    }
    fedcli("init", address, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))


def join(workspace: Workspace, clients: int, scratch: Path) -> None:
    """Make what `client join` makes of each party."""
    identity, rows = read_identity(workspace).id, scratch / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "say", "output": "so"}) + "\n")
    for client in range(clients):
        party = PartyRecord(
            workspace=identity,
            client=client,
            source=str(rows),
            format="alpaca",
            subset=None,
            split=None,
            base=None,
            trust_remote_code=False,
        )
        home = default_home(identity, client)
        make_home(home)
        save_party(home, party)
        registration = Registration(workspace=identity, client=client, data=DataCard(num_rows=10))
        workspace.store.put(workspace.name(workspace.registration(client)), registration.to_bytes())


def moved(requests: Iterable[Handled]) -> int:
    """Return the bytes of bodies, up and down."""
    return sum(each.num_up + each.num_down for each in requests)


def dollars(logs: Sequence[Iterable[Handled]], gigabyte_out: float = PRICES["gigabyte out"]) -> float:
    """Return what requests cost; those that were not carried out are not charged, for they fail with 5xx."""
    total = 0.0
    for each in (each for log in logs for each in log if 0 < each.status < 500):
        is_write = each.method in ("PUT", "POST") or "list-type" in each.query
        total += 0.0 if each.method == "DELETE" else PRICES["write" if is_write else "read"]
        total += each.num_down / 2**30 * gigabyte_out
    return total


def describe(visits: Sequence[Sequence[Handled]]) -> dict[str, object]:
    """Return the requests and bytes of a visit, by the median."""
    kinds = Counter(
        f"{each.method}{' list' if 'list-type' in each.query else ''}" for visit in visits for each in visit
    )
    return {
        "party requests": statistics.median(map(len, visits)),
        "party bytes up": statistics.median(sum(each.num_up for each in visit) for visit in visits),
        "party bytes down": statistics.median(sum(each.num_down for each in visit) for visit in visits),
        "kinds": {kind: round(number / len(visits), 2) for kind, number in sorted(kinds.items())},
        "failed requests": sum(bool(each.faults) for visit in visits for each in visit),
    }


def fedcli(*arguments: object) -> None:
    """Run a fedcli process."""
    command = [sys.executable, "-m", "fedcli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{urlsplit(str(arguments[-1])).path}: {done.stderr}"


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
