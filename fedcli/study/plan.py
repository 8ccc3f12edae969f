"""The study file: presets x algorithms x seeds, baselines and benchmarks; and the cells that it stands for.

A cell is one workspace: a federation of one algorithm, or the baselines that all algorithms of a preset and a seed have
in common. Settings are keys of fedcli.yaml, as `fedcli init --set` takes them: `train.steps: 20`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedcli.algos import ALGORITHMS
from fedcli.config import Config, apply_overrides, parse_config, read_document
from fedcli.config.section import Section
from fedcli.config.sections import EvalConfig
from fedcli.data.file_rows import KINDS, suffix_of
from fedcli.errors import ConfigError, FedError, did_you_mean
from fedcli.eval.benchmark import Options
from fedcli.eval.registry import find_benchmarks
from fedcli.server.create import presets
from fedcli.study.columns import ColumnEntry, PublishedTable

BASELINES = "baselines"
"""The cell of a preset and a seed in which the baselines are trained and scored."""
LOCAL = "local"
"""What the paper calls local: one client's training, the first one's."""
ALONE = "alone"
"""Every client alone: the tables show the best and the mean of them."""

_OWN_KEYS = {
    "eval": "into the study's own section eval",
    "federation.seed": "into the study's seeds",
    "algorithm": "into the study's algorithms",
}
"""Keys of fedcli.yaml that the study itself decides, and where."""

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Seed = Annotated[int, Field(ge=0)]
_Settings = dict[str, Any]


def _named(key: str) -> BeforeValidator:
    """Let a plain name stand for an entry that has nothing else."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class PresetEntry(Section):
    """A preset of `fedcli init`, with settings of its own and the name that it has in tables and folders."""

    preset: str
    name: _Name = ""
    title: str = ""
    settings: _Settings = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        return {"name": value.get("preset"), **value} if isinstance(value, dict) else value


class AlgorithmEntry(Section):
    """An algorithm with its hyperparameters, and the label that it has in tables and folders."""

    name: str
    label: _Name = ""
    hyperparameters: _Settings = Field(default_factory=dict)
    settings: _Settings = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """Take hyperparameters from beside the name, where fedcli.yaml's algorithm section has them."""
        if not isinstance(value, dict):
            return value
        own = {key: value[key] for key in ("name", "label", "settings") if key in value}
        rest = {key: found for key, found in value.items() if key not in own}
        return {"label": value.get("name"), **own, "hyperparameters": rest}


class TableConfig(Section):
    """How `study table` shows the study: its columns, what rows are compared with, and whose layout it follows."""

    columns: tuple[ColumnEntry, ...] = ()
    """None: every metric of the benchmarks but details."""
    against: str = ""
    """A row's label; "": the first baseline."""
    like: str | None = None
    """A shipped study, whose columns and published figures these are."""


class Study(Section):
    """The whole of study.yaml."""

    title: str = ""
    presets: tuple[Annotated[PresetEntry, _named("preset")], ...] = Field(min_length=1)
    settings: _Settings = Field(default_factory=dict)
    """Of every cell."""
    algorithms: tuple[Annotated[AlgorithmEntry, _named("name")], ...] = Field(min_length=1)
    seeds: tuple[_Seed, ...] = Field(default=(0,), min_length=1)
    baselines: tuple[str, ...] = ("base", LOCAL)
    eval: EvalConfig = EvalConfig.model_construct()
    table: TableConfig = TableConfig.model_construct()
    paper: PublishedTable | None = None
    root: str | None = None
    """Where relative paths start; None: the study's folder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, names in (
            ("presets", [entry.name for entry in self.presets]),
            ("algorithms", [entry.label for entry in self.algorithms]),
            ("seeds", list(map(str, self.seeds))),
        ):
            if twice := {name for name in names if names.count(name) > 1}:
                cure = "leave one out" if what == "seeds" else "give each a name of its own"
                raise ValueError(f"{what}: {min(twice)} comes twice; {cure}")
        for entry in self.algorithms:
            if entry.name not in ALGORITHMS:
                raise ValueError(
                    f"algorithms: unknown algorithm {entry.name!r}. {did_you_mean(entry.name, ALGORITHMS)}"
                )
            if entry.label == BASELINES:
                raise ValueError(f"algorithms: the label {BASELINES} is the baselines' own")
        entries = [each.settings for each in self.presets] + [each.settings for each in self.algorithms]
        for settings in (self.settings, *entries):
            for key in _flat(settings):
                if own := next((place for taken, place in _OWN_KEYS.items() if f"{key}.".startswith(f"{taken}.")), ""):
                    raise ValueError(f"settings: {key} is not one of a cell's settings here: it belongs {own}")
        for name in self.baselines:
            which = name.removeprefix("alone-")
            if name not in ("base", LOCAL, ALONE, "pooled") and not (which != name and which.isdecimal()):
                known = f"base, {LOCAL}, {ALONE}, alone-N and pooled"
                raise ValueError(f"baselines: unknown baseline {name!r}; there are {known}")
        if not self.eval.benchmarks:
            raise ValueError("eval.benchmarks: name what is to be scored")
        return self

    @property
    def options(self) -> Options:
        """What is asked for in place of the benchmarks' own settings."""
        return Options(limit=self.eval.limit)

    def alone(self, config: Config) -> list[int]:
        """Return the clients of a preset's federation that are trained alone."""
        found = set(range(config.federation.clients)) if ALONE in self.baselines else set()
        found |= {0} if LOCAL in self.baselines else set()
        return sorted(found | {int(name[6:]) for name in self.baselines if name.startswith("alone-")})


@dataclass(frozen=True)
class Cell:
    """One workspace of a study; `algorithm` is None for the baselines."""

    setting: PresetEntry
    seed: int
    algorithm: AlgorithmEntry | None
    settings: Mapping[str, Any]
    """Over the preset's, by dotted key of fedcli.yaml."""

    @property
    def label(self) -> str:
        """The algorithm's label, or `baselines`."""
        return BASELINES if self.algorithm is None else self.algorithm.label

    @property
    def id(self) -> str:
        """Its name, which is its folder's too: preset/seed-0/fedavg."""
        return f"{self.setting.name}/seed-{self.seed}/{self.label}"

    @cached_property
    def config(self) -> Config:
        """Its fedcli.yaml; raises ConfigError for a fault in it."""
        document = read_document(presets()[self.setting.preset].read_text(encoding="utf-8"), Path(self.setting.preset))
        apply_overrides(document, self.overrides)
        return parse_config(document, Path(f"the cell {self.id}"))

    @property
    def overrides(self) -> list[str]:
        """Its settings as `fedcli init --set` takes them."""
        return [f"{key}={json.dumps(value, sort_keys=True)}" for key, value in self.settings.items()]

    @property
    def fixed(self) -> dict[str, Any]:
        """What its workspace was made with; scores may be asked for later."""
        return {"preset": self.setting.preset, "settings": [o for o in self.overrides if not o.startswith("eval=")]}


def read_study(path: Path) -> Study:
    """Read and check a study file; raise ConfigError with every fault, WorkspaceError where it cannot be read."""
    return parse_study(read_document(path.read_text(encoding="utf-8"), path), path)


def parse_study(document: dict[str, Any], path: Path, named: Path | str | None = None) -> Study:
    """Check a parsed study file: keys, presets, algorithms and every cell's settings; paths become absolute.

    `path` is where the file lies, or will; faults name `named` in its place, if that is given.
    """
    shown = named or path
    try:
        study = Study.model_validate(document)
    except ValidationError as error:
        faults = list(dict.fromkeys(_fault(fault) for fault in error.errors()))
        raise ConfigError(
            f"{shown} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n  " + "\n  ".join(faults),
            hint="Correct the keys that are named; docs/STUDIES.md explains them.",
        ) from error
    for entry in study.presets:
        if entry.preset not in presets():
            hint = did_you_mean(entry.preset, presets())
            raise ConfigError(f"{shown}: presets: unknown preset {entry.preset!r}", hint=hint)
    try:
        find_benchmarks(study.eval.benchmarks)
    except FedError as error:
        raise ConfigError(f"{shown}: eval.benchmarks: {error.message}", hint=error.hint) from error
    root = path.parent / study.root if study.root else path.parent
    found = study.eval.model_copy(
        update={name: absolute_in(root, getattr(study.eval, name)) for name in ("data", "judge_model")}
    )
    study = study.model_copy(update={"eval": found, "root": str(root.absolute())})
    for cell in cells_of(study):
        _ = cell.config
        study_clients(study, cell, shown)
    return study


def study_clients(study: Study, cell: Cell, path: Path | str) -> None:
    """Raise ConfigError for a client to train alone that a preset's federation has not."""
    clients = cell.config.federation.clients
    if unknown := [client for client in study.alone(cell.config) if client >= clients]:
        raise ConfigError(
            f"{path}: baselines: alone-{unknown[0]}: {cell.setting.name} has clients 0 to {clients - 1}",
            hint="Name one of them.",
        )


def cells_of(study: Study) -> list[Cell]:
    """Return a study's cells, in the order in which they are run: seed by seed, baselines first."""
    return [
        Cell(setting, seed, algorithm, _settings_of(study, setting, seed, algorithm))
        for seed in study.seeds
        for setting in study.presets
        for algorithm in (*([None] if study.baselines else []), *study.algorithms)
    ]


def cell_key(study: Study, cell: Cell) -> str:
    """Return a hash of all that a cell's work follows from: whoever changes it gets what is missing done."""
    asked = {"eval": study.eval.model_dump(mode="json"), "overrides": cell.overrides, "preset": cell.setting.preset}
    if cell.algorithm is None:
        asked["baselines"] = study.baselines
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _settings_of(study: Study, setting: PresetEntry, seed: int, algorithm: AlgorithmEntry | None) -> dict[str, Any]:
    """Return a cell's settings: the study's, the preset's, then the algorithm's."""
    root = Path(study.root or ".")
    given = {**_flat(study.settings), **_flat(setting.settings)}
    if algorithm is not None:
        given |= _flat(algorithm.settings)
        given["algorithm"] = {"name": algorithm.name, **algorithm.hyperparameters}
    given["federation.seed"] = seed
    if algorithm is not None and study.eval.every is not None:
        given["eval"] = study.eval.model_dump(mode="json")
    for key in ("data.source", "model.base", "adapter.init"):
        if key in given:
            given[key] = absolute_in(root, given[key])
    return given


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key; a section given as a mapping means its keys, and not the whole of it."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        is_section = isinstance(value, dict) and "." not in key and key != "algorithm"
        found |= {f"{key}.{name}": inner for name, inner in value.items()} if is_section else {key: value}
    return found


def absolute_in(root: Path, value: Any) -> Any:
    """Return a path, or a list of sources, with files below a folder made absolute, and other names as they are."""
    if isinstance(value, list):
        return [absolute_in(root, entry) for entry in value]
    if isinstance(value, dict) and isinstance(value.get("source"), str):
        return value | {"source": absolute_in(root, value["source"])}
    if not isinstance(value, str) or not value:
        return value
    path = root / os.path.expanduser(value)
    return str(path.absolute()) if path.exists() or suffix_of(path) in KINDS else value


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        section: Any = {"eval": EvalConfig, "table": TableConfig}.get(str(fault["loc"][0]), Study)
        return f"{where}: unknown key. {did_you_mean(str(fault['loc'][-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"{where}: it is missing"
    if fault["type"] == "tuple_type":
        return f"{where}: a list is wanted here (found {fault['input']!r})"
    message = fault["msg"].removeprefix("Value error, ")
    return message if where == "the file" else f"{where}: {message} (found {fault['input']!r})"


def with_overrides(text: str, overrides: Sequence[str], path: Path) -> str:
    """Return a study file's text with `--set key=value` put in; comments stay only where nothing is set."""
    if not overrides:
        return text
    document = read_document(text, path)
    apply_overrides(document, overrides)
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return comments + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
