"""What every section of a recipe is, and names of the registry as values."""

from __future__ import annotations

from pydantic import AfterValidator, BaseModel, ConfigDict

from b3 import registry
from b3.errors import InputError


def entry(kind: str) -> AfterValidator:
    """That a string names something of the registry."""

    def check(name: str) -> str:
        try:
            return registry.check(kind, name)
        except InputError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(check)


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
