"""Base of all request bodies: a known field that is not served is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """Base model: strict JSON types (no "1" for 1), no unknown fields; null means absent in optional fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Take 3.0 for the integer 3: in JSON both are one number, and some clients write all numbers so."""


class only:
    """Validator of a field of which only these values (and null) are served yet."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def __call__(self, value: Any) -> Any:
        if value is None or any(type(value) is type(v) and value == v for v in self._values):
            return value
        if not self._values:
            raise PydanticCustomError("not_served", "this field is not served yet")
        served = " or ".join(msgspec.json.encode(v).decode() for v in self._values)
        raise PydanticCustomError("not_served", f"only {served} is served yet")


NotServed = Annotated[Any, AfterValidator(only())]
