"""What an endpoint is: fal's input, its translation into a job for a slot, and fal's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from server.errors import InvalidInput, detail_item

I = TypeVar("I", bound=BaseModel)  # noqa: E741  # the input model


class Job(TypedDict):
    """What a slot is to do, in JSON types.

    `pipeline` names the recipe, `params` are its parameters under its own names, `image` is a URL or `blob:<key>`,
    `warnings` are lines for the request's log. `kind` names requests that need the same models, the pipeline's name
    unless given. `files` are weights that the caller wants, by parameter: a URL, `blob:<key>`, or a name. `fields`
    says what parameters are called in fal's words, where that differs and a fault can show later.
    """

    pipeline: str
    params: dict[str, Any]
    image: str
    warnings: list[str]
    kind: NotRequired[str]
    files: NotRequired[dict[str, str]]
    fields: NotRequired[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Endpoint(Generic[I]):
    """One model of fal's, under fal's names.

    Attributes:
        id: fal's id, `owner/alias`.
        title: Name for people.
        description: One sentence, as fal has it.
        category: fal's category.
        input_model: Field names, defaults, ranges and descriptions, in fal's order.
        output_model: What the result looks like.
        unsupported: Faults for values that are fal's and that this server does not do.
        translate: The job for a valid input.
        output: fal's output for what a slot stored: `key`, `file_name`, `content_type`, `file_size` (bytes), `width`,
            `height` (px) and `seed`.
    """

    id: str
    title: str
    description: str
    category: str
    input_model: type[I]
    output_model: type[BaseModel]
    unsupported: Callable[[I], list[dict[str, Any]]]
    translate: Callable[[I], Job]
    output: Callable[[Mapping[str, Any]], dict[str, Any]]

    @property
    def name(self) -> str:
        """The part of the id after the owner."""
        return self.id.split("/")[1]

    @property
    def pipeline(self) -> str:
        """The recipe that serves it, as its jobs name it."""
        return self.name.replace("-", "_")

    def parse(self, payload: Any) -> I:
        """The input in a decoded JSON body.

        Raises:
            InvalidInput: With one item per fault.
        """
        if not isinstance(payload, dict):
            raise InvalidInput(
                [detail_item("model_attributes_type", "Input should be a valid dictionary or object", input=payload)]
            )
        try:
            parsed = self.input_model.model_validate(payload)
        except ValidationError as error:
            raise InvalidInput.of(error) from error
        if items := self.unsupported(parsed):
            raise InvalidInput(items)
        return parsed

    def unknown_fields(self, payload: Any) -> list[str]:
        """Fields that mean nothing to this endpoint; they are accepted, and worth a warning."""
        if not isinstance(payload, dict):
            return []
        return [str(name) for name in payload if name not in self.input_model.model_fields]

    def job(self, parsed: I) -> Job:
        """What a slot is to do for this input."""
        return self.translate(parsed)
