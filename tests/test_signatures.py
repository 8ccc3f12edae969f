"""Signatures: who is enrolled is counted, and a past that was rewritten, swapped, replayed or forked is named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import signing_client
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.federation import NUM_SAMPLES, Stub, configure, noisy, read_adapter, read_manifest, read_update
from support.kills import copies_killed_at_every_call
from support.processes import ENVIRONMENT, SMALL, Run, runner, settings, warm
from support.rewriting import ATTACKS, rewrite
from support.warm import Place, write_rows

from fedcli import Federation, Observer
from fedcli.client.due import train_client
from fedcli.errors import ConfigError, FedError, IntegrityError, NotReadyError, UsageError
from fedcli.server.enrol import found_trust, open_trust
from fedcli.trust.keys import KeyPair, fingerprint, is_signed, parse_fingerprint, statement
from fedcli.workspace.enrolment import read_enrolment
from fedcli.workspace.history import publish_round, read_identity, read_start
from fedcli.workspace.layout import Workspace, default_home, server_home
from fedcli.workspace.parsing import sha256

slow = pytest.mark.slow
SEAL = "00" * 31 + "09"
ACTIONS = ("leave", "revoke")


@pytest.fixture(scope="session")
def unjoined(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that waits for parties, made without a model, and beside it where keys lie; it is never changed."""
    folder = tmp_path_factory.mktemp("signed")
    workspace = Workspace(Path(shutil.copytree(small_template, folder / "W", ignore=shutil.ignore_patterns("data"))))
    configure(workspace.root, "data.source=null")
    old = read_identity(workspace)
    identity = old.model_copy(update={"signatures": "required", "simulation": False})
    workspace.identity.write_bytes(identity.to_bytes())
    start = read_start(workspace)
    files = {name: start.read(name) for name in start.manifest.files}
    shutil.rmtree(workspace.rounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        trust = found_trust(workspace, identity)
        assert trust is not None
        named = {"enrolment": trust.enrolment.head, "fedcli": "1"}
        assert publish_round(workspace, start.manifest.model_copy(update=named), files, trust.sign_round)
        trust.note_round(read_start(workspace))
    return folder


@pytest.fixture(scope="session")
def enrolled(unjoined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with clients 0 and 1 of fedcli and a foreign client 2, all enrolled."""
    folder = Path(shutil.copytree(unjoined, tmp_path_factory.mktemp("enrolled") / "P"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        federation = Federation.open(folder / "W")
        for client in (0, 1):
            texts = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(NUM_SAMPLES[client])]
            rows = write_rows(folder / f"rows-{client}.jsonl", texts)
            federation.server.enrol(client, federation.client(client).join(rows, share="minimal").commit())
        join_as_2(federation.path, federation.state.identity.id, foreign_key())
        federation.server.enrol(2, federation.keys().clients[2].fingerprint)
    return folder


def foreign_key() -> Ed25519PrivateKey:
    """Return client 2's key."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def join_as_2(workspace: Path, identity: str, key: Ed25519PrivateKey) -> None:
    """Register client 2 as docs/PROTOCOL.md says it."""
    keys = {"sign": key.public_key().public_bytes_raw().hex(), "seal": SEAL}
    card = {"protocol": 1, "workspace": identity, "client": 2, "data": {"num_rows": 447}, "keys": keys}
    contents = json.dumps(card).encode()
    signing_client.write(f"{workspace}/clients/2.json", contents)
    signing_client.write(f"{workspace}/clients/2.sig", signing_client.sign(key, "client", identity, contents))


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.fixture
def place(enrolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a workspace with three enrolled parties."""
    return used(enrolled, tmp_path, monkeypatch)


def used(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a workspace and its keys, and let this process find them."""
    folder = Path(shutil.copytree(template, tmp_path / "P"))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    return folder / "W"


def identity_of(workspace: Path) -> str:
    return json.loads((workspace / "workspace.json").read_bytes())["id"]


def train(workspace: Path, *clients: int) -> None:
    """Let clients answer: 0 and 1 with fedcli's own commit, 2 with the client that was written from the page."""
    for client in clients or (0, 1, 2):
        if client == 2:
            signing_client.take_part(workspace, 2, foreign_key(), noisy(2), NUM_SAMPLES[2])
        else:
            result = train_client(Federation.open(workspace).state, client, Stub(), observer=Observer())
            assert result.status == "submitted"


def merge(workspace: Path, **options: object):
    return Federation.open(workspace).server.aggregate(**options).aggregation


def play(workspace: Path, rounds: int = 2) -> None:
    """Train and merge so many rounds."""
    for _ in range(rounds):
        train(workspace)
        merge(workspace)


def problems(workspace: Path, **options: object) -> list[str]:
    """Return what `verify` finds, with the path's last parts in front."""
    found = Federation.open(workspace).verify(**options).violations
    return [f"{violation.path.relative_to(violation.path.parents[2])}: {violation.problem}" for violation in found]


def test_a_statement_and_its_signature_are_what_the_page_says() -> None:
    assert statement("update", "w-1", "ab") == b"fedcli-update-v1\nw-1\nab\n"
    key = KeyPair.make()
    signature = key.sign("update", "w-1", "ab")
    assert (len(signature), signature[-1:]) == (129, b"\n")
    assert is_signed(key.public, signature, "update", "w-1", "ab")
    others = [("round", "w-1", "ab"), ("update", "w-2", "ab"), ("update", "w-1", "ac")]
    assert not any(is_signed(key.public, signature, *other) for other in others)
    assert not is_signed(KeyPair.make().public, signature, "update", "w-1", "ab")
    assert not any(is_signed(key.public, bad, "update", "w-1", "ab") for bad in (b"", b"00", b"zz" * 64, signature * 2))
    both = bytes.fromhex(key.public.sign + key.public.seal)
    digits = hashlib.sha256(both).hexdigest()[:32]
    assert fingerprint(key.public).replace("-", "") == digits
    assert parse_fingerprint(digits.upper()) == parse_fingerprint(fingerprint(key.public).replace("-", ":"))
    with pytest.raises(UsageError, match="no fingerprint"):
        parse_fingerprint("1234")


def test_keys_are_one_file_of_their_owner_alone(tmp_path: Path) -> None:
    key = KeyPair.make()
    key.write(tmp_path / "keys.pem")
    assert (tmp_path / "keys.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys.pem").read_bytes().count(b"BEGIN PRIVATE KEY") == 2  # PKCS8
    again = KeyPair.read(tmp_path / "keys.pem")
    assert again is not None
    assert again.public == key.public
    (tmp_path / "keys.pem").chmod(0o640)
    with pytest.raises(FedError, match="may be read by others"):
        KeyPair.read(tmp_path / "keys.pem")
    assert KeyPair.read(tmp_path / "no.pem") is None


def test_a_whole_federation_of_signing_parties_is_counted_and_verified(place: Path) -> None:
    play(place)
    head = Federation.open(place).round()
    assert (head.number, head.manifest.state) == (2, "finished")
    for number in (1, 2):
        assert [entry.client for entry in Federation.open(place).round(number).manifest.aggregation.counted] == [
            0,
            1,
            2,
        ]
    done = Federation.open(place).verify()
    assert done.violations == []
    # 4 entries of the enrolment, 3 rounds, 6 updates, 6 countersignatures
    assert done.num_signatures == 4 + 3 + 6 + 6
    before, number = read_adapter(place, 1), sum(NUM_SAMPLES.values())
    for name, array in read_adapter(place, 2).items():
        mean = sum(NUM_SAMPLES[client] * read_update(place, 1, client)[name] for client in NUM_SAMPLES) / number
        assert abs(array - mean).max() < 1e-6 * max(1, abs(before[name]).max())
    manifest = read_manifest(place, 1)
    assert manifest["enrolment"]["number"] == 3
    assert manifest["fedcli"]


def test_the_page_s_client_needs_few_lines_and_no_fedcli() -> None:
    lines = Path(signing_client.__file__).read_text().splitlines()
    assert len(lines) <= 50
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"hashlib", "json", "numpy", "os", "safetensors"}  # and the key comes from cryptography


@slow
def test_a_simulation_imports_no_cryptography_and_has_no_file_more(small: Path) -> None:
    code = (
        "import sys\nfrom fedcli.cli import main\n"
        "assert main(['server', 'aggregate', '--partial']) == 6\nassert main(['status']) == 0\n"
        "assert main(['verify']) == 0\n"
        "assert not {'cryptography', 'fedcli.trust.keys', 'fedcli.trust.chain'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=small, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(small.rglob("*.sig"))
    assert not {"enrolment", "fedcli"} & read_manifest(small, 0).keys()
    assert "signatures" not in json.loads((small / "workspace.json").read_bytes())


@slow
def test_signatures_are_fixed_by_init_and_not_for_a_simulation(small: Path, place: Path) -> None:
    for workspace, wanted in ((small, "required"), (place, "off")):
        configure(workspace, f"federation.signatures={wanted}")
        with pytest.raises(ConfigError, match=r"federation\.signatures"):
            Federation.open(workspace)
    with pytest.raises(ConfigError, match="simulation"):
        Federation.create(small.parent / "new", settings={"federation.signatures": "required"})


# What is refused


@slow
def test_an_update_is_waited_for_until_its_party_is_enrolled(
    unjoined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = used(unjoined, tmp_path, monkeypatch)
    federation = Federation.open(workspace)
    join_as_2(workspace, identity_of(workspace), foreign_key())
    train(workspace, 2)
    told = federation.keys().clients[2].fingerprint
    with pytest.raises(NotReadyError, match="not enrolled: 2") as raised:
        merge(workspace)
    assert f"fedcli server enrol --id 2 --fingerprint {told}" in raised.value.hint
    with pytest.raises(NotReadyError, match="not enrolled: 2"):
        merge(workspace, partial=True)
    with pytest.raises(UsageError, match=rf"client 2 registers \d+ rows; .* {told}"):
        federation.server.enrol(2)
    with pytest.raises(IntegrityError, match="not 0000-"):
        federation.server.enrol(2, "0000" * 8)
    assert federation.server.enrol(2, told) == (told, True)
    assert federation.server.enrol(2, told) == (told, False)
    shutil.copytree(workspace / "inbox/2/round-00000", workspace / "inbox/0/round-00000")
    record = workspace / "inbox/0/round-00000/update.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"client": 0}))
    merged = merge(workspace, partial=True)
    assert [entry.client for entry in merged.counted] == [2]
    assert {entry.client: entry.code for entry in merged.refused} == {0: "unenrolled"}
    with pytest.raises(NotReadyError, match="has not joined"):
        federation.server.enrol(1)


def test_what_nobody_enrolled_signed_is_refused_by_its_code(place: Path) -> None:
    train(place)
    (place / "inbox/0/round-00000/update.sig").unlink()
    other = KeyPair.make().sign("update", identity_of(place), "00" * 32)
    (place / "inbox/1/round-00000/update.sig").write_bytes(other)
    refused = {entry.client: entry.code for entry in merge(place, refuse_arriving=True).refused}
    assert refused == {0: "unsigned", 1: "signature"}
    assert problems(place) == []
    assert Federation.open(place).verify().remarks == [], "they are refused again"


@slow
def test_an_update_that_was_changed_after_it_was_signed_is_refused(place: Path) -> None:
    train(place)
    path = place / "inbox/2/round-00000/update.json"
    path.write_bytes(path.read_bytes().replace(b'"num_samples": 447', b'"num_samples": 99447'))
    assert {entry.client: entry.code for entry in merge(place).refused} == {2: "signature"}


@slow
def test_an_update_that_is_replayed_is_refused(place: Path) -> None:
    train(place)
    merge(place)
    old, new = place / "inbox/2/round-00000", place / "inbox/2/round-00001"
    shutil.copytree(old, new)
    train(place, 0, 1)
    record = json.loads((new / "update.json").read_bytes())
    assert {entry.client: entry.code for entry in merge(place, partial=True, dry_run=True).refused} == {
        2: "wrong_round"
    }
    base = hashlib.sha256((place / "rounds/00001/manifest.json").read_bytes()).hexdigest()
    (new / "update.json").write_text(json.dumps(record | {"round": 1, "base": base}))
    assert {entry.client: entry.code for entry in merge(place).refused} == {2: "signature"}


@slow
def test_a_key_of_another_client_signs_nothing(place: Path) -> None:
    train(place, 0, 2)
    shutil.copytree(place / "inbox/2/round-00000", place / "inbox/1/round-00000")
    record = place / "inbox/1/round-00000/update.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"client": 1}))
    signature = signing_client.sign(foreign_key(), "update", identity_of(place), record.read_bytes())
    record.with_name("update.sig").write_bytes(signature)
    assert {entry.client: entry.code for entry in merge(place).refused} == {1: "signature"}


ODD_SIGNATURES: dict[str, tuple[object, str]] = {
    "empty": (lambda path, _: path.write_bytes(b""), "unsigned"),
    "a link": (lambda path, _: (path.rename(path.with_name("x")), path.symlink_to("x")), "symlink"),
    "a FIFO": (lambda path, _: (path.unlink(), os.mkfifo(path)), "not_regular"),
    "a folder": (lambda path, _: (path.unlink(), path.mkdir()), "not_regular"),
    "a megabyte": (lambda path, _: path.write_bytes(path.read_bytes() * 8000), "size"),
    "a terabyte": (lambda path, _: os.truncate(path, 2**40), "size"),
    "the same twice": (lambda path, _: path.write_bytes(path.read_bytes() * 2), "signature"),
    "cut": (lambda path, _: path.write_bytes(path.read_bytes()[:100]), "unsigned"),
    "no digits": (lambda path, _: path.write_bytes(b"zz" * 64), "signature"),
    "zeros": (lambda path, _: path.write_bytes(b"00" * 64), "signature"),
    "gone": (lambda path, _: path.unlink(), "unsigned"),
    "of a round": (lambda path, said: path.write_bytes(own_signature("round", said)), "signature"),
    "of a countersignature": (lambda path, said: path.write_bytes(own_signature("ack", said)), "signature"),
    "of another workspace": (lambda path, said: path.write_bytes(own_signature("update", said, "w")), "signature"),
    "of another file": (lambda path, said: path.write_bytes(own_signature("update", said + b" ")), "signature"),
}


def own_signature(purpose: str, contents: bytes, workspace: str | None = None) -> bytes:
    """Return what client 2 signs, in hex."""
    said = json.loads(contents)["workspace"] if workspace is None else workspace
    return foreign_key().sign(statement(purpose, said, sha256(contents))).hex().encode()


@slow
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_signature_of_any_other_kind_is_refused_and_the_round_goes_on(
    enrolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    place = used(enrolled, tmp_path, monkeypatch)
    configure(place, f"aggregation.rule={rule}")
    train(place)
    for name, (damage, code) in ODD_SIGNATURES.items():
        copy = Path(shutil.copytree(place, tmp_path / "copies/W"))
        update = copy / "inbox/2/round-00000"
        damage(update / "update.sig", (update / "update.json").read_bytes())
        merged = merge(copy, dry_run=True, refuse_arriving=True)
        assert {entry.client: entry.code for entry in merged.refused} == {2: code}, name
        assert [entry.client for entry in merged.counted] == [0, 1], name
        shutil.rmtree(copy)


@slow
def test_a_word_of_leaving_is_not_obeyed_twice_nor_for_another(place: Path) -> None:
    federation = Federation.open(place)
    federation.client(1).leave()
    shutil.copy(place / "clients/1.leave", place / "clients/0.leave")
    shutil.copy(place / "clients/1.leave", place / "clients/2.leave")
    train(place, 0, 2)
    assert [entry.client for entry in merge(place).counted] == [0, 2]
    told = federation.client(1).join(place.parent / "rows-1.jsonl").commit()
    federation.server.enrol(1, told)  # its old word lies there still
    configure(place, "federation.rounds=3")
    train(place, 0, 2)
    merge(place)
    assert Federation.open(place).round().manifest.cohort == [0, 1, 2]
    assert Federation.open(place).keys().clients[1].state == "enrolled"


@slow
@pytest.mark.parametrize("garbage", [b"{", b"{}", b"\xff", b"[" * 60_000, b'{"client": ' + b"9" * 5000 + b"}"])
def test_garbage_as_the_registration_of_who_is_not_enrolled_stops_no_merge(unjoined: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, garbage: bytes) -> None:  # fmt: skip
    place = used(unjoined, tmp_path, monkeypatch)
    identity = identity_of(place)
    join_as_2(place, identity, foreign_key())
    federation = Federation.open(place)
    federation.server.enrol(2, federation.keys().clients[2].fingerprint)
    (place / "clients/1.json").write_bytes(garbage)
    (place / "clients/0.json").mkdir()
    train(place, 2)
    for client in (0, 1):
        shutil.copytree(place / "inbox/2/round-00000", place / f"inbox/{client}/round-00000")
    aggregation = merge(place)
    assert [entry.client for entry in aggregation.counted] == [2]
    assert [entry.client for entry in aggregation.refused] == [0, 1]
    assert problems(place) == []


# The past


def server_key(workspace: Path) -> KeyPair:
    key = KeyPair.read(server_home(identity_of(workspace)).keys)
    assert key is not None
    return key


def hide_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let this process be somebody who has no key and no history."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nobody"))


@slow
def test_each_way_to_rewrite_the_past_is_named_where_rounds_are_signed(
    enrolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who has no key and no history of the federation."""
    place = used(enrolled, tmp_path, monkeypatch)
    configure(place, "federation.rounds=4")
    play(place)
    hide_private(monkeypatch, tmp_path)
    assert problems(place) == []
    unnamed = []
    for name, (attack, _) in ATTACKS.items():
        if name in ("all anew", "the last round is gone"):  # of these homes tell (below)
            continue
        copy = Path(shutil.copytree(place, tmp_path / "copy/W"))
        attack(copy)
        if not problems(copy):
            unnamed.append(name)
        shutil.rmtree(copy)
    assert unnamed == []


def test_a_past_rewritten_with_consistent_hashes_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(place)
    hide_private(monkeypatch, tmp_path)
    assert problems(place) == []
    rewrite(place, 2, lambda document: document["aggregation"].update(missing=[]))
    found = problems(place)
    assert "W/rounds/00002: has a manifest.sig that is not the server's, or of another manifest.json" in found


@slow
def test_a_past_that_the_server_itself_rewrote_is_named_by_witnesses(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(place)
    rewrite(place, 0, lambda document: document.update(note="rewritten"), key=server_key(place))
    own = problems(place)
    assert any("is not the round that client 0 trained on" in problem for problem in own)
    assert any("is not the round that this server published" in problem for problem in own)
    hide_private(monkeypatch, tmp_path)
    witnesses = [problem for problem in problems(place) if "countersigned another round" in problem]
    assert len(witnesses) == 6
    assert "client 2 countersigned another round 0" in "".join(witnesses)


@slow
def test_a_swapped_manifest_is_named(place: Path) -> None:
    play(place, 1)
    rewrite(place, 1, lambda document: document["train"].update(seed=7))
    assert any(problem.startswith("W/rounds/00001: has a manifest.sig") for problem in problems(place))
    with pytest.raises(IntegrityError, match=r"manifest\.sig that is not the server's"):
        train(place, 0)
    (place / "rounds/00001/manifest.sig").unlink()
    assert any("has no manifest.sig" in problem for problem in problems(place))


@slow
def test_a_fork_that_is_shown_to_one_party_is_named_by_it_and_by_the_others(place: Path, tmp_path: Path) -> None:
    train(place)
    fork_of = Path(shutil.copytree(place, tmp_path / "fork"))
    shutil.rmtree(fork_of / "inbox/1/round-00000")
    merge(place)
    merge(fork_of, partial=True)
    train(fork_of, 0)  # it sees the fork first
    with pytest.raises(IntegrityError, match="not the round 1 that client 0 trained on"):
        train(place, 0)
    shutil.copytree(fork_of / "clients/0.acks", place / "clients/0.acks", dirs_exist_ok=True)
    found = "".join(problems(place))
    assert "client 0 countersigned another round 1" in found
    assert "a fork was shown to it, or the past was rewritten" in found


@slow
def test_an_update_that_was_swapped_after_it_was_counted_is_named(place: Path) -> None:
    play(place, 1)
    path = place / "inbox/2/round-00000"
    shutil.rmtree(path)
    key = Ed25519PrivateKey.generate()
    shutil.move(place / "rounds/00001", place / "later")
    signing_client.take_part(place, 2, key, noisy(5), 5)
    shutil.move(place / "later", place / "rounds/00001")
    assert any("was counted, and is not valid any more: signature" in problem for problem in problems(place))


@slow
def test_the_enrolment_cut_changed_or_forged_is_named(place: Path, tmp_path: Path) -> None:
    play(place, 1)
    Federation.open(place).server.revoke(2)
    cut = Path(shutil.copytree(place, tmp_path / "cut"))
    (cut / "enrolment/00004.json").unlink()
    with pytest.raises(IntegrityError, match="lacks entry 4 of this server: revoke of client 2"):
        merge(cut, partial=True)
    assert any("another entry 4 of the enrolment" in problem for problem in problems(cut))
    (cut / "enrolment/00002.json").unlink()
    assert any("00002.json is missing, and 00003.json stands" in problem for problem in problems(cut))
    entry = place / "enrolment/00004.json"
    document = json.loads(entry.read_bytes()) | {"client": 1}
    document.pop("checksum")
    entry.write_text(json.dumps(document))
    assert any("00004.json: is not signed by the server" in problem for problem in problems(place))


@slow
def test_a_workspace_that_no_longer_asks_for_signatures_is_refused_by_all(place: Path) -> None:
    path = place / "workspace.json"
    document = json.loads(path.read_bytes())
    document.pop("signatures")
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="no longer says that signatures are required"):
        train(place, 0)
    with pytest.raises(IntegrityError, match="no longer says that signatures are required"):
        merge(place)
    assert any("does not say that signatures are required" in problem for problem in problems(place))


@slow
def test_another_server_is_named_by_pins_and_by_the_parties(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    play(place, 1)
    trust = tmp_path / "trust.json"
    code, out, _ = run("keys", "show", "--json", "-w", place)
    assert code == 0
    trust.write_text(out)
    assert problems(place, trust=trust) == []
    home = server_home(identity_of(place))
    shutil.move(home.folder, tmp_path / "true server")
    shutil.rmtree(place / "enrolment")
    configure(place, "federation.rounds=2")
    false = KeyPair.make()
    home.folder.mkdir()
    false.write(home.keys)
    federation = Federation.open(place)
    forged = found_trust(federation.workspace, federation.state.identity)
    assert forged is not None
    with pytest.raises(IntegrityError, match="signed by another server than yours"):
        train(place, 0)
    hide_private(monkeypatch, tmp_path)
    assert any("signed by another server than yours" in problem for problem in problems(place, trust=trust))


@slow
def test_a_client_whose_keys_were_replaced_by_the_server_is_named_by_its_pin(place: Path, tmp_path: Path) -> None:
    trust = tmp_path / "trust.json"
    ring = Federation.open(place).keys()
    keys = {client: {"sign": owner.sign, "seal": owner.seal} for client, owner in ring.clients.items()}
    server = {"sign": ring.server.sign, "seal": ring.server.seal}
    trust.write_text(json.dumps({"workspace": ring.workspace, "server": server, "clients": keys}))
    false = Ed25519PrivateKey.generate()
    join_as_2(place, ring.workspace, false)
    federation = Federation.open(place)
    federation.server.enrol(2, federation.keys().following[2])
    assert problems(place) == []
    assert problems(place, trust=trust) == [
        "W/enrolment/00004.json: client 2 has new keys, which its pinned ones did not sign"
    ]
    trust.write_text("{}")
    with pytest.raises(UsageError, match="holds no keys"):
        problems(place, trust=trust)


# Leaving, new keys


@slow
@pytest.mark.parametrize("how", ACTIONS)
def test_who_left_or_was_revoked_is_not_waited_for_nor_drawn_nor_counted(place: Path, how: str) -> None:
    federation = Federation.open(place)
    train(place, 0, 2)
    with pytest.raises(NotReadyError, match="missing: 1"):
        merge(place)
    if how == "leave":
        assert federation.client(1).leave()
        assert not federation.client(1).leave()
    else:
        assert federation.server.revoke(1)
        assert not federation.server.revoke(1)
    assert federation.client(1).train().status == "gone"
    merged = merge(place)
    assert ([entry.client for entry in merged.counted], merged.missing) == ([0, 2], [1])
    head = Federation.open(place).round()
    assert (head.number, head.manifest.cohort) == (1, [0, 2])
    assert problems(place) == []
    assert Federation.open(place).keys().clients[1].state == how


@slow
def test_an_update_of_who_left_meanwhile_is_refused(place: Path) -> None:
    train(place)
    Federation.open(place).client(1).leave()
    assert {entry.client: entry.code for entry in merge(place).refused} == {1: "unenrolled"}
    assert problems(place) == []


@slow
def test_scaffold_counts_those_who_are_left(place: Path) -> None:
    from fedcli.server.merge import MergeInputs, combine

    Federation.open(place).server.revoke(2)
    configure(place, "algorithm.name=scaffold")
    train(place, 0, 1)
    merge(place)
    train(place)
    merge(place)
    head = Federation.open(place).round(1)
    algorithm = __import__("fedcli.config", fromlist=["algorithm_from"]).algorithm_from(head.manifest.algorithm)
    files, _ = combine(MergeInputs(head, algorithm, 2, [0, 1], 2, Observer()))
    assert files is not None
    stored = read_manifest(place, 2)["files"]["control.safetensors"]["sha256"]
    assert sha256(files["control.safetensors"]) == stored
    assert problems(place) == []


def leave_all_but(place: Path, *, algorithm: str = "fedavg", how: str = "leave", answers: bool = False) -> int:
    """Merge round 0, and let all of round 1's cohort, which is one client, leave; return that one."""
    configure(place, f"algorithm.name={algorithm}", "federation.per_round=1", "federation.rounds=4")
    if algorithm == "scaffold":
        shutil.rmtree(place / "rounds")
        Federation(Workspace(place)).server.open()
        federation = Federation.open(place)
        train(place, *federation.round().manifest.cohort)
    else:
        train(place)
    merge(place)
    federation = Federation.open(place)
    (gone,) = federation.round().manifest.cohort
    if answers:
        train(place, gone)
    if how == "leave" and gone != 2:
        federation.client(gone).leave()
    else:
        federation.server.revoke(gone)
    return gone


@slow
@pytest.mark.parametrize(
    ("algorithm", "how", "answers"),
    [
        ("fedyogi", "revoke", False),
        ("fedavg", "leave", True),
        ("fedavgm", "revoke", True),
        ("fedadam", "leave", False),
    ],
)
def test_a_round_whose_whole_cohort_is_gone_ends_and_the_next_one_draws_those_who_are_left(
    place: Path, run: Run, algorithm: str, how: str, answers: bool
) -> None:
    gone = leave_all_but(place, algorithm=algorithm, how=how, answers=answers)
    status, shown, _ = run("server", "aggregate", "-w", place)
    assert status == 0
    assert "merged no update: all clients of the round have left or were revoked; the adapter stays as it is" in shown
    before, after = read_manifest(place, 1), read_manifest(place, 2)
    aggregation = after["aggregation"]
    assert (aggregation["counted"], aggregation["missing"]) == ([], [] if answers else [gone])
    assert [entry["code"] for entry in aggregation["refused"]] == ["unenrolled"] * answers
    assert gone not in after["cohort"]
    assert after["files"] == before["files"]  # the adapter, and the server's state
    assert after["cost"]["total_bytes_up"] == before["cost"]["total_bytes_up"]
    assert problems(place) == []
    train(place, *after["cohort"])
    assert [entry.client for entry in merge(place).counted] == after["cohort"]
    assert problems(place) == []
    for command in (["status"], ["status", "--json"], ["report"], ["verify"], ["export", place.parent / "E"]):
        assert run(*command, "-w", place)[0] == 0, command


@slow
def test_a_deserted_round_keeps_scaffolds_controls_and_what_its_clients_keep(place: Path) -> None:
    gone = leave_all_but(place, algorithm="scaffold")
    merge(place)
    assert read_manifest(place, 2)["files"] == read_manifest(place, 1)["files"]
    assert "control.safetensors" in read_manifest(place, 2)["files"]
    following = read_manifest(place, 2)["cohort"]
    assert gone not in following
    assert problems(place) == []


@slow
def test_where_nobody_is_left_to_draw_the_error_says_what_to_do(place: Path, run: Run) -> None:
    for client in range(3):
        Federation.open(place).server.revoke(client)
    status, _, said = run("server", "aggregate", "-w", place)
    assert status == 6
    assert "nobody is left to draw for the next round: all clients have left or were revoked" in said
    assert "Enrol a party with `fedcli server enrol`, or end here: set federation.rounds to 1" in said
    assert "fedcli server enrol --id N" in run("status", "-w", place)[2]
    configure(place, "federation.rounds=1")
    assert "fedcli server aggregate" in run("status", "-w", place)[2]
    assert run("server", "aggregate", "-w", place)[0] == 0
    head = Federation.open(place).round()
    assert (head.number, head.manifest.state) == (1, "finished")
    assert head.manifest.files == Federation.open(place).round(0).manifest.files
    assert problems(place) == []


@slow
@pytest.mark.parametrize("options", [{"partial": True}, {"dry_run": True}, {"algorithm": "fedyogi"}])
def test_a_deserted_round_ends_with_every_option(place: Path, options: dict) -> None:
    leave_all_but(place)
    result = Federation.open(place).server.aggregate(**options)
    assert (result.status, result.aggregation.counted) == ("dry_run" if "dry_run" in options else "published", [])
    assert problems(place) == []


@slow
def test_a_round_without_an_update_whose_cohort_has_not_left_is_named(place: Path, run: Run) -> None:
    """The server's own keys sign it: only the enrolment tells."""
    leave_all_but(place)
    merge(place)
    path, trust = place / "rounds/00002/manifest.json", open_trust(Workspace(place), read_identity(Workspace(place)))
    document = json.loads(path.read_bytes()) | {"enrolment": read_manifest(place, 1)["enrolment"]}
    document.pop("checksum")
    path.write_text(json.dumps(document))
    path.with_name("manifest.sig").write_bytes(trust.sign_round(path.read_bytes()))
    assert any("counts no update, and of the cohort before not all had left" in problem for problem in problems(place))


@slow
def test_who_left_can_be_enrolled_again(place: Path) -> None:
    federation = Federation.open(place)
    federation.client(1).leave()
    train(place, 0, 2)
    merge(place)
    told = federation.client(1).join(place.parent / "rows-1.jsonl").commit()
    federation.server.enrol(1, told)
    configure(place, "federation.rounds=3")
    train(place, 0, 2)
    merge(place)
    assert Federation.open(place).round().manifest.cohort == [0, 1, 2]
    assert problems(place) == []


@slow
def test_a_party_s_new_keys_are_signed_by_the_old_ones_and_used_once_enrolled(place: Path) -> None:
    federation = Federation.open(place)
    old = federation.keys().clients[0].fingerprint
    new = federation.client(0).rotate_keys()
    assert federation.client(0).rotate_keys() == new  # until they are enrolled
    assert federation.keys().following == {0: new}
    train(place)
    assert [entry.client for entry in merge(place).counted] == [0, 1, 2]  # signed with the old ones
    assert federation.server.enrol(0) == (new, True)
    home = default_home(identity_of(place), 0)
    train(place)
    assert not home.next_keys.exists()
    assert [entry.client for entry in merge(place).counted] == [0, 1, 2]
    assert old != new == Federation.open(place).keys().clients[0].fingerprint
    assert problems(place) == []


@slow
def test_what_a_party_signed_before_it_went_on_to_new_keys_counts_in_that_round_alone(place: Path) -> None:
    home = default_home(identity_of(place), 0)
    train(place)
    oldest = KeyPair.read(home.keys)
    assert oldest is not None
    for _ in range(2):
        Federation.open(place).client(0).rotate_keys()
        assert Federation.open(place).server.enrol(0)[1]
    assert [entry.client for entry in merge(place).counted] == [0, 1, 2]
    train(place)
    record = (place / "inbox/0/round-00001/update.json").read_bytes()
    signature = oldest.sign("update", identity_of(place), sha256(record))
    (place / "inbox/0/round-00001/update.sig").write_bytes(signature)
    merged = merge(place)
    assert [entry.client for entry in merged.counted] == [1, 2]
    assert {entry.client: entry.code for entry in merged.refused} == {0: "signature"}
    assert problems(place) == []


@slow
def test_what_was_signed_with_keys_that_the_operator_replaced_does_not_count(place: Path) -> None:
    train(place)
    join_as_2(place, identity_of(place), Ed25519PrivateKey.generate())
    federation = Federation.open(place)
    federation.server.enrol(2, federation.keys().following[2])
    merged = merge(place)
    assert {entry.client: entry.code for entry in merged.refused} == {2: "signature"}
    assert problems(place) == []


@slow
def test_the_server_s_new_keys_are_followed_by_parties_that_know_the_old_ones(place: Path) -> None:
    play(place, 1)
    old = Federation.open(place).keys().server.fingerprint
    new = Federation.open(place).server.rotate_keys()
    train(place)
    merge(place)
    assert old != new == Federation.open(place).keys().server.fingerprint
    assert problems(place) == []


@slow
def test_without_the_server_s_keys_nothing_is_merged_and_the_error_says_whose(place: Path) -> None:
    train(place)
    server_home(identity_of(place)).keys.unlink()
    with pytest.raises(FedError, match="the keys of this workspace's server") as raised:
        merge(place)
    assert raised.value.exit_code == 4
    assert "FEDCLI_SERVER_HOME" in raised.value.hint


# What is kept, and kills


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@slow
def test_party_and_server_keep_what_they_did_and_what_came_of_it(place: Path) -> None:
    play(place)
    identity = identity_of(place)
    own = lines_of(default_home(identity, 0).history)
    assert [(line["event"], line["round"]) for line in own] == [("sent", 0), ("outcome", 0), ("sent", 1)]
    update = (place / "inbox/0/round-00000/update.json").read_bytes()
    assert own[0]["update"] == hashlib.sha256(update).hexdigest()
    assert own[0]["bytes"] == sum(path.stat().st_size for path in (place / "inbox/0/round-00000").iterdir()) - 129
    assert own[1]["result"] == "counted"
    server = [line for line in lines_of(server_home(identity).history) if line["event"] == "published"]
    assert [line["round"] for line in server] == [0, 1, 2]
    manifest = (place / "rounds/00002/manifest.json").read_bytes()
    assert server[2]["manifest"] == hashlib.sha256(manifest).hexdigest()
    assert server[2]["counted"].keys() == {"0", "1", "2"}


@slow
def test_a_last_round_that_is_taken_away_is_missed(place: Path) -> None:
    play(place)
    shutil.rmtree(place / "rounds/00002")
    assert any("00002: is gone, and was the round that this server published" in problem for problem in problems(place))


@slow
def test_a_party_that_joins_again_keeps_what_it_chose(place: Path) -> None:
    client = Federation.open(place).client(0)
    rows = place.parent / "rows-0.jsonl"
    joining = client.join(rows)
    assert (joining.kept, joining.card.model_dump(exclude_none=True)) == (("--share minimal",), {"num_rows": 3})
    client.join(rows, format="alpaca", share="minimal").commit()
    assert client.join(rows).kept == ("--share minimal", "--format alpaca")
    assert Federation.open(place).server.enrol(0)[1] is False  # the keys are the same


@slow
@pytest.mark.parametrize(("who", "after"), [("client", False), ("server", True), ("revoke", False)])
def test_killed_at_every_call_nothing_is_lost_and_every_signature_is_right(
    enrolled: Path, who: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where thousands of fsyncs take no time
    with tempfile.TemporaryDirectory(prefix="fedcli-signed-", dir=memory) as folder:
        template = Path(shutil.copytree(enrolled, Path(folder) / "P"))
        monkeypatch.setenv("XDG_DATA_HOME", str(template / "data"))
        train(template / "W", *((1, 2) if who == "client" else (0, 1, 2)))

        def work(place: Path) -> None:
            os.environ["XDG_DATA_HOME"] = str(place / "data")
            if who == "client":
                train(place / "W", 0)
            elif who == "server":
                merge(place / "W")
            else:
                Federation.open(place / "W").server.revoke(1)

        for killed in copies_killed_at_every_call(template, work, after):
            monkeypatch.setenv("XDG_DATA_HOME", str(killed / "data"))
            workspace = killed / "W"
            if not (workspace / "inbox/0/round-00000").exists():
                train(workspace, 0)
            if not Workspace(workspace).has_round(1):
                merge(workspace)
            counted = [entry.client for entry in Federation.open(workspace).round(1).manifest.aggregation.counted]
            is_revoked = 1 in read_enrolment(Workspace(workspace)).gone
            assert counted == ([0, 2] if is_revoked else [0, 1, 2])
            assert problems(workspace) == []


@slow
def test_two_parties_join_are_enrolled_and_train_by_commands(tmp_path: Path) -> None:
    place = Place(tmp_path, warm())
    place("init", "W", *settings(*SMALL, "data.source=null", "federation.clients=2"))
    told = {}
    for client in (0, 1):
        rows = place.rows(f"rows-{client}.jsonl", 6)
        joined = json.loads(place.join(client, rows, "--share", "minimal", "--json").stdout)
        told[client] = joined["fingerprint"]
        place.train(client)
    waits = place("server", "aggregate", code=6).stderr
    assert "not enrolled: 0, 1" in waits
    assert f"fedcli server enrol --id 0 --fingerprint {told[0]}" in waits
    assert "fedcli server enrol --id 0" in place("status").stderr
    assert told[1] in place("server", "enrol", "--id", 1, code=2).stderr
    for client in (0, 1):
        place("server", "enrol", "--id", client, "--fingerprint", told[client])
    place("server", "aggregate")
    shown = place("keys", "show").stdout
    assert [line.split()[-1] for line in shown.splitlines()] == ["here", "enrolled", "enrolled"]
    (tmp_path / "trust.json").write_text(place("keys", "show", "--json").stdout)
    assert "9 signatures" in place("verify", "--trust", "trust.json").stdout
    again = place.join(0, tmp_path / "rows-0.jsonl", "--yes").stderr
    assert "client train --id 0" in again
    assert "enrol" not in again, "it is enrolled under these keys"
    place.rows("rows-0.jsonl", 9)
    assert "client train --id 0 --refresh" in place.train(0, code=3).stderr
    done = place("client", "train", "--id", 0, "--refresh", "--home", "H0")
    assert "registered anew with 9 rows, before 6" in done.stderr
    assert place.registration(0)["data"] == {"num_rows": 9}  # still the minimum
    place("client", "leave", "--id", 1, "--home", "H1")
    place("server", "aggregate")
    assert "gone       client 1 has left" in place("status").stdout
    assert "nobody" not in place("keys", "rotate").stdout
    place("verify", "--trust", "trust.json")
    other = place("client", "join", "--id", 0, "--data", "rows-0.jsonl", "--server", "0" * 32, "--home", "H0", code=7)
    assert "signed by another server than yours" in other.stderr
