"""A region as a party of its parent: its registration, whose rows lie with the parties of another workspace."""

from dataclasses import dataclass
from pathlib import Path

from fedcli.errors import ConfigError, NotReadyError, UsageError
from fedcli.parties.join import Joining, check_free
from fedcli.parties.party import find_home
from fedcli.parties.simulate import read_summary
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Home
from fedcli.workspace.registrations import (
    DataCard,
    PartyRecord,
    RegionRecord,
    read_party,
    read_registration,
)


@dataclass(frozen=True)
class Region:
    """A region that has joined its parent as a client; `num_rows` is what it has registered there."""

    client: int
    home: Home
    num_rows: int


@dataclass(frozen=True)
class JoinedRegion:
    """A region that was registered, now or anew; fingerprints are there where signatures are required."""

    region: Region
    is_new: bool
    fingerprint: str | None
    server_fingerprint: str | None


def join_region(
    parent: FederationState,
    client: int,
    child: FederationState,
    *,
    num_rows: int,
    home: Path | None = None,
    server: str | None = None,
) -> JoinedRegion | None:
    """Register a region with the rows of its parties, anew where there are others; None where it stands as it should.

    `server` is the fingerprint that the parent's server must have. Raises UsageError for an id or a home that will not
    do, or where the client has joined with rows of its own; NotReadyError where there are no rows.
    """
    parent.check_clients([client])
    workspace, identity = parent.workspace, parent.identity
    if identity.simulation:
        raise ConfigError(
            f"{workspace.address} is a simulation, which no region joins",
            hint="Regions join a workspace with data.source: null, made by `fedcli init --set data.source=null`.",
        )
    found = find_home(parent, client, home)
    check_free(workspace, client, found, identity.id)
    before, registration = read_party(found), read_registration(workspace, client)
    if before is not None and (before.region is None or before.region.workspace != child.identity.id):
        what = f"with rows of its own, {before.source}" if before.region is None else f"for {before.region.child}"
        raise UsageError(
            f"client {client} has joined {what}", hint="Take another id: a client of the parent is one region."
        )
    if num_rows == 0:
        raise NotReadyError(
            f"nobody has joined {child.workspace.address} yet: it has no rows to register",
            hint="Relay it once its parties have joined; `fedcli status` there names them.",
        )
    pin = None if before is None else before.server
    if identity.signatures is not None and (pin is None or server is not None):
        from fedcli.parties.membership import pin_server  # where nothing is signed nobody needs cryptography

        pin = pin_server(parent, server, pin)
    withholds = parent.head.manifest.withholds
    record = PartyRecord(
        workspace=identity.id,
        client=client,
        source=child.workspace.address,
        format=None,
        subset=None,
        split=None,
        base=None,
        trust_remote_code=False,
        share="minimal",
        server=pin,
        num_rows=num_rows if withholds else None,
        region=RegionRecord(workspace=child.identity.id, child=child.workspace.address, parent=workspace.address),
    )
    card = DataCard(num_rows=None if withholds else num_rows, region=child.identity.id)
    region = Region(client, found, num_rows)
    if before == record and registration is not None and registration.data == card:
        return None
    told = Joining(workspace, found, record, card, (), (), parent).commit()
    return JoinedRegion(region, before is None, told, pin)


def registered_rows(child: FederationState) -> int:
    """Return how many rows the clients of a federation have together, as far as it was told."""
    if child.is_simulation:
        summary = read_summary(child.workspace)
        return 0 if summary is None else sum(summary.sizes)
    return sum(registration.data.num_rows or 0 for registration in child.joined().values())
