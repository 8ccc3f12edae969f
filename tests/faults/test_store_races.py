"""Two servers on two machines merge one round over S3 at once: one of them wins, and the other says so and goes home.

$FEDCLI_RACES rounds (8; docs/RELIABILITY.md has a longer run).
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from support.fault_proxy import FaultProxy, Faults
from support.faults import recorded
from support.federation import configure, train_as
from support.object_stores import upload
from support.processes import ENVIRONMENT
from support.servers import new_bucket, s3_environment, s3_server
from support.warm import Warm

from fedcli import Federation

COUNTS = ("races", "won by one", "decided by the store (412)", "the loser says so", "one came too late to race")
NUM_RACES = int(os.environ.get("FEDCLI_RACES", "8"))


@pytest.mark.slow
def test_of_two_servers_that_race_for_a_round_one_wins_and_the_other_says_so(small, tmp_path, monkeypatch):
    configure(small, f"federation.rounds={2 * NUM_RACES}")
    counts = dict.fromkeys((*COUNTS, "lost", "doubled"), 0)
    problems: list[str] = []
    server = s3_server()
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(server.url, Faults(latency=0.005)))
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "parties"))
        url = upload(small, f"s3://{new_bucket(server.url)}/race")
        machines = [stack.enter_context(machine(proxy, tmp_path / name)) for name in "ab"]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        while counts["races"] < NUM_RACES:
            number = Federation.open(url).round().number
            for client in range(3):
                train_as(client, url)
            proxy.forget()
            command = ("server", "aggregate", "--no-score", "--json", "-w", url)
            ended = list(pool.map(partial(Warm.__call__, cwd=tmp_path), machines, *([part] * 2 for part in command)))
            problems += [f"{number}: {problem}" for problem in judged(proxy, ended, counts)]
            counts["lost"] += Federation.open(url).round().number != number + 1
        violations = Federation.open(url).verify().violations
        counts["doubled"] += bool(violations)
    recorded("store_races.json", "aggregate", counts, [*problems, *map(str, violations)])
    assert not problems, "\n".join(problems)
    assert (counts["lost"], counts["doubled"], violations) == (0, 0, [])
    assert counts["won by one"] == counts["the loser says so"] == counts["races"]


def machine(proxy: FaultProxy, folder: Path) -> Warm:
    """Return what starts processes on a machine of its own: another one's locks are not there."""
    folder.mkdir()
    places = dict.fromkeys(("XDG_DATA_HOME", "XDG_CACHE_HOME", "HOME"), str(folder))
    made = Warm([sys.executable], ENVIRONMENT | s3_environment(proxy.url) | places)
    assert made("-c", "pass", cwd=folder).returncode == 0  # it has imported all by now
    return made


def judged(proxy: FaultProxy, ended: list[subprocess.CompletedProcess], counts: dict[str, int]) -> list[str]:
    """Count how two servers fared with a round; return what is wrong."""
    written = [one for one in proxy.log if one.method == "PUT" and one.path.endswith("/manifest.json")]
    tried = sorted(one.status for one in written)
    told = sorted(json.loads(done.stdout)["status"] for done in ended if done.returncode == 0 and not done.stderr)
    late = [done for done in ended if done.returncode == 6 and "waits for 3 more" in done.stderr]
    if tried == [200] and told == ["published"] and late:  # it had published before the other looked
        counts["one came too late to race"] += 1
        return []
    counts["races"] += 1
    counts["decided by the store (412)"] += tried == [200, 412]
    counts["won by one"] += tried in ([200], [200, 412])
    counts["the loser says so"] += told == ["overtaken", "published"]
    return [] if tried.count(200) == 1 and told == ["overtaken", "published"] else [f"{tried}: {ended}"]
