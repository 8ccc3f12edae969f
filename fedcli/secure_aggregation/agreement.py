"""What two parties agree on without a word: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439)."""

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

PREFIX = "fedcli/secagg/v1"
NONCE_BYTES = 12


class Unsealable(ValueError):
    """A sealed message is not from whom, or not what, it should be."""


def label(*parts: object) -> str:
    """Return a label of HKDF: what for, and where it holds."""
    return "|".join(map(str, (PREFIX, *parts)))


def derive(own: "X25519PrivateKey", other: bytes, info: bytes) -> bytes:
    """Return 32 bytes that the holders of two keys share under a label; raise ValueError for a weak public key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), 32, salt=None, info=info).derive(shared)


def seal(key: bytes, message: bytes, what: str) -> bytes:
    """Return nonce, ciphertext and tag of a message; `what` it is must be known to whoever opens it."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, message, what.encode())


def unseal(key: bytes, sealed: bytes, what: str) -> bytes:
    """Return the message; raise Unsealable where it was sealed under another key, as something else, or changed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], what.encode())
    except (InvalidTag, ValueError) as error:
        raise Unsealable(f"cannot open the sealed {what}") from error


def commitment(secret: bytes) -> str:
    """Return what tells a secret of 32 random bytes again, and nothing of it before."""
    return hashlib.sha256(label("commit").encode() + b"|" + secret).hexdigest()
