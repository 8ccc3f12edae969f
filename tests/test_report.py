"""`fedcli report`: its series are what the updates say, and its page needs nothing but itself."""

import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.handmade import Arrays, drop, merge, score
from support.kills import copies_killed_at_every_call
from support.processes import ENVIRONMENT, fedcli

from fedcli import Federation, Observer
from fedcli.operations import report as reporting
from fedcli.operations.report import collect
from fedcli.report.drawing import NARROW, WIDE
from fedcli.report.events import write_events
from fedcli.report.figures import NAMES, _scores, draw
from fedcli.report.page import is_ours, render
from fedcli.report.remarks import remarks
from fedcli.report.series import MergedRound, MetricScores, Point, Report, Similarity
from fedcli.workspace.layout import Workspace
from fedcli.workspace.report_folder import publish_report

VOID = {"meta", "link", "img", "br"}


def collect_of(workspace: Workspace) -> Report:
    """Return what there is to show of a workspace."""
    return collect(Federation(workspace).state, observer=Observer())


def flat(change: Arrays) -> np.ndarray:
    return np.concatenate([change[name].astype(np.float64).ravel() for name in sorted(change)])


@pytest.fixture
def merged(small: Path) -> tuple[Workspace, list[dict[int, Arrays]]]:
    """A federation that has finished: all were counted in round 0; in round 1 one was refused, and one did not come."""
    workspace = Workspace(small)
    first = merge(workspace, {0: 2.0, 1: 1.0, 2: None})
    drop(workspace, 2, base="0" * 64)
    second = merge(workspace, {1: 0.5})
    return workspace, [first, second]


def test_the_series_are_what_the_updates_say(merged: tuple[Workspace, list[dict[int, Arrays]]]) -> None:
    workspace, (changes, _) = merged
    score(workspace, "base", 0.2)
    score(workspace, 1, 0.5)
    score(workspace, 2, 0.75)
    score(workspace, "pooled", 0.9)  # of a baseline that is no longer there
    report = collect_of(workspace)
    first, second = report.merged
    assert (first.number, second.number, report.state, report.rounds) == (0, 1, "finished", 2)
    assert first.losses == {0: 2.0, 1: 1.0, 2: None}
    assert first.mean_loss == 1.5
    assert (second.losses, second.missing) == ({1: 0.5}, [0])
    assert [(client, code) for client, (code, _) in second.refused.items()] == [(2, "wrong_base")]
    for client, change in changes.items():
        assert first.norms[client] == pytest.approx(np.linalg.norm(flat(change)), rel=1e-6)
    sent = [sum(path.stat().st_size for path in (workspace.update(0, client)).iterdir()) for client in range(3)]
    assert first.total_bytes_up == sum(sent)
    similarity = report.similarities[0]
    vectors = np.array([flat(changes[client]) for client in range(3)])
    lengths = np.linalg.norm(vectors, axis=1)
    assert similarity.clients == [0, 1, 2]
    np.testing.assert_allclose(similarity.cosines, vectors @ vectors.T / np.outer(lengths, lengths), atol=1e-6)
    (metric,) = report.scores
    assert metric.rounds[2] == Point(0.75, 0.625, 0.875) == metric.rounds[metric.best_round or 0]
    assert metric.lines().keys() == {"base"}
    assert report.notes == ["pooled was trained anew or removed since it was scored: its scores are left out"]


def test_only_the_last_rounds_are_compared_where_updates_are_large_and_the_report_says_so(
    merged: tuple[Workspace, list[dict[int, Arrays]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "COMPARED_BYTES", 1)
    report = collect_of(merged[0])
    assert [similarity.round for similarity in report.similarities] == [1]
    assert report.notes == ["cosines: of rounds 1 to 1 only, for 1 byte of updates are read at most"]


def test_an_update_that_is_no_longer_the_counted_one_is_not_compared(
    merged: tuple[Workspace, list[dict[int, Arrays]]],
) -> None:
    workspace, _ = merged
    shutil.rmtree(workspace.update(0, 1))
    shutil.rmtree(workspace.update(1, 1))
    report = collect_of(workspace)
    assert report.similarities == []
    assert report.notes == ["cosines: no update of round 1 can be read any more; no round before it is compared"]


def test_a_report_after_gc_compares_what_is_left_and_says_so(merged: tuple[Workspace, list[dict[int, Arrays]]]) -> None:
    workspace, _ = merged
    with workspace.config.open("a") as file:
        file.write("retention: {keep_last: 1}\n")
    assert fedcli("gc", cwd=workspace.root).returncode == 0
    report = collect_of(workspace)
    assert len(report.merged) == 2
    assert any("gc" in note for note in report.notes)
    done = fedcli("export", "out", "--round", 1, cwd=workspace.root)
    assert done.returncode == 4
    assert not (workspace.root / "out").exists()


class Page(HTMLParser):
    """Reads a page: which elements are open, where attributes lead, what its style says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster", "background"):
                self.references.append(value or "")
            assert not name.startswith("on"), f"a handler: {name}"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_without_scripts_that_refers_to_nothing_outside_and_needs_no_torch(
    merged: tuple[Workspace, list[dict[int, Arrays]]],
) -> None:
    workspace, _ = merged
    score(workspace, 2, 0.7)
    code = (
        "import sys, fedcli.cli\n"
        "code = fedcli.cli.main(['report'])\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys(), 'heavy'\n"
        "sys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=workspace.root, env=ENVIRONMENT, capture_output=True)
    assert process.returncode == 0, process.stderr
    text = (workspace.root / "report/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert page.references
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not re.search(r"@import|url\((?!#)|https?:", text)
    drawn = ("loss", "scores", "norms", "cosine", "cohorts")
    assert {path.name for path in (workspace.root / "report").iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in drawn),
    }
    assert page.tags.count("svg") == 2 * len(drawn)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)
    for picture in (workspace.root / "report").glob("*.png"):
        with Image.open(picture) as image:
            assert image.size[0] == 1500
            image.verify()


def test_what_comes_from_files_is_escaped(small: Path, tmp_path: Path) -> None:
    root = small.rename(tmp_path / "<b>a study & its name")
    with (root / "fedcli.yaml").open("a") as file:
        file.write("# <script>alert(1)</script>\n")
    merge(Workspace(root), {0: 1.0})
    text = render(collect_of(Workspace(root)), [])
    page = Page(text)
    assert "script" not in page.tags
    assert "<h1>&lt;b&gt;a study &amp; its name</h1>" in text
    assert "# &lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_an_earlier_report_is_replaced_and_no_other_file(small: Path) -> None:
    folder = small / "report"
    page = render(collect_of(Workspace(small)), []).encode()
    publish_report(folder, page, {"loss": b"1", "scores": b"1"}, NAMES, is_ours)
    publish_report(folder, page, {"loss": b"2"}, NAMES, is_ours)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"report.html": page, "loss.png": b"2"}
    (folder / "mine.txt").write_text("mine")
    done = fedcli("report", cwd=small)
    assert done.returncode == 4
    assert "mine.txt" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **{"report.html": page, "loss.png": b"2", "mine.txt": b"mine"}
    }


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_report_that_was_killed_at_any_system_call_is_written_again(
    small: Path, tmp_path: Path, is_first: bool, after: bool
) -> None:
    page = render(collect(Federation.open(small).state, observer=Observer()), []).encode()
    template = tmp_path / "template"
    template.mkdir()

    def write(folder: Path, pictures: tuple[str, ...] = ("loss", "norms")) -> None:
        publish_report(folder / "report", page, dict.fromkeys(pictures, b"picture"), NAMES, is_ours)

    if not is_first:
        write(template, ("loss", "scores"))
    num_killed = 0
    for folder in copies_killed_at_every_call(template, write, after):
        num_killed += 1
        write(folder)
        assert sorted(path.name for path in (folder / "report").iterdir()) == ["loss.png", "norms.png", "report.html"]
    assert num_killed > 20


def test_a_page_of_somebody_else_is_not_replaced(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "report.html").write_text("<html>mine</html>")
    assert fedcli("report", "-o", folder, cwd=small).returncode == 4
    assert (folder / "report.html").read_text() == "<html>mine</html>"


def test_a_federation_that_has_merged_nothing_has_a_report(small: Path) -> None:
    done = fedcli("report", "--json", cwd=small)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (small / "report").iterdir()] == ["report.html"]
    Page((small / "report/report.html").read_text())


def values_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the values of a run's event file by tag: TFRecords, whose checksums are not looked at."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    contents, values, position = path.read_bytes(), {}, 0
    while position < len(contents):
        (length,) = struct.unpack_from("<Q", contents, position)
        event = Event.FromString(contents[position + 12 : position + 12 + length])
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
        position += 12 + length + 4
    return values


def test_event_files_hold_the_same_series(merged: tuple[Workspace, list[dict[int, Arrays]]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    workspace, _ = merged
    score(workspace, "base", 0.25)
    score(workspace, 2, 0.75)
    num_values = write_events(collect_of(workspace), tmp_path / "events")
    runs = {folder.name: values_of(folder) for folder in (tmp_path / "events").iterdir()}
    assert runs.keys() == {"federation", "client-0", "client-1", "client-2", "base"}
    assert runs["federation"]["loss"] == [(0, 1.5), (1, 0.5)]
    assert runs["federation"]["scores/demo/exact_match"] == [(2, 0.75)]
    assert runs["base"]["scores/demo/exact_match"] == [(0, 0.25), (2, 0.25)]
    assert runs["client-1"]["loss"] == [(0, 1.0), (1, 0.5)]
    assert "loss" not in runs["client-2"]
    assert len(runs["client-2"]["update_norm"]) == 1
    assert num_values == sum(len(found) for run in runs.values() for found in run.values())


def test_event_files_without_their_package_are_an_error_that_names_it(small: Path) -> None:
    code = "import sys; sys.modules['tensorboardX'] = None\nfrom fedcli.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "report", "--tensorboard", "events"]
    process = subprocess.run(arguments, cwd=small, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 8
    assert "fedcli[tensorboard]" in process.stderr
    assert not (small / "report").exists()


def made_up(num_rounds: int, num_clients: int) -> Report:
    rng = np.random.default_rng(0)
    clients = range(num_clients)
    rounds = [
        MergedRound(
            number=number,
            algorithm="fedavg",
            learning_rate=1e-3,
            cohort=clients,
            losses={client: 1 + rng.random() for client in clients[1:]},
            norms={client: 1 + rng.random() for client in clients[1:]},
            refused={0: ("nonfinite", "x")} if number % 2 else {},
            missing=[] if number % 2 else [0],
            total_bytes_up=number + 1,
            total_bytes_down=number + 1,
            opened=100.0 * number,
            closed=100.0 * (number + 1),
        )
        for number in range(num_rounds)
    ]
    scores = [
        MetricScores(
            f"a-benchmark-with-a-long-name@limit=50,shots={number}",
            "exact_match_of_the_whole_answer",
            "share",
            True,
            {n: Point(0.5, 0.4, 0.6) for n in range(1, num_rounds + 1)},
            {"base": Point(0.1, 0.0, 0.2), "alone-1": Point(0.2, 0.1, 0.3), "pooled": Point(0.6, 0.5, 0.7)},
            {"alone-1": 1},
        )
        for number in range(7)
    ]
    cosines = [Similarity(number, clients, np.eye(num_clients)) for number in range(num_rounds)]
    facts = {"base model": "m", "algorithm": "fedavg"}
    return Report("t", "open", "sft", 3, 9, num_clients, True, facts, rounds, scores, cosines, [], "", {}, "now")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rounds", "num_clients"),
    [(1, 2), (3, 1), (2, 9), (200, 100)],
)
def test_pictures_are_drawn_for_few_and_many(num_rounds: int, num_clients: int) -> None:
    """Warnings are errors here: of labels that do not fit, of empty axes."""
    pictures = draw(made_up(num_rounds, num_clients))
    names = {picture.name for picture in pictures}
    assert names >= {"scores"} | ({"loss", "norms"} if num_clients > 1 else set())
    assert "cohorts" in names
    assert ("loss-map" in names) == (num_clients > 8)
    Page(render(made_up(num_rounds, num_clients), pictures))


@pytest.mark.slow
def test_what_is_even_is_a_sentence_and_what_is_not_is_drawn() -> None:
    whole = made_up(5, 3)
    even = [
        replace(merged, cohort=[1, 2], missing=[], refused={}, total_bytes_up=6000 * (merged.number + 1))
        for merged in whole.merged
    ]
    assert remarks(replace(whole, merged=even)) == [
        "Bytes: the clients of a round sent 6.0 kB together and received 1 byte; 30.0 kB and 5 bytes in all rounds.",
        "Time: a round took 1 min 40 s, by the disk's clock.",
        "Participation: each of 5 rounds drew 2 of 3 clients, and counted all of them; a client was drawn 5 times; "
        "1 client never.",
    ]
    late = [*even[:3], replace(even[3], closed=1000.0), replace(even[4], opened=1000.0, closed=1100.0)]
    heavy = [replace(merged, total_bytes_up=10**merged.number) for merged in even]
    names = {"transfer": heavy, "timings": late, "cohorts": whole.merged}
    for name, merged in names.items():
        report = replace(whole, merged=merged, scores=[], similarities=[])
        assert name in {picture.name for picture in draw(report)}
        assert {one.partition(":")[0] for one in remarks(report)}.isdisjoint(WORDS[name])


WORDS = {"transfer": {"Bytes"}, "timings": {"Time"}, "cohorts": {"Participation"}}


def test_a_table_has_no_column_in_which_nothing_stands(merged: tuple[Workspace, list[dict[int, Arrays]]]) -> None:
    workspace, _ = merged
    score(workspace, 2, 0.7)
    whole = collect_of(workspace)
    scored = ["metric", "federated", "round"]
    told = ["round", "algorithm", "learning rate", "counted", "refused", "missing", "mean loss", "time"]
    figures = ["round", "client", "rows", "weight", "norm", "cosine to the mean", "change without it"]  # none unusual
    assert heads_of(render(whole, [])) == [*scored, *told, *figures, "round", "client", "code", "reason"]
    first = replace(whole, merged=whole.merged[:1], updates=())
    assert heads_of(render(first, [])) == [*scored, *(name for name in told if name not in ("refused", "missing"))]


def heads_of(page: str) -> list[str]:
    return re.findall(r"<th [^>]*>([^<]*)</th>", page)


def test_the_level_lines_are_inside_a_panel_and_its_ticks_are_where_rounds_were_scored() -> None:
    points = {number: Point(0.5, 0.4, 0.6) for number in (0, 3, 7, 20)}
    metric = MetricScores("demo", "exact", "share", True, points, {"base": Point(0.0, 0.0, 0.0)}, {})
    report = replace(made_up(20, 2), scores=[metric])
    for sheet in (WIDE, NARROW):
        drawn = _scores(report, sheet)
        assert drawn is not None
        (axes,) = drawn.figure.axes
        assert axes.get_ylim()[0] < 0.0 < 0.6 < axes.get_ylim()[1]
        assert sorted(axes.get_xticks()) == [0, 3, 7, 20]


@pytest.mark.slow
def test_a_picture_has_the_pages_colours_and_letters_of_a_phones_size() -> None:
    (loss, *_) = draw(replace(made_up(3, 2), scores=[], similarities=[]))
    for svg in (loss.wide_svg, loss.narrow_svg):
        assert "var(--ink)" in svg
        assert "var(--series-0)" in svg
        assert not re.search(r"#(?:0072b2|1c2430|000000)", svg)
        assert "xmlns" not in svg
    box = re.search(r'viewBox="0 0 ([\d.]+) ', loss.narrow_svg)
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", loss.narrow_svg)}
    assert box is not None
    pixels = 390 - 2 * 16  # a phone's screen without the page's margins
    assert min(sizes) * pixels / float(box[1]) > 9


@pytest.mark.slow
def test_a_browser_opens_the_page_without_a_network_and_has_no_complaint(
    merged: tuple[Workspace, list[dict[int, Arrays]]], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    page = Federation(merged[0]).report().page
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,3000"]
    done = subprocess.run(
        [browser, *options, f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert "net::ERR" not in done.stderr
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50
