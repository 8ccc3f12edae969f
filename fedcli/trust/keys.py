"""Keys of a party and of the server: Ed25519 (RFC 8032) to sign, X25519 (RFC 7748) to seal, in one PKCS8 file."""

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedcli.errors import UsageError, WorkspaceError
from fedcli.workspace.layout import Home
from fedcli.workspace.publish import publish_file, sync
from fedcli.workspace.records import PublicKeys

Purpose = Literal[
    "client", "enrolment", "update", "round", "ack", "leave", "keys", "attempt", "repair", "answer", "bundle"
]
_END = b"-----END PRIVATE KEY-----\n"


def statement(purpose: Purpose, workspace: str, digest: str) -> bytes:
    """Return what is signed: what for, in which workspace, and the SHA-256 of the stored bytes."""
    return f"fedcli-{purpose}-v1\n{workspace}\n{digest}\n".encode()


@dataclass(frozen=True)
class KeyPair:
    """The private keys of a party or the server."""

    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey

    @classmethod
    def make(cls) -> "KeyPair":
        """Return new keys from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def read(cls, path: Path) -> "KeyPair | None":
        """Read keys; None where there is no such file. Raises WorkspaceError where it is damaged, or others read it."""
        try:
            contents = path.read_bytes()
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return None
        if mode & 0o077:
            raise WorkspaceError(f"{path} may be read by others", hint=f"Run `chmod 600 {path}`; then rotate the keys.")
        blocks = [block + _END for block in contents.split(_END)[:-1]]
        try:
            signing, sealing = (load_pem_private_key(block, password=None) for block in blocks)
        except (ValueError, TypeError) as error:
            raise WorkspaceError(f"{path} does not hold two keys", hint="Restore it from a backup.") from error
        if not isinstance(signing, Ed25519PrivateKey) or not isinstance(sealing, X25519PrivateKey):
            raise WorkspaceError(f"{path} holds other keys than fedcli makes", hint="Restore it from a backup.")
        return cls(signing, sealing)

    def write(self, path: Path) -> None:
        """Write the keys for their own user alone."""
        pem = [
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for key in (self.signing, self.sealing)
        ]
        publish_file(path, b"".join(pem), mode=0o600)

    @property
    def public(self) -> PublicKeys:
        """Their public halves."""
        keys = (self.signing.public_key(), self.sealing.public_key())
        sign, seal = (key.public_bytes_raw().hex() for key in keys)
        return PublicKeys(sign=sign, seal=seal)

    def sign(self, purpose: Purpose, workspace: str, digest: str) -> bytes:
        """Return a signature as it is stored: 128 hexadecimal digits and a newline."""
        return self.signing.sign(statement(purpose, workspace, digest)).hex().encode() + b"\n"


def is_signed(keys: PublicKeys, signature: bytes, purpose: Purpose, workspace: str, digest: str) -> bool:
    """Return whether a stored signature is that of these keys, of this statement."""
    text = signature.strip()
    if not re.fullmatch(rb"[0-9a-f]{128}", text):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys.sign))
        key.verify(bytes.fromhex(text.decode()), statement(purpose, workspace, digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def digest_of(keys: PublicKeys) -> str:
    """Return the SHA-256 of both public keys, 32 bytes each."""
    return sha256(bytes.fromhex(keys.sign + keys.seal)).hexdigest()


def fingerprint(keys: PublicKeys) -> str:
    """Return what is compared by telephone: 128 bits of the keys' hash, as 8 groups of 4 hexadecimal digits."""
    return "-".join(digest_of(keys)[start : start + 4] for start in range(0, 32, 4))


def parse_fingerprint(text: str) -> str:
    """Return a fingerprint as `fingerprint` writes it; raise UsageError for what is none."""
    digits = re.sub(r"[\s:-]", "", text).lower()
    if not re.fullmatch("[0-9a-f]{32}", digits):
        raise UsageError(f"{text!r} is no fingerprint", hint="It is 32 hexadecimal digits, in 8 groups.")
    return "-".join(digits[start : start + 4] for start in range(0, 32, 4))


def keys_named(home: Home, named: PublicKeys | None) -> KeyPair | None:
    """Return a home's keys that have these public halves, None where they are not there.

    New keys take the old ones' place once they are named.
    """
    current = KeyPair.read(home.keys)
    if current is not None and current.public == named:
        return current
    following = KeyPair.read(home.next_keys)
    if following is None or following.public != named:
        return None
    os.rename(home.next_keys, home.keys)
    sync(home.folder)
    return following


def latest_keys(home: Home) -> KeyPair:
    """Return the keys that a home will use next; they are made where there are none."""
    found = KeyPair.read(home.next_keys) or KeyPair.read(home.keys)
    if found is None:
        found = KeyPair.make()
        found.write(home.keys)
    return found
