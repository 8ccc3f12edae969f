"""fedcli under a real SLURM of this machine: what is lost, requeued, cancelled, preempted or sent twice."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from protocol_client import take_part
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings, warm

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
AGENT = """#!/bin/bash
# fedcli, but for `client train`: that is the client of protocol_client.py, which needs no torch.
if [ "$1 $2" = "client train" ]; then
  while [ "$1" != --id ]; do shift; done
  [ -e {workspace}/before-$2 ] && . {workspace}/before-$2
  export PYTHONPATH={here}:$PYTHONPATH
  exec {python} -c "import sys; from protocol_client import take_part; take_part('{workspace}', int(sys.argv[1]))" "$2"
fi
[ -e {workspace}/before-$1 ] && . {workspace}/before-$1
exec {python} -m fedcli "$@"
"""
ONCE = 'rm -- "$BASH_SOURCE"; '


class Cluster:
    """SLURM on this machine alone, with eight pretended CPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = next(port for port in range(20000, 30000, 2) if is_free(port) and is_free(port + 1))
        self.environment = ENVIRONMENT | {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_TEST_DIR": str(folder),
            "SLURM_TEST_PORT": str(port),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __call__(self, *words: object) -> str:
        """Run a command of SLURM's, or a script of this folder; return what it prints."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=60, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        self(HERE / "slurm/start.sh")

    def stop(self) -> None:
        self(HERE / "slurm/stop.sh", "--wipe")

    def stop_controller(self) -> None:
        """Stop the controller alone; jobs go on."""
        os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGTERM)

    def queue(self) -> dict[str, str]:
        """Return the state of every element that has not ended, by its id (12, or 12_3 in an array)."""
        return dict(line.split() for line in self("squeue", "-h", "-r", "-o", "%i %T").splitlines())


class Federation:
    """A workspace whose rounds the cluster runs; clients are stand-ins that need no torch, if not told otherwise."""

    def __init__(self, cluster: Cluster, workspace: Path, **options: object) -> None:
        self.cluster, self.workspace = cluster, workspace
        self.configure("slurm", **({"setup": f"cd {workspace}", "retry": 600} | options))

    def configure(self, section: str, **keys: object) -> None:
        path = self.workspace / "fedcli.yaml"
        document = yaml.safe_load(path.read_text())
        document[section] = document.get(section, {}) | keys
        path.write_text(yaml.safe_dump(document))

    def use_agent(self) -> None:
        agent = self.workspace / "agent"
        agent.write_text(AGENT.format(here=HERE, workspace=self.workspace, python=sys.executable))
        agent.chmod(0o755)
        self.configure("slurm", command=str(agent))

    def before(self, whom: int | str, shell: str) -> None:
        """Let a client's stand-in, or a command such as `server`, do something else first."""
        (self.workspace / f"before-{whom}").write_text(shell)

    def __call__(self, *arguments: object, code: int = 0, **environment: str) -> dict:
        """Run a command with --json; return its document."""
        done = warm()(*arguments, "--json", cwd=self.workspace, environment=self.cluster.environment | environment)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    def submit(self, **options) -> dict:
        return self("slurm", "submit", **options)

    def jobs(self, number: int) -> list[dict]:
        path = self.workspace / f"slurm/round-{number:05d}/jobs.json"
        return json.loads(path.read_bytes())["jobs"] if path.exists() else []

    def job(self, kind: str, number: int = 0) -> int:
        """Return the id of the latest job of a kind."""
        return [job["id"] for job in self.jobs(number) if job["kind"] == kind][-1]

    def manifest(self, number: int) -> dict | None:
        path = self.workspace / f"rounds/{number:05d}/manifest.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def queue(self) -> dict[str, str]:
        """Return what the cluster's queue holds of this federation."""
        listed = self.cluster("squeue", "-h", "-r", "-o", "%i %T %Z").splitlines()
        return {i: state for i, state, folder in map(str.split, listed) if folder == str(self.workspace)}

    def wait_for(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + 300
        while not what():
            assert time.monotonic() < end, f"{self.queue()}\n{self.logs()}"
            time.sleep(0.2)

    def finish(self, rounds: int) -> None:
        """Wait until no job is left; the last round must be there, and everything in order."""
        self.wait_for(lambda: not self.queue())
        last = self.manifest(rounds)
        assert last is not None, self.logs()
        assert last["state"] == "finished"
        assert self("verify")["violations"] == []

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()}" for path in self.workspace.glob("logs/*/*.log"))

    def counted(self, number: int) -> list[int]:
        """Return the clients whose updates a round was merged from."""
        return [entry["client"] for entry in self.manifest(number)["aggregation"]["counted"]]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("there is no SLURM on this machine (apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="fedcli-slurm-"))  # pytest's own is closed to others; munged wants it open
    cluster = Cluster(folder)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def federation(cluster: Cluster, small: Path) -> Iterator[Federation]:
    """Three clients, one round."""
    federation = Federation(cluster, small)
    federation.use_agent()
    federation.configure("federation", rounds=1)
    yield federation
    assert federation.queue() == {}


@pytest.fixture(scope="module")
def overlong(cluster: Cluster, small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose client 1 hangs until its time limit, which SLURM counts in minutes: started early."""
    folder = tmp_path_factory.mktemp("overlong") / "workspace"
    federation = Federation(cluster, Path(shutil.copytree(small_template, folder)), time="00:01:00", attempts=2)
    federation.use_agent()
    federation.configure("federation", rounds=1)
    federation.before(1, ONCE + "exec sleep 600")
    federation.submit()
    return federation


def test_three_rounds_with_an_element_failing_one_requeued_and_one_cancelled_end_by_quorum(
    cluster: Cluster, overlong: Federation, tmp_path: Path
) -> None:
    overrides = [*SMALL, "federation.clients=8", "federation.rounds=3", "federation.quorum=0.7", "train.steps=1"]
    done = fedcli("init", "W", *settings(*overrides), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    federation = Federation(cluster, tmp_path / "W", throttle=2)
    rows = federation.workspace / "data/client-3.jsonl"
    kept = rows.read_bytes()
    rows.write_bytes(b"no JSON\n")

    first = federation.submit()
    assert [(job["kind"], job["clients"]) for job in first["sent"]] == [("clients", list(range(8))), ("server", [])]
    assert federation.submit()["status"] == "in_place"
    array = federation.job("clients")
    cluster("scancel", f"{array}_7")
    federation.wait_for(lambda: federation.queue().get(f"{array}_0") == "RUNNING")
    cluster("scontrol", "requeue", f"{array}_0")
    assert sum(state == "RUNNING" for state in federation.queue().values()) <= 2

    federation.wait_for(lambda: "3" in federation("status")["slurm"]["failed"])
    slurm = federation("status")["slurm"]
    assert slurm["failed"].keys() == {"3", "7"}
    assert slurm["failed"]["3"] == "FAILED"
    assert slurm["failed"]["7"] in ("ENDED", "CANCELLED")  # a pending element that is cancelled leaves no trace
    assert slurm["will_merge"]
    assert federation.submit()["status"] == "in_place"

    federation.wait_for(lambda: federation.manifest(1))
    rows.write_bytes(kept)
    assert federation.manifest(1)["aggregation"]["missing"] == [3, 7]
    federation.finish(rounds=3)
    assert federation.counted(1) == [0, 1, 2, 4, 5, 6]
    assert federation.counted(2)[:3] == [0, 1, 2]
    assert [len(federation.jobs(number)) for number in range(4)] == [2, 2, 2, 0]
    assert "trained in round 0" in (federation.workspace / "logs/round-00000/client-0.log").read_text()
    assert federation.submit()["status"] == "finished"


def test_a_federation_runs_by_itself_once_it_is_submitted(federation: Federation) -> None:
    federation.configure("federation", rounds=2)
    assert [job["kind"] for job in federation.submit()["sent"]] == ["clients", "server"]
    federation.finish(rounds=2)
    assert federation.counted(1) == federation.counted(2) == [0, 1, 2]


def test_two_submits_at_once_send_one_array_and_one_server_job(federation: Federation) -> None:
    federation.before(0, ONCE + "sleep 5")
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(
                subprocess.run,
                command("slurm", "submit"),
                cwd=federation.workspace,
                env=federation.cluster.environment,
                check=True,
                capture_output=True,
            )
            for _ in range(4)
        ]
    assert all(call.result().returncode == 0 for call in calls)
    assert [job["kind"] for job in federation.jobs(0)] == ["clients", "server"]
    federation.finish(rounds=1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_submit_that_is_killed_between_sending_and_writing_down_does_not_send_it_again(
    federation: Federation, tmp_path: Path, number: int
) -> None:
    """sbatch does its work, then kills the process that called it, at its first or second job."""
    wrapper = tmp_path / "bin/sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/bash\necho >> {tmp_path}/calls\n{shutil.which("sbatch")} "$@"\n'
        f"[ $(wc -l < {tmp_path}/calls) = {number} ] && kill -9 $PPID\nexit 0\n"
    )
    wrapper.chmod(0o755)
    federation.before(1, ONCE + "sleep 5")
    environment = federation.cluster.environment | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    killed = subprocess.run(command("slurm", "submit"), cwd=federation.workspace, env=environment, capture_output=True)
    assert killed.returncode == -9
    assert len(federation.jobs(0)) == number - 1
    healed = federation.submit()
    assert [job["kind"] for job in healed["sent"]] == ["server"][: 2 - number]
    assert [(job["kind"], job["clients"]) for job in federation.jobs(0)] == [("clients", [0, 1, 2]), ("server", [])]
    federation.finish(rounds=1)


def test_a_cancelled_server_job_is_sent_again_by_submit(federation: Federation) -> None:
    federation.before(2, ONCE + "sleep 3")
    federation.submit()
    federation.cluster("scancel", federation.job("server"))
    status = federation("status")
    assert not status["slurm"]["will_merge"]
    assert status["next_command"] == "fedcli slurm submit"
    assert [(job["kind"], job["clients"]) for job in federation.submit()["sent"]] == [("server", [])]
    federation.finish(rounds=1)


def test_an_element_that_always_fails_is_sent_so_often_and_then_reported(federation: Federation) -> None:
    federation.before(1, "echo no rows today; exit 3")
    federation.configure("slurm", attempts=2)
    federation.submit()
    federation.wait_for(lambda: not federation.queue())
    sent = [(job["kind"], job["attempt"], job["clients"]) for job in federation.jobs(0)]
    assert sent == [("clients", 1, [0, 1, 2]), ("server", 1, []), ("clients", 2, [1]), ("server", 1, [])]
    assert (federation.workspace / "logs/round-00000/client-1.log").read_text() == "no rows today\n" * 2
    log = (federation.workspace / "logs/round-00000/server.log").read_text()
    assert "round 0: no update of clients 1 after 2 attempts; no more jobs are sent" in log
    status = federation("status")
    assert status["slurm"]["failed"] == {"1": "FAILED"}
    assert status["next_command"] == "fedcli slurm submit"

    (federation.workspace / "before-1").unlink()
    assert [(job["kind"], job["clients"]) for job in federation.submit()["sent"]] == [("clients", [1]), ("server", [])]
    federation.finish(rounds=1)


@pytest.mark.parametrize(
    ("rule", "retry"), [({"deadline": 10}, 600), ({"per_round": 2, "select": 3}, 5)], ids=["deadline", "select"]
)
def test_an_element_that_hangs_is_given_up_by_the_clock(federation: Federation, rule: dict, retry: int) -> None:
    federation.configure("federation", rounds=2, **rule)
    federation.configure("slurm", retry=retry)
    federation.before(0, f"[ -e {federation.workspace}/rounds/00001 ] && exec sleep 600")
    federation.submit()
    federation.finish(rounds=2)
    assert federation.counted(2) == [1, 2]
    assert [job["kind"] for job in federation.jobs(1)][:3] == ["clients", "server", "timer"]


def test_elements_that_are_preempted_run_again(federation: Federation) -> None:
    """A job of a partition that comes first takes the whole node."""
    federation.before(0, ONCE + "exec sleep 600")
    federation.submit()
    element = f"{federation.job('clients')}_0"
    federation.wait_for(lambda: federation.queue()[element] == "RUNNING")
    federation.cluster("sbatch", "-W", "-p", "urgent", "-c", "8", "-o", "/dev/null", "--wrap", "true")
    federation.finish(rounds=1)
    assert "DUE TO PREEMPTION" in (federation.workspace / "logs/round-00000/client-0.log").read_text()
    assert federation.counted(1) == [0, 1, 2]


def test_a_server_job_that_is_requeued_before_or_after_its_merge_runs_again(federation: Federation) -> None:
    federation.configure("federation", rounds=2)
    for command_ in ("server", "slurm"):
        federation.before(command_, ONCE + "exec sleep 600")
    federation.submit()
    server = federation.job("server")
    for command_ in ("server", "slurm"):
        hanging = federation.workspace / f"before-{command_}"
        federation.wait_for(lambda path=hanging: not path.exists())
        federation.cluster("scontrol", "requeue", server)
    federation.finish(rounds=2)
    assert [len(federation.jobs(number)) for number in range(2)] == [2, 2]


def test_elements_of_a_node_that_dies_run_again(federation: Federation, overlong: Federation) -> None:
    overlong.wait_for(lambda: not overlong.queue())  # it lives on this node, too
    federation.before(0, ONCE + "exec sleep 600")
    federation.submit()
    element = f"{federation.job('clients')}_0"
    federation.wait_for(lambda: federation.queue()[element] == "RUNNING")
    node = socket.gethostname().split(".")[0]
    federation.cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    federation.wait_for(lambda: federation.queue()[element] == "PENDING")
    federation.cluster.start()  # brings the node back
    federation.finish(rounds=1)
    assert "DUE TO NODE" in (federation.workspace / "logs/round-00000/client-0.log").read_text()


def resume(federation: Federation, element: str) -> None:
    """Let an element that was requeued start now: SLURM itself holds it back for a while."""

    def start() -> bool:
        if federation.queue().get(element) == "PENDING":
            try:
                federation.cluster("scontrol", "update", f"JobId={element}", "StartTime=now")
            except AssertionError as error:  # it may have started by itself since
                if "no longer pending" not in str(error):
                    raise
        return federation.queue().get(element) != "PENDING"

    federation.wait_for(start)


def test_a_server_job_looks_again_later_for_a_party_that_trains_elsewhere(federation: Federation) -> None:
    (federation.workspace / "data/client-2.jsonl").unlink()
    first = federation.submit()
    assert first["elsewhere"] == [2]
    assert first["sent"][0]["clients"] == [0, 1]
    federation.wait_for(lambda: len(federation.jobs(0)) == 3)
    later = str(federation.job("server"))
    federation.wait_for(lambda: list(federation.queue()) == [later])
    take_part(federation.workspace, 2)
    resume(federation, later)
    federation.finish(rounds=1)
    assert federation.counted(1) == [0, 1, 2]


def test_jobs_of_a_round_that_was_closed_by_hand_are_cancelled(federation: Federation) -> None:
    federation.before(0, "exec sleep 600")
    federation.submit()
    inbox = federation.workspace / "inbox"
    federation.wait_for(lambda: (inbox / "1/round-00000").exists() and (inbox / "2/round-00000").exists())
    federation.configure("federation", rounds=2)
    federation("server", "aggregate", "--partial")
    (federation.workspace / "before-0").unlink()
    old = [federation.job("clients"), federation.job("server")]
    assert federation.submit()["cancelled"] == old
    federation.finish(rounds=2)


def test_a_copy_of_a_workspace_leaves_the_jobs_of_the_original_alone(federation: Federation, tmp_path: Path) -> None:
    federation.before(0, ONCE + "sleep 3")
    federation.submit()
    copy = Federation(federation.cluster, Path(shutil.copytree(federation.workspace, tmp_path / "copy")))
    shutil.rmtree(copy.workspace / "slurm")
    planned = copy("slurm", "submit", "--dry-run")
    assert planned["cancelled"] == []
    assert [request["kind"] for request in planned["requests"]] == ["clients", "server"]
    federation.finish(rounds=1)


def test_what_sbatch_does_not_take_is_told_with_its_own_words(federation: Federation) -> None:
    federation.configure("slurm", partition="nowhere")
    error = federation.submit(code=8)["error"]
    assert error["message"] == (
        "sbatch failed: sbatch: error: invalid partition specified: nowhere\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified"
    )
    assert "slurm section" in error["hint"]
    assert federation.jobs(0) == []


def test_an_element_that_runs_into_its_time_limit_is_sent_again(overlong: Federation) -> None:
    overlong.finish(rounds=1)
    assert [job["clients"] for job in overlong.jobs(0)] == [[0, 1, 2], [], [1], []]
    assert overlong.counted(1) == [0, 1, 2]
    assert "DUE TO TIME LIMIT" in (overlong.workspace / "logs/round-00000/client-1.log").read_text()


def test_with_the_controller_down_status_and_submit_say_so(federation: Federation) -> None:
    federation.before(0, ONCE + "sleep 5")
    federation.submit()
    federation.cluster.stop_controller()
    slurm = federation("status")["slurm"]
    assert slurm["error"].startswith("SLURM does not answer: squeue took more than")
    assert [job["kind"] for job in slurm["jobs"]] == ["clients", "server"]
    assert "squeue" in federation.submit(code=8)["error"]["message"]
    federation.cluster.start()
    assert federation.submit()["status"] == "in_place"
    federation.finish(rounds=1)


def test_the_cells_of_a_study_run_as_jobs_and_are_not_sent_twice(cluster: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "study"

    def study_command(name: str, *arguments: object) -> dict:
        done = warm()("study", name, *arguments, "--json", cwd=tmp_path, environment=cluster.environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    small = ("federation.clients=2", "federation.rounds=1", "train.steps=1", f"slurm.setup=cd {tmp_path}")
    options = [part for setting in small for part in ("--set", f"settings.{setting}")]
    options += ["--set", "algorithms=[fedavg]", "--set", "seeds=[0]", "--set", "eval.limit=2"]
    study_command("init", "demo", study, *options)
    sent = study_command("run", "-s", study, "--slurm")
    assert list(sent["jobs"].values()) == [["demo/seed-0/baselines", "demo/seed-0/fedavg"]]
    again = study_command("run", "-s", study, "--slurm")
    assert set(again["in_queue"]) | {name for names in again["jobs"].values() for name in names} <= {
        *("demo/seed-0/baselines", "demo/seed-0/fedavg")
    }
    end = time.monotonic() + 300
    while cluster.queue():
        assert time.monotonic() < end, cluster.queue()
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in study.glob("logs/*.log"))
    assert study_command("status", "-s", study)["num_done"] == 2, logs
    assert study_command("run", "-s", study, "--slurm") == {"jobs": {}, "in_queue": []}
