"""The bodies of prediction requests: JSON, or a form with files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from visadapt.serving.limits import Limits
from visadapt.serving.refusal import ServingError


class PredictRequest(BaseModel):
    """Inputs, and the task of each."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"task": "flowers", "inputs": [{"image": "<base64>"}], "top": 3}]},
    )

    task: str | list[str] = Field(
        description="name of the task; a list with one name per input; or auto, for the decider's choice per input"
    )
    inputs: list[dict[str, str | list[str]]] = Field(
        description='each {"image": base64 of a file}, or {"text": a text or a list of two}'
    )
    top: int | None = Field(
        default=None,
        description="labels per input; by default the most likely one or, where an input may have several labels, "
        "those with a probability of at least 0.5",
    )


class Score(BaseModel):
    """A label and its probability; or an output of a regression and its value."""

    label: str
    score: float | None = None
    value: float | None = None


class PredictResponse(BaseModel):
    """Predictions in the order of the inputs."""

    predictions: list[list[Score]] = Field(description="per input, the most likely labels first")
    task: list[str] = Field(description="per input, the task that answered")
    digest: list[str] = Field(description="per input, SHA-256 of the version of the task that answered")
    model: str = Field(description="digest of the backbone")


class ErrorBody(BaseModel):
    """What was wrong, and what to do."""

    name: str
    message: str
    remedy: str


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


@dataclass(frozen=True)
class Parsed:
    """A prediction request."""

    task: str | list[str]
    inputs: list[Any]
    top: int | None


async def parse(request: Request, limits: Limits) -> Parsed:
    """Read a prediction request.

    Args:
        request: with a body of JSON, or a form: fields ``task`` and ``top``, files ``image`` and fields ``text``.
        limits: upper bounds.

    Raises:
        ServingError: the body is of neither form, or too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(await request.body())
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=limits.inputs + 1, max_fields=limits.inputs + 4,
                                    max_part_size=8 * limits.text + 1000) as form:  # fmt: skip
                return await _from_form(form, limits)
        except HTTPException as error:
            raise _invalid(f"the form cannot be read: {error.detail}") from error
    raise _invalid(f"the content type must be application/json or multipart/form-data, got {kind!r:.60}")


def _from_json(body: bytes) -> Parsed:
    try:
        found = PredictRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(step)[:40] for step in first["loc"][:3])
        raise _invalid(f"{place or 'the body'}: {first['msg']}") from error
    return Parsed(found.task, list(found.inputs), found.top)


async def _from_form(form: FormData, limits: Limits) -> Parsed:
    unknown = sorted(set(form) - {"task", "top", "image", "text"})
    if unknown:
        raise _invalid(f"the form must have the fields task, top, image and text only, got {unknown[0]!r:.60}")
    tasks = [task for task in form.getlist("task") if isinstance(task, str)]
    if not tasks:
        raise _invalid("the form must have a field 'task'")
    top = form.get("top")
    if top is not None and not (isinstance(top, str) and top.isascii() and top.isdigit() and len(top) < 7):
        raise _invalid("top must be a positive integer")
    inputs: list[Any] = []
    for name, value in form.multi_items():
        if name == "image":
            if not isinstance(value, UploadFile):
                raise _invalid("'image' must be a file")
            if (value.size or 0) > limits.image:
                raise ServingError("too_large", f"an image must not have more than {limits.image:,} bytes",
                                   "send a smaller image")  # fmt: skip
            inputs.append(await value.read())
        elif name == "text":
            if not isinstance(value, str):
                raise _invalid("'text' must be a field, not a file")
            inputs.append(value)
    return Parsed(tasks[0] if len(tasks) == 1 else tasks, inputs, None if top is None else int(top))


def _invalid(message: str) -> ServingError:
    return ServingError("invalid_request", message, "see /docs")
