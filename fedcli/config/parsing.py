"""Reading fedcli.yaml: every fault is told with its key, and the nearest name that would do."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fedcli.algos import ALGORITHMS, Algorithm
from fedcli.algos.lora import LoraRule
from fedcli.algos.robust import Rule
from fedcli.config.aggregation import AggregationConfig
from fedcli.config.data import PARTITIONS, TAGS, DataFormat, check_format
from fedcli.config.section import Section
from fedcli.config.sections import Config, LimitedSteps, parse_algorithm
from fedcli.config.select import SelectConfig
from fedcli.errors import ConfigError, IntegrityError, UsageError, did_you_mean
from fedcli.printable import shortened

MOST_VALUES = 100_000
"""Values that a file may hold: with aliases a short one can hold billions."""
MOST_FAULTS, MOST_FAULT, MOST_NAME = 50, 2000, 100
"""Faults that a message lists, characters of one, and of a name that is looked for among those that are known."""


def algorithm_from(record: dict[str, Any]) -> Algorithm:
    """Return the algorithm that a manifest records; raise IntegrityError where this version knows none such."""
    try:
        return parse_algorithm(record)
    except (ValidationError, PydanticCustomError) as error:
        raise IntegrityError(
            f"a manifest asks for an algorithm that this version does not know: {record}",
            hint="Use the version of fedcli that opened the round, or a later one, with the packages that it had.",
        ) from error


def rule_from(record: dict[str, Any] | None) -> Rule | None:
    """Return the rule that a manifest records, None for the weighted mean; raise IntegrityError for an unknown one."""
    try:
        return None if record is None else AggregationConfig.model_validate(record).as_rule()
    except ValidationError as error:
        raise IntegrityError(
            f"a manifest was merged by a rule that this version does not know: {str(record)[:200]}",
            hint="Use the version of fedcli that merged the round, or a later one.",
        ) from error


def lora_from(record: dict[str, Any] | None) -> LoraRule:
    """Return how a manifest says that factors were merged, None for their means; raise IntegrityError if unknown."""
    try:
        return AggregationConfig.model_validate(record or {}).as_lora()
    except ValidationError as error:
        raise IntegrityError(
            f"a manifest was merged by an aggregation.lora that this version does not know: {str(record)[:200]}",
            hint="Use the version of fedcli that merged the round, or a later one.",
        ) from error


_FORMAT: TypeAdapter[DataFormat] = TypeAdapter(DataFormat, config=ConfigDict(defer_build=True))


def parse_format(record: object) -> DataFormat:
    """Return the format that a data card records."""
    return _FORMAT.validate_python(record)


def read_format(text: str, task: str) -> DataFormat:
    """Return the format of a task that a command line names: a name, or columns in YAML; raise UsageError."""
    try:
        given = _FORMAT.validate_python(yaml.safe_load(text))
        check_format(given, task)
        return given
    except ValidationError as error:
        fault = _describe(error.errors()[0], {}).removeprefix("the file: ")
    except YAML_FAULTS as error:
        fault = " ".join(str(error).split()).removeprefix("data.")
    raise UsageError(
        f"--format {text!r}: {fault}",
        hint="Name a format (docs/DATA.md), or columns: "
        "--format '{columns: {instruction: question, response: answer}}'.",
    )


def read_select(text: str) -> SelectConfig | Literal["off"]:
    """Return how a command line says that rows are selected: off, or a section in YAML; raise UsageError."""
    try:
        given = yaml.safe_load(text)
        return "off" if given is False or given == "off" else SelectConfig.model_validate(given)
    except ValidationError as error:
        fault = _describe(error.errors()[0], {}).removeprefix("the file: ")
    except YAML_FAULTS as error:
        fault = " ".join(str(error).split())
    raise UsageError(
        f"--select {text!r}: {fault}", hint="Write off, or as in --select '{score: ira, keep: 0.8, order: descending}'."
    )


YAML_FAULTS = (yaml.YAMLError, RecursionError, ValueError)
"""What PyYAML raises: ValueError for a number of thousands of digits, and for a day that no calendar has."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is an error and not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for position, (node_of_key, _) in enumerate(node.value):
            key = self.construct_object(node_of_key, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class tells it with its place
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", node.value[position][0].start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_document(text: str, where: Path) -> dict[str, Any]:
    """Parse YAML into its top-level mapping; raise ConfigError with the line."""
    try:
        document = yaml.load(text, _UniqueKeyLoader)
    except YAML_FAULTS as error:
        raise ConfigError(f"{where} is not valid YAML: {_yaml_fault(error)}", hint="Correct that line.") from error
    if document is None:
        return {}
    if (problem := _too_large(document)) is not None:
        raise ConfigError(f"{where} {problem}", hint="Write the values out, without anchors and aliases (& and *).")
    if not isinstance(document, dict):
        raise ConfigError(f"{where} does not hold a mapping of sections", hint="Start from `fedcli init`'s file.")
    return document


def _too_large(document: object) -> str | None:
    """Return what is wrong with a document whose aliases make it huge or endless; each node is looked at once."""
    sizes: dict[int, int | None] = {}

    def size_of(value: object) -> int:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) in sizes:
            known = sizes[id(value)]
            if known is None:
                raise RecursionError
            return known
        sizes[id(value)] = None
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = found = 1 + sum(map(size_of, parts))
        return found

    try:
        num_values = size_of(document)
    except RecursionError:
        return "holds a value that is a part of itself, or is nested too deeply"
    return f"holds {num_values:,} values, at most {MOST_VALUES:,} are read" if num_values > MOST_VALUES else None


def _yaml_fault(error: Exception) -> str:
    """Return what is wrong and where, without the excerpts that PyYAML draws over several lines."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    parts = [(error.problem, error.problem_mark), (error.context, error.context_mark)]
    places = (f"{what}, line {mark.line + 1}, column {mark.column + 1}" for what, mark in parts if what and mark)
    return "; ".join(places)


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key.path=value` settings, values in YAML, into a parsed document."""
    for override in overrides:
        key, separator, value = override.partition("=")
        *sections, leaf = key.split(".")
        if not separator or not all([*sections, leaf]):
            raise UsageError(f"--set {override!r} is not of the form key.path=value", hint="As in train.steps=20.")
        _drop_other_partitions(document, [*sections, leaf])
        target = document
        for section in sections:
            if not isinstance(target.get(section), dict):  # a plain value, as in partition: iid, gives way
                target[section] = {}
            target = target[section]
        try:
            target[leaf] = yaml.safe_load(value)
        except YAML_FAULTS as error:
            raise UsageError(f"--set {override[:200]!r}: the value is not YAML", hint="Quote it.") from error


def _drop_other_partitions(document: dict[str, Any], path: list[str]) -> None:
    """Let `data.partition.dirichlet.alpha=1` take the place of, say, shards_by: a partition is of one kind."""
    match document, path:
        case {"data": {"partition": {**standing}} as data}, ["data", "partition", kind, *_] if kind != "keep":
            data["partition"] = {key: value for key, value in standing.items() if key == kind}


def describe_overrides(overrides: Sequence[str]) -> str:
    """Return what to call settings of a command line, whose faults lie in no file."""
    return " ".join(f"--set {override}" for override in overrides)


def parse_config(document: dict[str, Any], where: Path | str) -> Config:
    """Validate a parsed document; raise one ConfigError that lists every fault with its key."""
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        faults = list(dict.fromkeys(_describe(fault, document)[:MOST_FAULT] for fault in error.errors()))
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise ConfigError(
            f"{where} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n  "
            + "\n  ".join([*faults[:MOST_FAULTS], *more]),
            hint="Correct the keys that are named.",
        ) from error


def _describe(fault: ErrorDetails, document: dict[str, Any]) -> str:
    """Return one fault of a document as `key: what is wrong`, with the nearest valid name where there is one."""
    path = tuple(str(part) for part in fault["loc"])
    location = [part for part in path if not part.startswith("<")]
    key = ".".join(location) or "the file"
    kind, found = fault["type"], fault["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key. {did_you_mean(location[-1], _keys_of(path[:-1], document))}"
    if key == "algorithm" and not isinstance(found, dict):
        return f"algorithm: it is a section with a name, as in algorithm: {{name: fedavg}} (found {shortened(found)})"
    if kind == "unknown_algorithm":
        name = fault["ctx"]["name"]
        return f"algorithm.name: unknown algorithm {shortened(name)}. {did_you_mean(str(name)[:MOST_NAME], ALGORITHMS)}"
    if kind == "no_algorithm":
        return f"algorithm: it has no name. Known: {', '.join(ALGORITHMS)}."
    if kind == "union_tag_not_found":
        for name in found if isinstance(found, dict) else ():
            if name not in PARTITIONS:
                return f"{key}.{name}: unknown key. {did_you_mean(str(name), PARTITIONS)}"
        return f"{key}: iid, sources, or just one of {', '.join(PARTITIONS)} with its value (found {shortened(found)})"
    if kind in ("model_type", "model_attributes_type", "tuple_type"):
        return f"{key}: {'a list' if kind == 'tuple_type' else 'a section'} is wanted here (found {shortened(found)})"
    if kind == "too_short":
        return f"{key}: the list is empty; it names {fault['ctx']['min_length']} or more"
    if kind == "too_long":
        return f"{key}: the list is too long; it names {fault['ctx']['max_length']} or fewer"
    if path[:2] == ("adapter", "rank") and path[-1] == "[key]":
        return f"adapter.rank: {shortened(found)} is no client's id, nor default"
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        return (
            f"{key}: unknown {location[-1]} {shortened(found)}. {did_you_mean(shortened(found).strip(chr(39)), names)}"
        )
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if location else message
    return f"{key}: {fault['msg']} (found {shortened(found)})"


_TAGS = TAGS | {"<limited>": LimitedSteps}


def _keys_of(path: tuple[str, ...], document: dict[str, Any]) -> list[str]:
    """Return the keys that a section knows, given pydantic's path to it."""
    if path[:1] == ("algorithm",):
        return sorted(field.name for field in dataclasses.fields(ALGORITHMS[document["algorithm"]["name"]]))
    section: type[Section] = Config
    for part in path:
        annotation = _TAGS.get(part) or (
            section.model_fields[part].annotation if part in section.model_fields else None
        )
        if isinstance(annotation, type) and issubclass(annotation, Section):
            section = annotation
    return list(section.model_fields)
