"""Canaries: made-up rows that a party plants among its own for an audit; they and what it measures stay in its home."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedcli.errors import IntegrityError
from fedcli.workspace.layout import Home
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, explained, make_folder, publish_file, sync
from fedcli.workspace.record import Natural, Record, Sha256

MODE = 0o600
CanaryKind = Literal["instruction", "text", "preference"]
"""What a canary is: an instruction with a response, one text, or a prompt with two responses of which one is chosen."""


class Canary(Record):
    """A canary: `response` is its secret, drawn at random; `rejected` is the other response of a preference.

    A coin said whether it is in. `repeat` is how often it is then among the rows.
    """

    prompt: str
    response: str
    rejected: str | None = None
    repeat: Annotated[int, Field(ge=1)]
    is_included: bool


class Planted(Record):
    """canaries.json in a client's home."""

    protocol: Literal[1] = 1
    workspace: str
    client: Natural
    kind: CanaryKind
    first_round: Natural
    """The first round that is trained with them."""
    baseline: Sha256 | None
    """The client's baseline that stood when they were planted, which knows nothing of them."""
    seed: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of what the audit draws; from the operating system, and known to nobody else."""
    canaries: Annotated[tuple[Canary, ...], Field(strict=False)]

    @property
    def included(self) -> list[Canary]:
        """The canaries that are among the rows."""
        return [canary for canary in self.canaries if canary.is_included]

    @property
    def num_copies(self) -> int:
        """The rows that they are."""
        return sum(canary.repeat for canary in self.included)


def read_canaries(home: Home) -> Planted | None:
    """Return what is planted in a client's rows, or None; raise IntegrityError where the file is damaged."""
    try:
        return Planted.model_validate_json(home.canaries.read_bytes(), strict=False)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise IntegrityError(
            f"{home.canaries} is damaged: {error.errors(include_url=False, include_input=False)[0]['msg']}",
            hint="Take the canaries out with `fedcli audit plant --remove`: nothing is trained on half of them.",
        ) from error


def save_canaries(home: Home, planted: Planted) -> None:
    """Plant canaries, all at once, in a file for its owner alone."""
    make_folder(home.folder, PRIVATE_FOLDER_MODE)
    publish_file(home.canaries, planted.to_bytes(), mode=MODE)


def remove_canaries(home: Home) -> bool:
    """Take canaries out, durably; return whether there were any."""
    with explained(home.canaries):
        try:
            home.canaries.unlink()
        except FileNotFoundError:
            return False
        sync(home.folder)
    return True


def save_measurement(home: Home, name: str, document: bytes, picture: bytes | None) -> list[Path]:
    """Keep what was measured, numbers and a picture of them, in the home; return the files."""
    make_folder(home.audits, PRIVATE_FOLDER_MODE)
    files = [(home.audits / f"{name}.json", document)]
    if picture is not None:
        files.append((home.audits / f"{name}.png", picture))
    else:
        with suppress(FileNotFoundError):  # of an earlier measurement
            (home.audits / f"{name}.png").unlink()
    for path, contents in files:
        publish_file(path, contents, mode=MODE)
    return [path for path, _ in files]
