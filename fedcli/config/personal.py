"""fedcli.yaml's key `train.personal`: an adapter of its own that each client trains beside the shared one."""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from fedcli.config.section import Section

PersonalName: TypeAlias = Literal["ditto", "feddpa"]
"""Ditto (Li et al. 2021, 2012.04221) and FedDPA (Yang et al. 2024, 2403.19211)."""


class PersonalConfig(Section):
    """A second adapter, which never leaves its client and costs as many steps again.

    `ditto` stands by itself: v <- v - lr (grad f(v) + pull (v - x)), where x is the round's global adapter and `pull`
    the paper's lambda. `feddpa` stands beside the global adapter, which is frozen meanwhile:
    W x + s (B_g A_g + weight B_l A_l) x.
    """

    name: PersonalName
    pull: Annotated[float, Field(ge=0, le=1e4)] = 0.1
    weight: Annotated[float, Field(gt=0, le=1e3)] = 0.5

    def __str__(self) -> str:
        return f"{{name: {self.name}}}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        odd, of = ("weight", "feddpa") if self.name == "ditto" else ("pull", "ditto")
        if getattr(self, odd) != PersonalConfig.model_fields[odd].default:
            raise ValueError(f"{odd} is of {of}, and name is {self.name}")
        return self
