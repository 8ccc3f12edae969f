"""A whole party that signs, written from docs/PROTOCOL.md with nothing of fedcli."""

import hashlib
import json
import os

import numpy as np
from safetensors.numpy import load, save


def sign(key, purpose, identity, contents):
    """Return the signature of stored bytes by an Ed25519PrivateKey of `cryptography`."""
    text = f"fedcli-{purpose}-v1\n{identity}\n{hashlib.sha256(contents).hexdigest()}\n"
    return key.sign(text.encode()).hex().encode()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, contents):
    """Write a file durably under its final name."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(contents)
        os.fsync(file.fileno())
    os.rename(f"{path}.tmp", path)


def take_part(workspace, client, key, train=lambda array: array + 0.01, num_samples=10):
    """Answer the open round, signed, unless that was done or the client is not drawn."""
    number = max(int(name) for name in os.listdir(f"{workspace}/rounds") if name.isdigit())
    contents = read(f"{workspace}/rounds/{number:05d}/manifest.json")
    manifest, inbox = json.loads(contents), f"{workspace}/inbox/{client}"
    if client not in manifest["cohort"] or os.path.lexists(f"{inbox}/round-{number:05d}"):
        return
    arrays = load(read(f"{workspace}/rounds/{number:05d}/adapter/adapter_model.safetensors"))
    adapter = save({name: np.asarray(train(array), np.float32) for name, array in arrays.items()})
    base, entry = hashlib.sha256(contents).hexdigest(), {"sha256": hashlib.sha256(adapter).hexdigest()}
    update = {"protocol": 1, "workspace": manifest["workspace"], "round": number, "client": client, "base": base}
    update |= {"files": {"adapter_model.safetensors": entry | {"bytes": len(adapter)}}}
    update |= {"steps": 1, "num_samples": num_samples, "train_loss": None}
    files = {"adapter_model.safetensors": adapter, "update.json": json.dumps(update).encode()}
    files["update.sig"] = sign(key, "update", manifest["workspace"], files["update.json"])
    for name, data in files.items():
        write(f"{inbox}/.tmp-{os.getpid()}/{name}", data)
    seen = base.encode() + b" " + sign(key, "ack", manifest["workspace"], contents)
    write(f"{workspace}/clients/{client}.acks/round-{number:05d}.sig", seen)
    os.rename(f"{inbox}/.tmp-{os.getpid()}", f"{inbox}/round-{number:05d}")
