"""Token-level weightings by name: one file each, and the folder is the registry. No torch here: reading a
recipe asks it too."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from grpo_mega.algo.innovations._base import Innovation
from grpo_mega.block import Block


def available() -> tuple[str, ...]:
    """The names that `loss.innovations` may hold."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def innovation_class(name: str) -> type[Innovation]:
    """The one class that the file of this name defines."""
    module = import_module(f"{__name__}.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Innovation) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise TypeError(f"{module.__file__} must define exactly one Innovation, it defines {len(own)}")
    return own[0]


class PickedInnovations(Block):
    """The innovations a recipe picks: a key each, {} or null inside for its defaults, false to leave it
    out."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = cast("dict[str, Any]", value)
        return {
            name: {} if options is None else options
            for name, options in given.items()
            if options is not False
        }

    @model_serializer(mode="wrap")
    def _only_the_picked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = cast("dict[str, Any]", handler(self))
        return {name: options for name, options in dumped.items() if options is not None}

    def picked(self) -> dict[str, Innovation]:
        """By name, in the order of the alphabet."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def each_slot_is_taken_once(self) -> PickedInnovations:
        taken: dict[str, str] = {}
        for name, innovation in self.picked().items():
            if innovation.slot is None:
                continue
            other = taken.setdefault(innovation.slot, name)
            if other != name:
                raise ValueError(
                    f"loss.innovations.{other} and loss.innovations.{name} both decide {innovation.slot}: "
                    f"remove one of them (loss.innovations.{name}=false leaves it out)"
                )
        return self


if TYPE_CHECKING:
    Innovations = PickedInnovations
else:  # a field for each file, so that editors, error messages and overrides know every option
    Innovations = create_model(
        "Innovations",
        __base__=PickedInnovations,
        __doc__=PickedInnovations.__doc__,
        **{
            name: (
                innovation_class(name) | None,
                Field(default=None, description=innovation_class(name).__doc__),
            )
            for name in available()
        },
    )
