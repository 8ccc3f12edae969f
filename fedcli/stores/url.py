"""URLs of workspaces: s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder."""

import re
from urllib.parse import unquote, urlsplit

from fedcli.errors import UsageError
from fedcli.stores.objects import Objects

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|(s3|gs|gcs|az|azure|abfs|sftp):")
_CLOUD = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "abfs": "az"}
_KNOWN = "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, az://CONTAINER/FOLDER or sftp://USER@HOST/FOLDER"
_PART = re.compile(r"[A-Za-z0-9._~@+=,-]+")


def is_url(address: str) -> bool:
    """Return whether an address is a URL, and no folder's path; one that a Path has cut short is one, too."""
    return _SCHEME.match(address) is not None


def open_objects(address: str) -> Objects:
    """Return the objects of a URL; nothing is asked of the store yet.

    Raises UsageError for a URL that names none, RequirementError where its package is missing.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{_shown(address)} is no URL", hint=f"Give {_KNOWN}.") from error
    if parts.password is not None:
        raise UsageError(
            f"{_shown(address)} has a password in it, which logs and other users would see",
            hint="Use an SSH key, or the credentials that docs/STORES.md names.",
        )
    if not parts.hostname or parts.query or parts.fragment or not address.startswith(f"{address.partition(':')[0]}://"):
        raise UsageError(f"{_shown(address)} names no place for a workspace", hint=f"Give {_KNOWN}.")
    scheme, folder = parts.scheme.lower(), _folder(address, unquote(parts.path))
    if scheme == "sftp":
        from fedcli.stores.sftp import open_sftp

        is_relative = folder == "~" or folder.startswith("~/")
        return open_sftp(parts.hostname, parts.username, port, folder[2:] if is_relative else f"/{folder}")
    if scheme in _CLOUD:
        from fedcli.stores.cloud import open_cloud

        if parts.username is not None or port is not None:
            hint = "The endpoint and the credentials stand in the environment (docs/STORES.md)."
            raise UsageError(f"{_shown(address)}: {parts.netloc} is no bucket's name", hint=hint)
        return open_cloud(_CLOUD[scheme], parts.netloc, folder)
    raise UsageError(f"{_shown(address)}: fedcli knows no {scheme}://", hint=f"Give {_KNOWN}.")


def _folder(address: str, path: str) -> str:
    parts = [part for part in path.split("/") if part]
    for part in parts:
        if part in (".", "..") or not _PART.fullmatch(part):
            hint = "Use letters, digits and . _ - in the names of folders."
            raise UsageError(f"{_shown(address)}: {part!r} will not do for a folder", hint=hint)
    return "/".join(parts)


def _shown(address: str) -> str:
    """Return a URL without what may be a password."""
    return re.sub(r"//.*@", "//***@", re.split(r"[?#]", address)[0])
