"""What is written for SLURM and read from it, with stand-ins for its programs; test_slurm.py has the real ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.processes import ENVIRONMENT, fedcli, warm

from fedcli import Federation
from fedcli.config import SlurmConfig, parse_config
from fedcli.errors import ConfigError
from fedcli.operations.slurm_state import job_name
from fedcli.slurm.scripts import ScriptWriter, ranges
from fedcli.workspace.layout import Workspace

ROOT = Path(__file__).parents[1]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that comes first on the PATH of `call`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


def program(folder: Path, name: str, shell: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{shell}\n")
    path.chmod(0o755)


def call(workspace: Path, programs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{programs}:/usr/bin:/bin"
    return warm()(*arguments, cwd=workspace, environment=ENVIRONMENT | {"PATH": path} | environment)


def configure(workspace: Path, **keys: object) -> None:
    path = workspace / "fedcli.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"slurm": keys}))


@given(st.sets(st.integers(0, 50), min_size=1))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    text = ranges(numbers)
    bounds = [list(map(int, part.split("-"))) for part in text.split(",")]
    assert [n for bound in bounds for n in range(bound[0], bound[-1] + 1)] == sorted(numbers)


def test_a_script_asks_for_what_the_slurm_section_says_and_runs_the_client_of_its_index() -> None:
    settings = SlurmConfig(
        partition="gpu",
        account="p42",
        gres="gpu:1",
        time="02:00:00",
        cpus=4,
        memory="16G",
        throttle=2,
        options=("--qos=long",),
        setup="module load cuda\n",
        command="fedcli",
    )
    text = ScriptWriter(Path("/a b/50%"), settings).clients("name", [7, 0, 1, 2], Path("/a b/50%/logs"))
    assert text == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=name\n"
        "#SBATCH --array=0-2,7%2\n"
        "#SBATCH '--output=/a b/50%%/logs/client-%a.log'\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --requeue\n"
        "#SBATCH '--chdir=/a b/50%'\n"
        "#SBATCH --nodes=1\n"
        "#SBATCH --ntasks=1\n"
        "#SBATCH --cpus-per-task=4\n"
        "#SBATCH --account=p42\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --gres=gpu:1\n"
        "#SBATCH --time=02:00:00\n"
        "#SBATCH --mem=16G\n"
        "#SBATCH --qos=long\n"
        "# Written by fedcli from the slurm section of fedcli.yaml.\n"
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"\n'
        "module load cuda\n"
        "# exec: a SIGTERM (time limit, preemption, scancel) reaches fedcli itself.\n"
        "exec fedcli client train -w '/a b/50%' --id \"$SLURM_ARRAY_TASK_ID\" --wait 60\n"
    )


def test_the_server_job_does_not_ask_for_what_only_clients_need() -> None:
    text = ScriptWriter(Path("/w"), SlurmConfig(gres="gpu:1", account="p42", time="02:00:00")).server("n", Path("/l"))
    asked = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "--account=p42" in asked
    assert not [option for option in asked if option.startswith(("--gres", "--time"))]


@pytest.mark.parametrize(
    ("aggregate", "submit", "expected"), [(0, 0, 0), (5, 0, 0), (6, 0, 0), (6, 6, 6), (7, 0, 7), (143, 0, 143)]
)
def test_the_server_job_sends_the_next_round_and_then_scores_after_a_merge_or_a_missing_quorum_only(
    programs: Path, aggregate: int, submit: int, expected: int
) -> None:
    merge = f'[ "$*" = "server aggregate -w {programs} --no-score" ] && exit {aggregate}'
    program(programs, "fedcli", f'echo "$1 $2" >> {programs}/calls; {merge}; [ $1 = slurm ] && exit {submit}; exit 9')
    text = ScriptWriter(programs, SlurmConfig(command=str(programs / "fedcli"))).server("n", programs)
    done = subprocess.run(["bash", "-c", text])
    assert done.returncode == expected
    calls = (programs / "calls").read_text().splitlines()
    assert calls == ["server aggregate", "slurm submit", "server score"][: 3 if aggregate in (0, 5, 6) else 1]


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"time": 36000}, "slurm.time: put it in quotes, as in '10:00:00': YAML reads that as a number (found 36000)"),
        ({"server": {"tme": "1:00"}}, "slurm.server.tme: unknown key. Did you mean time?"),
        ({"partitions": "gpu"}, "slurm.partitions: unknown key. Did you mean partition"),
        ({"options": ["qos=long"]}, "slurm.options.0: String should match pattern"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "slurm.partition: String should match pattern"),
    ],
)
def test_a_fault_in_the_slurm_section_names_its_key(section: dict, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"slurm": section}, Path("fedcli.yaml"))
    assert fault in caught.value.message


def test_script_writes_the_open_rounds_scripts_and_a_second_call_leaves_out_who_has_answered(
    small: Path, programs: Path
) -> None:
    from protocol_client import take_part

    done = fedcli("slurm", "script", "--json", cwd=small)
    scripts = json.loads(done.stdout)["scripts"]
    assert sorted(scripts) == ["clients", "server"]
    assert "#SBATCH --array=0-2\n" in Path(scripts["clients"]).read_text()
    assert sys.executable in Path(scripts["server"]).read_text()
    for path in scripts.values():
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert (small / "logs/round-00000").is_dir()
    take_part(small, 1)
    fedcli("slurm", "script", cwd=small)
    assert "#SBATCH --array=0,2\n" in Path(scripts["clients"]).read_text()
    assert not (small / "slurm/round-00000/jobs.json").exists()


def test_without_slurm_submit_says_so_and_status_does_not_look_for_it(small: Path, programs: Path) -> None:
    done = call(small, programs, "slurm", "submit", "--json", PATH=str(programs))
    assert done.returncode == 8
    assert json.loads(done.stdout)["error"]["message"] == "SLURM is not here: there is no squeue on the PATH"
    program(programs, "squeue", f"echo >> {programs}/called")
    status = json.loads(call(small, programs, "status", "--json").stdout)
    assert status["slurm"] is None
    assert not (programs / "called").exists()


def test_status_tells_queued_running_and_failed_elements_of_the_last_attempt(small: Path, programs: Path) -> None:
    """Client 0's first element failed and its second runs, 1's waits, 2's is forgotten; 2 has sent no update."""
    jobs = [
        {"id": 7, "kind": "clients", "clients": [0, 1, 2], "attempt": 1},
        {"id": 8, "kind": "server", "clients": [], "attempt": 1},
        {"id": 9, "kind": "clients", "clients": [0], "attempt": 2},
        {"id": 10, "kind": "server", "clients": [], "attempt": 1},
    ]
    (small / "slurm/round-00000").mkdir(parents=True)
    (small / "slurm/round-00000/jobs.json").write_text(json.dumps({"round": 0, "jobs": jobs}))
    lines = [
        "7|0|FAILED|n|NonZeroExitCode",
        "7|1|PENDING|n|Resources",
        "9|0|RUNNING|n|None",
        "10|N/A|PENDING|n|Dependency",
    ]
    program(programs, "squeue", f'echo "$@" > {programs}/options\nprintf "%s\\n" ' + " ".join(f"'{x}'" for x in lines))
    slurm = json.loads(call(small, programs, "status", "--json").stdout)["slurm"]
    assert (slurm["queued"], slurm["running"], slurm["failed"]) == ({"1": "Resources"}, [0], {"2": "ENDED"})
    assert (slurm["servers"], slurm["will_merge"]) == ({"10": "PENDING"}, True)
    line = next(line for line in call(small, programs, "status").stdout.splitlines() if line.startswith("slurm"))
    jobs = "queued client 1 (Resources); running client 0; failed client 2 (ENDED); merging is job 10: PENDING"
    assert line == f"slurm      {jobs}"
    assert "r00000-clients-fedcli-" in (programs / "options").read_text()


def test_an_element_that_was_preempted_and_not_requeued_has_failed_and_is_sent_again(
    small: Path, programs: Path
) -> None:
    workspace = Workspace(small)
    name = {kind: job_name(Federation(workspace).round(), kind) for kind in ("clients", "server")}
    jobs = [
        {"id": 7, "kind": "clients", "clients": [0, 1, 2], "attempt": 1},
        {"id": 8, "kind": "server", "clients": [], "attempt": 1},
    ]
    (small / "slurm/round-00000").mkdir(parents=True)
    (small / "slurm/round-00000/jobs.json").write_text(json.dumps({"round": 0, "jobs": jobs}))
    lines = [
        f"7|0|PREEMPTED|{name['clients']}|None",
        f"7|1|PENDING|{name['clients']}|BeginTime",  # preempted and requeued
        f"7|2|RUNNING|{name['clients']}|None",
        f"8|N/A|PREEMPTED|{name['server']}|None",
    ]
    program(programs, "squeue", 'printf "%s\\n" ' + " ".join(f"'{line}'" for line in lines))
    slurm = json.loads(call(small, programs, "status", "--json").stdout)["slurm"]
    assert (slurm["queued"], slurm["running"], slurm["failed"]) == ({"1": "BeginTime"}, [2], {"0": "PREEMPTED"})
    assert (slurm["servers"], slurm["will_merge"]) == ({"8": "PREEMPTED"}, False)
    program(programs, "sbatch", f'echo "$@" >> {programs}/sent; echo 9')
    done = call(small, programs, "slurm", "submit", "--json")
    assert done.returncode == 0, done.stderr
    array, server = (programs / "sent").read_text().splitlines()
    assert "#SBATCH --array=0\n" in Path(array.split()[-1]).read_text()
    assert server.split()[-1].endswith("server.sh")


@pytest.mark.slow
def test_status_does_not_wait_long_for_a_slurm_that_hangs(small: Path, programs: Path) -> None:
    (small / "slurm/round-00000").mkdir(parents=True)
    (small / "slurm/round-00000/jobs.json").write_text('{"round": 0, "jobs": [{"id": 7, "kind": "server"}]}')
    program(programs, "squeue", "exec sleep 60")
    done = call(small, programs, "status")
    assert done.returncode == 0
    assert (
        "slurm      jobs 7, and how they stand is not known: SLURM does not answer: squeue took more than 3 seconds\n"
        in done.stdout
    )


def test_a_damaged_record_of_jobs_is_told_and_may_be_removed(small: Path, programs: Path) -> None:
    path = small / "slurm/round-00000/jobs.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"round": 0, "jobs": [{"id": "seven"}]}')
    done = call(small, programs, "status", "--json")
    assert done.returncode == 7
    error = json.loads(done.stdout)["error"]
    assert error["message"].startswith(f"{path} is damaged: jobs.0.id")
    assert error["hint"].startswith("Remove it")


def test_more_drawn_than_count_have_a_timer_that_looks_before_all_are_through(small: Path, programs: Path) -> None:
    manifest = small / "rounds/00000/manifest.json"
    document = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(document | {"selection": {"order": [2, 0, 1], "count": 2}}))
    configure(small, retry=90)
    program(programs, "squeue", "true")
    planned = json.loads(call(small, programs, "slurm", "submit", "--dry-run", "--json").stdout)
    assert [(request["kind"], request["delay"]) for request in planned["requests"]] == [
        ("clients", None),
        ("server", None),
        ("timer", 90),
    ]
    assert not (small / "slurm/round-00000").exists()


def test_a_job_gets_nothing_of_what_slurm_told_the_job_that_sends_it_nor_of_a_users_own_options(
    small: Path, programs: Path
) -> None:
    program(programs, "squeue", "true")
    program(programs, "sbatch", f"env | grep -E '^(SLURM|SBATCH|SQUEUE)_' >> {programs}/seen; echo 5")
    told = {"SLURM_JOB_ID": "3", "SLURM_MEM_PER_NODE": "9", "SLURM_CONF": "/c"}
    options = {"SBATCH_JOB_NAME": "mine", "SBATCH_PARTITION": "other", "SQUEUE_PARTITION": "other"}
    done = call(small, programs, "slurm", "submit", **told, **options)
    assert done.returncode == 0, done.stderr
    assert (programs / "seen").read_text() == "SLURM_CONF=/c\n" * 2


def test_a_path_that_slurm_reads_otherwise_is_refused(small: Path, programs: Path) -> None:
    program(programs, "squeue", "true")
    odd = small.rename(small.with_name("back\\nslash"))
    for words in (("slurm", "submit"), ("slurm", "script")):
        done = call(odd, programs, *words)
        assert done.returncode == 4
        assert "there is a backslash in the path" in done.stderr


def test_the_page_on_slurm_and_the_template_name_every_key() -> None:
    page = (ROOT / "docs/SLURM.md").read_text()
    template = yaml.safe_load((ROOT / "workspace_template/fedcli.yaml").read_text())["slurm"]
    assert template == SlurmConfig().model_dump(mode="json")
    assert [key for key in template if f"`{key}`" not in page] == []
