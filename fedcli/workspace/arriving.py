"""What has not come whole yet: of an update or a round, as while a tool copies it file by file, in any order."""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from fedcli.stores.calls import AT_ONCE, at_once
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import MAX_UPDATE_RECORD_BYTES, SIGNATURE_BYTES
from fedcli.workspace.layout import MANIFEST_SIGNATURE, UPDATE_RECORD, UPDATE_SIGNATURE, Home
from fedcli.workspace.parsing import is_cut_short, parse_object
from fedcli.workspace.publish import PRIVATE_MODE, publish_file
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import make_home


def arriving(base: Round, clients: Iterable[int], *, is_quick: bool = False) -> dict[int, str]:
    """Return those of some clients whose update of a round is not all there, with what is missing of it.

    As far as this user may look. Whom the round has given up waiting for is none of them. Where each look is a request
    a quick one sees which files are missing, and not which are short.
    """
    is_quick = is_quick and base.workspace.store.is_remote
    looks = {client: partial(_missing_of, base, client, is_quick) for client in clients if client not in base.given_up}
    calls = [*looks.values()]
    found = at_once(calls, AT_ONCE) if base.workspace.store.is_remote else [call() for call in calls]
    return {client: missing for client, missing in zip(looks, found, strict=True) if missing}


def _missing_of(base: Round, client: int, is_quick: bool) -> str:
    workspace = base.workspace
    name = workspace.name(workspace.update(base.number, client))
    try:
        with workspace.store.opened(name) as folder:
            names = {*folder.names()}
            if lacking := [file for file in _files_of(base) if file not in names]:
                return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
            if is_quick:
                return ""
            contents = folder.read(UPDATE_RECORD, MAX_UPDATE_RECORD_BYTES)
            if is_cut_short(contents):
                return f"{UPDATE_RECORD} is not whole yet: it has {len(contents)} bytes"
            listed = parse_object(contents, UPDATE_RECORD)["files"]
            wanted = {file: int(listed[file]["bytes"]) for file in base.manifest.dropped_files}
            wanted |= {} if base.manifest.enrolment is None else {UPDATE_SIGNATURE: SIGNATURE_BYTES}
            for file, num_bytes in wanted.items():
                if num_bytes and not folder.read_part(file, num_bytes - 1, num_bytes):
                    return f"{file} has {workspace.store.files(name)[file]:,} of {num_bytes:,} bytes"
    except (
        OSError,
        Refusal,
        UnlistableError,
        KeyError,
        TypeError,
        ValueError,
    ):  # there is none, or it is looked at when it is merged
        return ""
    return ""


def _files_of(base: Round) -> list[str]:
    return [UPDATE_RECORD, *base.manifest.dropped_files, *([UPDATE_SIGNATURE] if base.manifest.enrolment else [])]


def missing_of_round(current: Round) -> str:
    """Return what of a published round is not there yet; nothing where all is, or `gc` has removed it."""
    workspace, manifest = current.workspace, current.manifest
    if workspace.store.is_remote:
        return ""
    sizes = workspace.store.files(workspace.name(current.folder))
    pruned = current.pruned()
    for name, entry in manifest.files.items():
        if name not in sizes and (pruned is None or name not in pruned.files):
            return f"{name} is missing"
        if sizes.get(name, entry.bytes) < entry.bytes:
            return f"{name} has {sizes[name]:,} of {entry.bytes:,} bytes"
    if manifest.enrolment is not None and sizes.get(MANIFEST_SIGNATURE, 0) < SIGNATURE_BYTES:
        return f"{MANIFEST_SIGNATURE} is missing, or not whole"
    return ""


def waited_too_long(base: Round, home: Home, found: dict[int, str], limit: float) -> set[int]:
    """Return those of some arriving clients of whose update nothing more has come for so many seconds.

    The server's own clock measures, from when it first saw what is there now: files keep the times of another machine.
    """
    path, now = home.folder / "arriving.json", time.time()
    before: dict[str, list[object]] = {}
    with suppress(OSError, ValueError):
        document = json.loads(path.read_bytes())
        before = document["seen"] if document["manifest"] == base.sha256 else {}
    seen: dict[str, list[object]] = {}
    for client in found:
        state = _state_of(base, client)
        last = before.get(str(client))
        seen[str(client)] = last if last is not None and last[0] == state else [state, now]
    if seen != before:
        make_home(home)
        contents = json.dumps({"manifest": base.sha256, "seen": seen}, sort_keys=True).encode() + b"\n"
        publish_file(path, contents, mode=PRIVATE_MODE)
    return {int(client) for client, (_, since) in seen.items() if now - float(str(since)) >= limit}


def _state_of(base: Round, client: int) -> str:
    """Return what changes whenever more of an update comes."""
    store, name = base.workspace.store, base.workspace.name(base.workspace.update(base.number, client))
    return hashlib.sha256(json.dumps(sorted(store.files(name).items())).encode()).hexdigest()
