"""The contract's server rules, written again with nothing of fedcli, and random updates to try them on."""

import hashlib
import json
import os
from types import MappingProxyType

import numpy as np
from safetensors.numpy import load_file, save

from support.federation import NUM_SAMPLES, read_manifest

OTHER = MappingProxyType({"eta": 0.05, "tau": 0.01, "beta1": 0.8, "beta2": 0.95})


class Formulas:
    """The contract's server rules in float64, with nothing of fedcli: x, m, v and c by the adapter's names."""

    def __init__(self, start, *, name, eta=1e-3, tau=1e-3, beta1=0.9, beta2=0.99, mu=0.9, num_clients=3, **variant):
        self.name, self.eta, self.tau, self.beta1, self.beta2 = name, eta, tau, beta1, beta2
        self.mu, self.num_clients, self.variant = mu, num_clients, variant
        self.x = {key: array.astype(np.float64) for key, array in start.items()}
        self.m, self.v, self.c = {}, {}, {}

    def step(self, updates):
        """Merge a round's updates: num_samples, adapter and control delta by client."""
        unweighted = self.name in ("fedadagrad", "fedyogi", "fedadam", "diloco")
        shares = {client: 1 if unweighted else samples for client, (samples, _, _) in updates.items()}
        for key, x in self.x.items():
            sent = {client: adapter[key].astype(np.float64) for client, (_, adapter, _) in updates.items()}
            mean = sum(shares[client] * (sent[client] - x) for client in updates) / sum(shares.values())
            if self.name == "scaffold":
                change = sum(delta[key].astype(np.float64) for _, _, delta in updates.values()) / self.num_clients
                self.c[key] = self.c.get(key, 0) + change
            self.x[key] = x + self._move(key, mean)

    def _move(self, key, mean):
        if self.name in ("fedavg", "fedprox", "scaffold"):
            return mean
        if self.name == "diloco":
            self.m[key] = self.mu * self.m.get(key, 0) + mean
            return self.eta * (mean + self.mu * self.m[key])
        v = self.v.get(key, np.full_like(mean, self.tau**2))
        if self.name == "fedadagrad":
            self.v[key] = v + mean**2
            return self.eta * mean / (np.sqrt(self.v[key]) + self.tau)
        new = 1 if self.variant.get("momentum") == "heavy_ball" else 1 - self.beta1
        self.m[key] = m = self.beta1 * self.m[key] + new * mean if key in self.m else mean
        if self.name == "fedavgm":
            return m
        square = mean**2 if self.variant.get("second_moment") == "delta" else m**2
        if self.name == "fedyogi":
            self.v[key] = v - (1 - self.beta2) * square * np.sign(v - square)
        else:
            self.v[key] = self.beta2 * v + (1 - self.beta2) * square
        return self.eta * m / (np.sqrt(self.v[key]) + self.tau)

    def check(self, workspace, number):
        """Assert that a round on disk holds this adapter, and this state and no other."""
        optimizer = {f"m.{key}": m for key, m in self.m.items()} | {f"v.{key}": v for key, v in self.v.items()}
        expected = {"adapter/adapter_model": self.x, "optimizer": optimizer, "control": self.c}
        for name, exact in expected.items():
            path = workspace / "rounds" / f"{number:05d}" / f"{name}.safetensors"
            assert path.exists() == bool(exact)
            found = load_file(path) if exact else {}
            assert found.keys() == exact.keys()
            for key, array in found.items():
                assert array.dtype == np.float32
                assert np.abs(array - exact[key]).max() <= 1e-6 * np.abs(exact[key]).max(), (number, name, key)


def random_update(workspace, number, client):
    """Return num_samples, a random adapter and a random control delta, the same for the same round and client."""
    generator = np.random.default_rng([number, client])
    shapes = {name: entry["shape"] for name, entry in sorted(read_manifest(workspace, number)["tensors"].items())}
    adapter, control = (
        {name: generator.normal(scale=scale, size=shape).astype(np.float32) for name, shape in shapes.items()}
        for scale in (0.2, 1.0)
    )
    return NUM_SAMPLES[client], adapter, control


def drop(workspace, number, client, update):
    """Drop an update as the contract says, with the files that the manifest asks for."""
    num_samples, adapter, control = update
    manifest = (workspace / "rounds" / f"{number:05d}" / "manifest.json").read_bytes()
    known = {"adapter_model.safetensors": adapter, "control_delta.safetensors": control}
    files = {name: save(known[name]) for name in json.loads(manifest)["update_files"]}
    entries = {name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for name, c in files.items()}
    record = {"protocol": 1, "workspace": json.loads(manifest)["workspace"], "round": number, "client": client}
    record |= {"base": hashlib.sha256(manifest).hexdigest(), "num_samples": num_samples, "steps": 1}
    record |= {"train_loss": None, "files": entries}
    temporary = workspace / "inbox" / str(client) / ".tmp-here"
    temporary.mkdir(parents=True)
    for name, contents in (files | {"update.json": json.dumps(record).encode()}).items():
        (temporary / name).write_bytes(contents)
    os.rename(temporary, temporary.with_name(f"round-{number:05d}"))


def drop_all(workspace, number):
    """Let the round's cohort drop random updates; return these."""
    updates = {c: random_update(workspace, number, c) for c in read_manifest(workspace, number)["cohort"]}
    for client, update in updates.items():
        drop(workspace, number, client, update)
    return updates
