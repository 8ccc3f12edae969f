"""A masking party, written from docs/PROTOCOL.md without fedcli; one that means it checks the server's signatures."""

import hashlib
import json
import os
import secrets

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from safetensors.numpy import load, save
from signing_client import read, sign, write

PRIME = 2**255 - 19


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Party:
    """Client `me` with its Ed25519 key `signing` and its X25519 key `sealing`; `home` is its own folder."""

    def __init__(self, workspace, home, me, signing, sealing):
        self.workspace, self.me, self.signing, self.sealing = workspace, me, signing, sealing
        number = max(int(name) for name in os.listdir(f"{workspace}/rounds") if name.isdigit())
        self.name, self.journal = f"round-{number:05d}", f"{home}/round-{number:05d}.json"
        self.folder, self.inbox = f"{workspace}/rounds/{number:05d}", f"{workspace}/inbox/{me}"
        self.contents = read(f"{self.folder}/manifest.json")
        self.manifest = json.loads(self.contents)
        self.mode = self.manifest["privacy"]["secure_aggregation"]
        size = len(self.manifest["cohort"])
        self.threshold = max(3, (size // 2 if self.mode == "pairwise" else 2 * size // 3) + 1)
        self.started = read(f"{workspace}/attempts/{self.name}-0.json")
        attempt = json.loads(self.started)
        self.cohort, self.keys = attempt["cohort"], {}
        for entry in range(attempt["enrolment"]["number"] + 1):
            said = json.loads(read(f"{workspace}/enrolment/{entry:05d}.json"))
            if said["action"] == "enrol":
                self.keys[said["client"]] = bytes.fromhex(said["keys"]["seal"])
        self.common = {"protocol": 1, "workspace": self.manifest["workspace"], "round": number, "attempt": 0}

    def key(self, what, first, second):
        other = second if first == self.me else first
        text = (
            f"fedcli/secagg/v1|{what}|{self.manifest['workspace']}|{self.common['round']}|0|{first}|{second}".encode()
        )
        secret = self.sealing.exchange(X25519PublicKey.from_public_bytes(self.keys[other]))
        return HKDF(SHA256(), 32, None, text + self.keys[first] + self.keys[second]).derive(secret)

    def share(self, secret, name):
        halves = (int.from_bytes(half, "little") for half in (secret[:16], secret[16:]))
        rows = [[half, *(secrets.randbelow(PRIME) for _ in range(self.threshold - 1))] for half in halves]
        found = {}
        for to in self.cohort:
            points = (sum(c * (to + 1) ** power for power, c in enumerate(row)) % PRIME for row in rows)
            message, nonce = b"".join(point.to_bytes(32, "little") for point in points), secrets.token_bytes(12)
            box = ChaCha20Poly1305(self.key("seal", self.me, to))
            found[str(to)] = (nonce + box.encrypt(nonce, message, f"share|{name}".encode())).hex()
        return found

    def drop(self, train, num_samples):
        """Train, mask, keep what was masked, and drop it."""
        before = load(read(f"{self.folder}/adapter/adapter_model.safetensors"))
        changes = {name: num_samples * (np.float64(train(array)) - array) for name, array in before.items()}
        changes = {f"adapter_model.safetensors/{name}": array for name, array in changes.items()}
        changes["weight"] = np.array([float(num_samples)])
        numbers = {name: np.rint(array * 2.0**32).astype(np.int64).view(np.uint64) for name, array in changes.items()}
        seeds = {str(other): self.key("pair", *sorted((self.me, other))) for other in self.cohort if other != self.me}
        kept = {**seeds, **({"self": secrets.token_bytes(32)} if self.mode == "double" else {})}
        for other, seed in kept.items():
            stream = Cipher(ChaCha20(seed, bytes(16)), None).encryptor()
            for name in sorted(numbers):
                array = numbers[name]
                mask = np.frombuffer(stream.update(bytes(array.nbytes)), "<u8").reshape(array.shape)
                numbers[name] = array - mask if other != "self" and int(other) < self.me else array + mask
        files = {"masked.safetensors": save(numbers)}
        if self.mode == "double":
            files["shares.json"] = json.dumps({"sealed": {n: self.share(s, n) for n, s in kept.items()}}).encode()
        update = self.common | {"base": sha(self.contents), "client": self.me, "started": sha(self.started)}
        update["commitments"] = {other: sha(b"fedcli/secagg/v1|commit|" + seed) for other, seed in kept.items()}
        update["files"] = {name: {"sha256": sha(data), "bytes": len(data)} for name, data in files.items()}
        files["update.json"] = json.dumps(update).encode()
        secret = {"update": sha(files["update.json"]), "seeds": {other: seed.hex() for other, seed in seeds.items()}}
        write(self.journal, json.dumps(secret).encode())
        files["update.sig"] = sign(self.signing, "update", self.manifest["workspace"], files["update.json"])
        self.publish(self.name, files)

    def answer(self):
        """Answer the repair, if it may be answered."""
        contents, kept = read(f"{self.workspace}/repair/{self.name}-0.json"), json.loads(read(self.journal))
        repair = json.loads(contents)
        counted, dropped = [*map(int, repair["counted"])], repair["dropped"]
        checks = [sorted(counted + dropped) == self.cohort, len(counted) >= self.threshold]
        checks += [repair["started"] == sha(self.started), repair["counted"][str(self.me)] == kept["update"]]
        assert all([*checks, kept.get("answered", sha(contents)) == sha(contents), dropped or self.mode == "double"])
        write(self.journal, json.dumps(kept | {"answered": sha(contents)}).encode())
        said = self.common | {"client": self.me, "repair": sha(contents), "shares": {}}
        if self.mode == "pairwise":
            said["seeds"] = {str(other): kept["seeds"][str(other)] for other in dropped}
        else:
            given = json.loads(read(f"{self.workspace}/repair/{self.name}-0-shares-{repair['shares']['sha256']}.json"))
            for sender in counted:
                box, parts = ChaCha20Poly1305(self.key("seal", sender, self.me)), {}
                for name in ("self", *map(str, dropped)):
                    data = bytes.fromhex(given["sealed"][str(sender)][name][str(self.me)])
                    parts[name] = box.decrypt(data[:12], data[12:], f"share|{name}".encode()).hex()
                said["shares"][str(sender)] = parts
        answer = json.dumps(said).encode()
        signature = sign(self.signing, "answer", self.manifest["workspace"], answer)
        self.publish(self.name.replace("round", "repair") + "-0", {"answer.json": answer, "answer.sig": signature})

    def publish(self, name, files):
        for file, data in files.items():
            write(f"{self.inbox}/.tmp-mine/{file}", data)
        os.rename(f"{self.inbox}/.tmp-mine", f"{self.inbox}/{name}")
