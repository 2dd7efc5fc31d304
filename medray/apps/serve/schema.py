"""Schemas of requests and answers, for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from medray.apps.serve.requests import CONTENT_TYPES


class Problem(BaseModel):
    """Why a request was refused, and what to do."""

    detail: str


class Health(BaseModel):
    """The service is running."""

    status: Literal["ok"]


class Class(BaseModel):
    """The class of an image."""

    name: str = Field(alias="class", description="the likeliest class")
    label: int = Field(description="its label value", ge=0)
    probabilities: dict[str, float] = Field(description="by class, they sum to one")
    temperature: float | None = Field(description="of the calibration; null: none")
    height: int = Field(description="of the image, pixels", ge=1)
    width: int = Field(description="of the image, pixels", ge=1)
    mpp: float | None = Field(description="microns per pixel of the image")
    mpp_from: Literal["image", "request", "unknown"]
    note: str = Field(description="what was done to come to the model's resolution")
    model_digest: str


class About(BaseModel):
    """The served model and its input."""

    name: str
    digest: str
    architecture: str
    encoder: str
    endpoint: str = Field(description="the one that works with this model")
    classes: list[str] = Field(description="names by label value")
    mpp: float | None = Field(description="microns per pixel that it works at")
    window: int = Field(description="side of its input, pixels")
    stride: int = Field(description="between neighbouring windows, pixels")
    temperature: float | None
    max_mpixel: float
    max_mbyte: float
    timeout_s: float


def describe_body() -> dict[str, Any]:
    """Describe the body of a request for OpenAPI."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "required": True,
        "description": "the image file itself",
        "content": dict.fromkeys(CONTENT_TYPES, binary),
    }


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe answers that are errors, by status, for OpenAPI."""
    said = {
        400: "the body ended too early",
        401: "no token, or a wrong one",
        409: "the model does something else",
        413: "too many bytes or pixels",
        415: "another content type",
        422: "no image, a damaged one, one that does not suit the model, a wrong query",
        503: "too many requests at a time, or no place for the image",
        504: "it took too long",
    }
    return {
        status: {"model": Problem, "description": said[status]} for status in statuses
    }
