"""A folder on an SFTP server, through paramiko: a rename that does not overwrite is the create-only write."""

import errno
import os
import posixpath
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedcli.errors import ConfigError, DeniedError, require_packages
from fedcli.printable import on_one_line
from fedcli.stores.objects import Entry, Objects, TooLargeError, UnlistableError

if TYPE_CHECKING:
    import paramiko

_CONNECT_SECONDS = 15
_ANSWER_SECONDS = 120
_TRIES = 6
TEMPORARY = ".tmp-"
"""Half-written objects begin with it, and are in no list."""
_STANDING = re.compile(r"[a-z]+|inbox/[0-9]+|clients/[0-9]+\.acks")
"""Folders that stay though they are empty: other processes write there."""
T = TypeVar("T")


class SftpObjects(Objects):
    """Objects as files below a folder of an SFTP server, whose rename must not overwrite (OpenSSH's does not)."""

    def __init__(self, host: str, user: str | None, port: int | None, folder: str) -> None:
        at = f"{user}@{host}" if user else host
        shown = folder if folder.startswith("/") else f"/~/{folder}"
        super().__init__(f"sftp://{at}{f':{port}' if port else ''}{shown}".rstrip("/"))
        self._target = (host, user, port)
        self._folder = folder or "."
        self._lock = threading.RLock()
        self._client: paramiko.SSHClient | None = None
        self._sftp: paramiko.SFTPClient | None = None

    def __del__(self) -> None:
        """Hang up: a connection has a thread and a socket, and a process may open many workspaces."""
        self._disconnect()

    def another(self) -> Objects:
        """Return the same folder over a connection of its own."""
        return SftpObjects(*self._target, self._folder)

    def get(self, key: str, limit: int) -> bytes:
        def read(sftp: "paramiko.SFTPClient") -> bytes:
            with _opened(sftp, self._path(key)) as file:
                if (num_bytes := file.stat().st_size or 0) > limit:
                    raise TooLargeError(num_bytes)
                file.prefetch(num_bytes)
                contents = file.read(num_bytes)
            if len(contents) != num_bytes:
                raise EOFError(f"{len(contents)} of {num_bytes} bytes came")
            return bytes(contents)

        return self._tried(read, "read", key)

    def get_part(self, key: str, start: int, end: int) -> bytes:
        def read(sftp: "paramiko.SFTPClient") -> bytes:
            with _opened(sftp, self._path(key)) as file:
                file.seek(start)
                return bytes(file.read(max(end - start, 0)))

        return self._tried(read, "read", key)

    def head(self, key: str) -> Entry | None:
        try:
            found = self._tried(lambda sftp: sftp.lstat(self._path(key)), "look at", key)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode or 0):
            return None
        modified = float(found.st_mtime or 0)
        return Entry(found.st_size or 0, f"{modified}-{found.st_size}", modified)

    def put(self, key: str, contents: bytes) -> None:
        def write(sftp: "paramiko.SFTPClient") -> None:
            final = self._path(key)
            temporary = posixpath.join(posixpath.dirname(final), TEMPORARY + uuid.uuid4().hex)
            self._write(sftp, temporary, contents)
            sftp.posix_rename(temporary, final)

        self._tried(write, "write", key)

    def create(self, key: str, contents: bytes) -> bool:
        final = self._path(key)
        temporary = posixpath.join(posixpath.dirname(final), TEMPORARY + uuid.uuid4().hex)
        is_written = False

        def write(sftp: "paramiko.SFTPClient") -> bool:
            nonlocal is_written
            if is_written and not _is_there(sftp, temporary):
                return True  # an earlier try has renamed it, and its answer was lost
            if not is_written:
                self._write(sftp, temporary, contents)
                is_written = True
            try:
                sftp.rename(temporary, final)
            except OSError as error:
                if _is_lost(error) or not _is_there(sftp, final):
                    raise
                sftp.remove(temporary)
                return False
            return True

        return self._tried(write, "create", key)

    def below(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in self._entries(folder):
            name = entry.filename
            if stat.S_ISDIR(entry.st_mode or 0):
                below = self.below(posixpath.join(folder, name))
                found |= {f"{name}/{path}": num_bytes for path, num_bytes in below.items()}
            else:
                found[name] = entry.st_size or 0
        return found

    def names(self, folder: str) -> list[str]:
        return sorted(entry.filename for entry in self._entries(folder))

    def delete(self, key: str) -> None:
        def remove(sftp: "paramiko.SFTPClient") -> None:
            with suppress(FileNotFoundError):
                sftp.remove(self._path(key))
            folder = posixpath.dirname(key)
            while folder and not _STANDING.fullmatch(folder):
                with suppress(OSError):  # others lie there
                    sftp.rmdir(self._path(folder))
                folder = posixpath.dirname(folder)

        self._tried(remove, "delete", key)

    def sweep_temporary(self, folder: str, older_than: float) -> None:
        with suppress(FileNotFoundError, DeniedError):
            for entry in self._tried(lambda sftp: sftp.listdir_attr(self._path(folder)), "list", folder):
                key = posixpath.join(folder, entry.filename)
                if stat.S_ISDIR(entry.st_mode or 0):
                    self.sweep_temporary(key, older_than)
                elif entry.filename.startswith(TEMPORARY) and time.time() - float(entry.st_mtime or 0) > older_than:
                    with suppress(DeniedError):
                        self.delete(key)

    def _path(self, key: str) -> str:
        return posixpath.join(self._folder, key)

    def _entries(self, folder: str) -> "list[paramiko.SFTPAttributes]":
        """Return what lies in a folder, without what is half-written."""
        try:
            found = self._tried(lambda sftp: sftp.listdir_attr(self._path(folder)), "list", folder)
        except FileNotFoundError:
            return []
        except UnicodeDecodeError:  # paramiko takes no other names than UTF-8's
            problem = f"{self.address}/{folder} holds a name that is not UTF-8"
            raise UnlistableError(problem, hint="Remove the file of that name on the server.") from None
        return [entry for entry in found if not entry.filename.startswith(TEMPORARY)]

    def _write(self, sftp: "paramiko.SFTPClient", path: str, contents: bytes) -> None:
        """Write a file that nobody reads yet; paramiko asks for its size in the end."""
        try:
            _make_folder(sftp, posixpath.dirname(path))
            opened = sftp.open(path, "wb")
        except FileNotFoundError:  # another process has removed the folder, which was empty
            _make_folder(sftp, posixpath.dirname(path))
            opened = sftp.open(path, "wb")
        with opened as file:
            file.set_pipelined(True)
            file.write(contents)
        if sftp.stat(path).st_size != len(contents):
            raise EOFError("not all bytes arrived")

    def _tried(self, call: "Callable[[paramiko.SFTPClient], T]", action: str, key: str) -> T:
        """Call with a connection, and again with another one where it breaks; explain what stays."""
        for attempt in range(1, _TRIES + 1):
            try:
                with self._lock:
                    return call(self._connected())
            except FileNotFoundError:
                raise
            except PermissionError:
                raise self.denied(action, key) from None
            except _errors() as error:
                self._disconnect()
                if attempt == _TRIES or not _is_lost(error):
                    raise self.unreachable(action, key, on_one_line(str(error) or type(error).__name__)[:200]) from None
                time.sleep(min(0.2 * 2**attempt, 5.0))
        raise AssertionError  # the last try returns or raises

    def _connected(self) -> "paramiko.SFTPClient":
        if self._sftp is not None:
            return self._sftp
        self._client = _connect(*self._target)
        self._sftp = sftp = self._client.open_sftp()
        if (channel := sftp.get_channel()) is not None:
            channel.settimeout(_ANSWER_SECONDS)
        return sftp

    def _disconnect(self) -> None:
        client, self._client, self._sftp = self._client, None, None
        if client is not None:
            client.close()


def _opened(sftp: "paramiko.SFTPClient", path: str) -> "paramiko.SFTPFile":
    """Open a regular file; of a link, a pipe or a device, which may have no end, there is none."""
    if not stat.S_ISREG(sftp.lstat(path).st_mode or 0):
        raise FileNotFoundError(path)
    return sftp.open(path, "rb")


def _is_there(sftp: "paramiko.SFTPClient", path: str) -> bool:
    try:
        sftp.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _make_folder(sftp: "paramiko.SFTPClient", folder: str) -> None:
    if folder in ("", "/", ".") or _is_there(sftp, folder):
        return
    _make_folder(sftp, posixpath.dirname(folder))
    try:
        sftp.mkdir(folder)
    except OSError as error:
        if _is_lost(error) or not _is_there(sftp, folder):  # else another process was first
            raise


def _is_lost(error: Exception) -> bool:
    """Return whether an error is the connection's, and no answer of the server: paramiko's answers have no number."""
    if not isinstance(error, OSError):
        return isinstance(error, _errors())
    lost = (errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return isinstance(error, socket.timeout | ConnectionError) or error.errno in lost


def _errors() -> tuple[type[Exception], ...]:
    import paramiko

    return (OSError, EOFError, paramiko.SSHException)


def _connect(host: str, user: str | None, port: int | None) -> "paramiko.SSHClient":
    """Connect as ssh does: with ~/.ssh/config, known hosts, the agent and the usual keys; no host is trusted anew."""
    import paramiko

    config = _ssh_config(host)
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    for name in ("~/.ssh/known_hosts", *config.get("userknownhostsfile", "").split()):
        with suppress(OSError):
            client.load_host_keys(os.path.expanduser(name))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    keys: Any = [os.path.expanduser(path) for path in config.get("identityfile", [])]  # a list is taken, too
    name, number = config.get("hostname", host), port or int(config.get("port", 22))
    try:
        client.connect(
            name,
            number,
            username=user or config.get("user"),
            key_filename=keys or None,
            timeout=_CONNECT_SECONDS,
            banner_timeout=_CONNECT_SECONDS,
            auth_timeout=_CONNECT_SECONDS,
        )
    except paramiko.BadHostKeyException as error:
        raise ConfigError(
            f"{host} has another host key than your known_hosts says: somebody may be in between",
            hint="Ask its operator; then remove the old key with `ssh-keygen -R`.",
        ) from error
    except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as error:
        raise ConfigError(
            f"{host} does not let {user or config.get('user') or 'you'} in",
            hint=f"Try `sftp {host}`: fedcli uses the same keys, agent and ~/.ssh/config, and asks for no password.",
        ) from error
    except paramiko.SSHException as error:
        if "not found in known_hosts" in str(error):
            raise ConfigError(
                f"{host} is not in your known_hosts",
                hint=f"Run `sftp {f'-P {number} ' if number != 22 else ''}{name}` once, and compare its fingerprint.",
            ) from error
        raise
    except paramiko.ssh_exception.NoValidConnectionsError as error:
        raise ConnectionError(f"nothing answers on port {number} of {name}") from error
    except socket.gaierror as error:
        raise ConfigError(f"there is no host {name}", hint="Check the URL.") from error
    if (transport := client.get_transport()) is not None:
        transport.set_keepalive(30)
    return client


def _ssh_config(host: str) -> Any:
    import paramiko

    try:
        return paramiko.SSHConfig.from_path(os.path.expanduser("~/.ssh/config")).lookup(host)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, paramiko.SSHException) as error:  # what paramiko cannot read, ssh may
        path = Path("~/.ssh/config").expanduser()
        raise ConfigError(f"{path} cannot be read: {on_one_line(str(error))[:200]}", hint="Mend it.") from error


def open_sftp(host: str, user: str | None, port: int | None, folder: str) -> SftpObjects:
    """Return the objects below sftp://; raise RequirementError without paramiko. Nothing is asked yet."""
    require_packages(["paramiko"])
    return SftpObjects(host, user, port, folder)
