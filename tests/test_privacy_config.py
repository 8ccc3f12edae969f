"""fedcli.yaml's section `privacy`: what it needs, what excludes each other, and what a manifest then asks for."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedcli.config import Config, parse_config
from fedcli.errors import ConfigError
from fedcli.workspace.privacy_records import PrivacyRecord, privacy_record


def config_of(**sections: object) -> Config:
    return parse_config(dict(sections), Path("fedcli.yaml"))


def fault_of(privacy: object, **sections: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(privacy=privacy, **sections)
    assert caught.value.message.startswith("fedcli.yaml has 1 fault:\n  ")
    return caught.value.message.partition("\n  ")[2]


CLIENT = {"unit": "client", "clip": 1.0, "noise": 1.0}
ROW = {"unit": "row", "clip": 1.0, "noise": 1.0}


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [
        ({"clip": 1.0}, "unit is null, and clip is set"),
        ({"max_epsilon": 3}, "unit is null, and max_epsilon is set"),
        ({"unit": "client", "noise": 1.0}, "clip is null"),
        ({"unit": "client", "clip": 1.0}, "set noise or target"),
        (CLIENT | {"target": {"epsilon": 1, "delta": 1e-5}}, "set noise or target"),
        (ROW | {"unit": "group"}, "group_by names the column"),
        (ROW | {"group_by": "patient"}, "group_by names the column"),
        (ROW | {"adaptive": {}}, "unit is row, and adaptive is set"),
        (ROW | {"row_cap": 10}, "unit is row, and row_cap is set"),
        (CLIENT | {"secure_aggregation": "pairwise"}, "unit is client and secure_aggregation is pairwise"),
        (CLIENT | {"noise": 0}, "privacy.noise"),
        (CLIENT | {"delta": 1}, "privacy.delta"),
        (CLIENT | {"unit": "hospital"}, "privacy.unit: unknown unit 'hospital'"),
        ({"secure_aggregation": "single"}, "privacy.secure_aggregation"),
    ],
)
def test_a_section_that_guarantees_nothing_is_refused(privacy: object, expected: str) -> None:
    assert expected in fault_of(privacy)


@pytest.mark.parametrize(
    ("privacy", "sections", "expected"),
    [
        (CLIENT, {"aggregation": {"rule": "median"}}, ["privacy.unit: client", "aggregation.rule: median"]),
        (CLIENT, {"aggregation": {"weight_cap": 10}}, ["aggregation.weight_cap", "privacy.row_cap"]),
        (
            {"secure_aggregation": "double"},
            {"aggregation": {"nearest_mixing": True, "tolerate": 0}},
            ["privacy.secure_aggregation: double", "aggregation.nearest_mixing"],
        ),
        (
            {"secure_aggregation": "pairwise"},
            {"federation": {"signatures": "off"}},
            ["privacy.secure_aggregation: pairwise", "federation.signatures: off"],
        ),
        (CLIENT, {"federation": {"per_round": 2, "select": 3}}, ["privacy.unit: client", "federation.select"]),
        ({"secure_aggregation": "pairwise"}, {"federation": {"clients": 2}}, ["needs 3 or more clients", "2 count"]),
    ],
)
def test_sections_that_exclude_each_other_are_both_named(
    privacy: object, sections: dict[str, object], expected: list[str]
) -> None:
    fault = fault_of(privacy, **sections)
    assert all(part in fault for part in expected), fault


def test_a_robust_rule_and_rows_protected_at_the_party_go_together() -> None:
    config_of(privacy=ROW, aggregation={"rule": "median"})


@pytest.mark.parametrize(
    "record",
    [
        {"unit": "row", "clip": 1.0},
        {"unit": "row", "clip": 1.0, "delta": 1e-5},
        {"unit": "row", "clip": 1.0, "delta": 1e-5, "noise": 0.01},
        {"unit": "group", "clip": 1.0, "delta": 1e-5, "noise": 1.0},
        {"unit": "client", "clip": 1.0, "delta": 1e-5, "noise": 1e-200, "expected": 3},
        {"unit": "client", "clip": 1.0, "delta": 1e-5, "noise": 1.0},
        {
            **{"unit": "client", "clip": 1.0, "delta": 1e-5, "noise": 1.0, "expected": 3},
            "adaptive": {"quantile": 0.5, "rate": 0.2, "bit_noise": 0.5},
        },
        {
            **{"unit": "client", "clip": 1.0, "delta": 1e-5, "noise": 1.0, "expected": 30},
            "adaptive": {"quantile": 0.5, "rate": 2000.0, "bit_noise": 1.5},
        },
    ],
)
def test_a_manifest_that_no_accountant_can_count_is_none(record: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrivacyRecord.model_validate(record)


def test_without_the_section_a_manifest_says_nothing_of_privacy() -> None:
    assert privacy_record(config_of().privacy, num_counted=5, rounds=10, clip=None) is None


def test_a_target_of_clients_becomes_the_noise_that_all_rounds_need() -> None:
    target = {"epsilon": 8, "delta": 1e-2}  # beyond.md 3.4: z 2.88756 for 50 rounds
    config = config_of(privacy={"unit": "client", "clip": 2.0, "target": target})
    record = privacy_record(config.privacy, num_counted=5, rounds=50, clip=None)
    assert record is not None
    assert record.noise == pytest.approx(2.88756, abs=5e-6)
    assert (
        record.to_bytes().decode().split()
        == (
            f'{{ "clip": 2.0, "delta": 0.01, "expected": 5, "max_epsilon": 8.0, "noise": {record.noise}, '
            '"relation": "add_or_remove_one", "unit": "client" }'
        ).split()
    )


def test_a_target_of_rows_is_left_to_the_parties_for_each_has_another_number_of_rows() -> None:
    config = config_of(privacy={"unit": "row", "clip": 2.0, "target": {"epsilon": 8, "delta": 1e-2}})
    record = privacy_record(config.privacy, num_counted=5, rounds=50, clip=None)
    assert record == PrivacyRecord(
        unit="row",
        relation="add_or_remove_one",
        clip=2.0,
        delta=1e-2,
        target={"epsilon": 8.0, "delta": 1e-2},  # type: ignore[arg-type]
    )
