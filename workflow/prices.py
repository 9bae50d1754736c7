"""What AWS asks for what a run uses: the prices of one region, out of a TOML file."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

__all__ = ["Price", "Prices", "PricesError", "load_prices"]

DEFAULT = Path(__file__).with_name("prices.toml")
_LIMIT = 1_000_000  # bytes; ours has some 6,000
_UNITS = {
    "lambda_x86": "GB-second",
    "lambda_arm": "GB-second",
    "lambda_requests": "request",
    "lambda_storage": "GB-second",
    "step_functions": "transition",
    "fargate_x86_vcpu": "vCPU-hour",
    "fargate_x86_gb": "GB-hour",
    "fargate_arm_vcpu": "vCPU-hour",
    "fargate_arm_gb": "GB-hour",
    "load_balancer": "hour",
    "load_balancer_units": "NLCU-hour",
    "public_ipv4": "address-hour",
    "s3_writes": "request",
    "s3_reads": "request",
    "s3_storage": "GB-month",
    "logs": "GB",
    "metrics": "metric-month",
    "secrets": "secret-month",
    "secret_reads": "request",
    "registry": "GB-month",
}


class PricesError(Exception):
    """A file of prices that cannot be read or used; the text says what to change."""


class Price(BaseModel):
    """One price, and where it was read.

    Attributes:
        usd: dollars for ``per`` units.
        per: 1, or 1,000,000 for a price per million.
        unit: what is counted: "GB-second", "request", "hour", "GB-month", …
        region: of AWS, say "us-east-1".
        date: of the copy that it was read in; "undated" if that does not say.
        source: which copy that is.
        quality: whose figure was copied: a page of AWS's, its price list (through others), others'
            own text, or nobody's (memory).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    usd: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    per: Annotated[int, Field(ge=1)] = 1
    unit: Annotated[str, Field(min_length=1)]
    region: Annotated[str, Field(min_length=1)]
    date: datetime.date | Literal["undated"]
    source: Annotated[str, Field(min_length=1)]
    quality: Literal["AWS", "price list", "third party", "memory"]

    @property
    def each(self) -> float:
        """Dollars for one unit."""
        return self.usd / self.per


class Prices(BaseModel):
    """All prices that the model uses, of one region."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lambda_x86: Price
    lambda_arm: Price
    lambda_requests: Price
    lambda_storage: Price
    step_functions: Price
    fargate_x86_vcpu: Price
    fargate_x86_gb: Price
    fargate_arm_vcpu: Price
    fargate_arm_gb: Price
    load_balancer: Price
    load_balancer_units: Price
    public_ipv4: Price
    s3_writes: Price
    s3_reads: Price
    s3_storage: Price
    logs: Price
    metrics: Price
    secrets: Price
    secret_reads: Price
    registry: Price

    @field_validator("*")
    @classmethod
    def _unit(cls, price: Price, info: ValidationInfo) -> Price:
        """A figure for another unit would be taken for one of ours."""
        expected = _UNITS[str(info.field_name)]
        if price.unit != expected:
            raise ValueError(f"unit is {price.unit!r}, expected {expected!r}")
        return price

    @model_validator(mode="after")
    def _one_region(self) -> Prices:
        regions = sorted({price.region for _, price in self})
        if len(regions) > 1:
            raise ValueError(f"prices of several regions: {', '.join(regions)}")
        return self

    @property
    def region(self) -> str:
        """The region of all of them."""
        return self.lambda_x86.region


def load_prices(path: str | None = None, region: str | None = None) -> Prices:
    """Read a file of prices.

    Args:
        path: a TOML file with a table for each price, as workflow/prices.toml; None is that file.
        region: the region that they must be of; None: whichever it is.

    Raises:
        PricesError: there is no such file, it is not as expected, or of another region.
    """
    file = Path(path) if path is not None else DEFAULT
    prices = _parse(file)
    if region is not None and region != prices.region:
        raise PricesError(
            f"no prices of {region}: {file} has those of {prices.region}; make a copy with the "
            "other region's and name it by --prices"
        )
    return prices


def _parse(file: Path) -> Prices:
    try:
        if file.stat().st_size > _LIMIT:
            raise PricesError(f"{file}: larger than {_LIMIT:,} bytes, so not a file of prices")
        return Prices.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise PricesError(f"{file}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PricesError(f"{file}: not TOML: {error}") from None
    except ValidationError as error:
        raise PricesError(f"{file}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first of the problems, on one line."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    text = problem["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    return f"{place + ': ' if place else ''}{text}{f' (and {more} more)' if more else ''}"
