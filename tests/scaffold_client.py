"""A whole SCAFFOLD client, written from docs/PROTOCOL.md with nothing of fedcli: plain SGD on a quadratic."""

import hashlib
import json
import os

import numpy as np
from safetensors.numpy import load, save


def read(path):
    """Return a file's bytes, or None where it does not exist."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    """Write a new file durably."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(descriptor, data)
    os.fsync(descriptor)
    os.close(descriptor)


def read_control(workspace, head, client, home, zero):
    """Return c_k: the candidate of the client's latest counted update in an unbroken chain of rounds that have a c."""
    for number in range(head, -1, -1):
        folder = f"{workspace}/rounds/{number:05d}"
        if not os.path.exists(f"{folder}/control.safetensors"):
            return zero
        for entry in json.loads(read(f"{folder}/manifest.json"))["aggregation"]["counted"]:
            if entry["client"] == client:
                return load(read(f"{home}/{entry['update']}"))
    raise AssertionError("round 0 has no c")


def take_part(workspace, client, home, optimum, num_samples=10):
    """Do what is due for a client whose loss is |w - optimum|^2 / 2, its candidates in a private folder of its own."""
    number = 0
    while os.path.exists(f"{workspace}/rounds/{number + 1:05d}/manifest.json"):
        number += 1
    folder = f"{workspace}/rounds/{number:05d}"
    contents = read(f"{folder}/manifest.json")
    manifest = json.loads(contents)
    assert manifest["algorithm"] == {"name": "scaffold"}
    inbox, final = f"{workspace}/inbox/{client}", f"{workspace}/inbox/{client}/round-{number:05d}"
    if client not in manifest["cohort"] or os.path.lexists(final):
        return os.path.lexists(final)
    x = load(read(f"{folder}/adapter/adapter_model.safetensors"))
    zero = {name: np.zeros_like(array) for name, array in x.items()}
    stored = read(f"{folder}/control.safetensors")
    c = load(stored) if stored else zero
    own = read_control(workspace, number, client, home, zero)
    steps, rate = manifest["train"]["steps"], manifest["train"]["learning_rate"]
    y = dict(x)
    for _ in range(steps):
        y = {name: w - rate * (w - optimum) - rate * (c[name] - own[name]) for name, w in y.items()}
    delta = {name: np.asarray((x[name] - y[name]) / (steps * rate) - c[name], np.float32) for name in x}
    y = {name: np.asarray(w, np.float32) for name, w in y.items()}
    files = {"adapter_model.safetensors": save(y), "control_delta.safetensors": save(delta)}
    update = {"protocol": 1, "workspace": manifest["workspace"], "round": number, "client": client, "steps": steps}
    update |= {"base": hashlib.sha256(contents).hexdigest(), "num_samples": num_samples, "train_loss": None}
    update["files"] = {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in files.items()}
    record = json.dumps(update).encode()
    os.makedirs(home, exist_ok=True)
    write(f"{home}/{hashlib.sha256(record).hexdigest()}", save({name: own[name] + delta[name] for name in x}))
    os.makedirs(inbox, exist_ok=True)
    temporary = f"{inbox}/.tmp-{os.getpid()}-{os.urandom(4).hex()}"
    os.mkdir(temporary)
    for name, data in (files | {"update.json": record}).items():
        write(f"{temporary}/{name}", data)
    os.rename(temporary, final)
    return True
