"""Real servers of stores on the loopback: S3, Azure's blobs and SFTP, once for each process of the tests.

Each ends with the process that started it, whatever ends that one. What a client needs to reach a server stands in
`environment`, as its users would set it; no test writes a password into a workspace.
"""

import atexit
import functools
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

import pytest

KEY = "AKIAFEDCLITESTS00000"
"""The access key of whoever no policy binds."""
SECRET = "a-secret-that-no-file-may-hold"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key that every azurite has, as its documentation prints it."""
_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """A server of a store: `environment` is for whoever talks to it, `new` makes a place of its own in it."""

    url: str
    environment: dict[str, str]
    process: subprocess.Popen[str] = field(repr=False)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.url.rpartition(":")[2].partition("/")[0])


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def s3_environment(endpoint: str, key: str = KEY) -> dict[str, str]:
    """Return what botocore reads of the environment to talk to an endpoint with a key."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@functools.cache
def s3_server() -> Server:
    """Start moto's S3 server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.s3_process"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    _ends_with_this_process(process)
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    return Server(url, s3_environment(url), process)


def signed_by(key: str) -> str:
    """Return the header of a request that a key has signed, for a server that looks at no signature."""
    return f"AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/s3/aws4_request"


def new_bucket(endpoint: str) -> str:
    """Make a bucket; return its name."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    _put(
        endpoint, f"/{name}", {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"}
    )
    return name


def stores_cache() -> Path:
    """Return the folder of what `make stores` installs, outside the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FEDCLI_TEST_STORES") or cache / "fedcli-stores")


@functools.cache
def azure_server() -> Server:
    """Start azurite, whose files lie in memory; skip the test where `make stores` has not installed it."""
    program = stores_cache() / "node_modules/.bin/azurite-blob"
    if not program.exists() or shutil.which("node") is None:
        pytest.skip("no azurite: `make stores` installs it, with npm")
    port = free_port()
    options = [
        "--blobPort",
        str(port),
        "--inMemoryPersistence",
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
    ]
    process = _started([str(program), *options], cwd=tempfile.mkdtemp(prefix="fedcli-azurite-"))
    url = f"http://127.0.0.1:{port}"
    _wait_for(port, process)
    environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}
    return Server(url, environment, process)


def new_container(endpoint: str) -> str:
    """Make a container of blobs; return its name."""
    name = f"c-{uuid.uuid4().hex[:12]}"
    path = f"/{AZURE_ACCOUNT}/{name}"
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{key}:{value}\n" for key, value in headers.items())
    text = f"PUT{12 * chr(10)}{signed}/{AZURE_ACCOUNT}{path}\nrestype:container"
    signature = b64encode(hmac.digest(b64decode(AZURE_KEY), text.encode(), "sha256")).decode()
    _put(endpoint, f"{path}?restype=container", headers | {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}"})
    return name


def _put(endpoint: str, path: str, headers: dict[str, str]) -> None:
    """Make what a path names."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=_SECONDS)
    try:
        connection.request("PUT", path, headers=headers)
        answer = connection.getresponse()
        assert answer.status in (200, 201), answer.read()
    finally:
        connection.close()


SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PubkeyAuthentication yes
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
MaxStartups 100
MaxSessions 100
LogLevel ERROR
"""


@functools.cache
def sftp_server() -> Server:
    """Start sshd as this user, with a host key and a user's key of its own; its clients' HOME knows both."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("no sshd: the Debian package is openssh-server")
    folder = Path(tempfile.mkdtemp(prefix="fedcli-sshd-"))
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for key in (folder / "host_key", home / ".ssh/id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    shutil.copy(home / ".ssh/id_ed25519.pub", folder / "authorized_keys")
    port = free_port()
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    host_key = (folder / "host_key.pub").read_text().strip()
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd of root separates its privileges
    process = _started([program, "-D", "-e", "-f", str(folder / "sshd_config")], cwd=folder)
    _wait_for(port, process)
    return Server(f"sftp://127.0.0.1:{port}", {"HOME": str(home)}, process)


def new_sftp_folder() -> Path:
    """Make a folder that the SFTP server's user may write in."""
    return Path(tempfile.mkdtemp(prefix="fedcli-sftp-"))


def _started(command: list[str], cwd: str | Path) -> "subprocess.Popen[str]":
    """Start a server that the kernel kills when this process dies."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _ends_with_this_process(process)
    return process


def _ends_with_this_process(process: "subprocess.Popen[str]") -> None:
    def end() -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    atexit.register(end)


def _wait_for(port: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(f"{process.args} ended: {process.stderr.read()}")
        time.sleep(0.02)
    raise AssertionError(f"{process.args} does not listen")
