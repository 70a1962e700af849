"""The fields of a cell's JSON and their bounds, declared once as pydantic models."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from pydantic_core import ErrorDetails

from bayestune.errors import ConfigError
from bayestune.tasks.rows import shown

Cell = dict[str, Any]
"""A cell as JSON holds it, checked by `check_cell`."""

KEY = ("table", "task", "eval_task", "method", "draws", "seed")
"""The fields that name a cell, in sorting order."""

BINS = 15
COVERAGES = 100
TARGETS = (0.05, 0.1, 0.2)
ALPHA = 0.1
"""Share of prediction sets that may miss the label."""
HISTOGRAM_BINS = 20
HISTOGRAM_ENDS = {"total": 2.0, "epistemic": 0.5, "max_prob": 1.0}
"""Upper ends of the histograms, entropies in nats. The last bin also holds everything above."""

_FREE = ("experiment", "sha256", "versions", "hardware")
_ROUNDING = 1e-9  # a sum of shares may end this far outside its bounds

_Bins = Field(min_length=BINS, max_length=BINS)
_Pair = Field(min_length=2, max_length=2)
_Points = Field(min_length=1, max_length=COVERAGES + 1)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=-_ROUNDING, le=1 + _ROUNDING)]
Nats = Annotated[float, Field(ge=-_ROUNDING)]
Brier = Annotated[float, Field(ge=-_ROUNDING, le=2 + _ROUNDING)]
Score = Literal["total", "epistemic", "max_prob"]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class _FreeFields(_Fields, extra="allow"):
    """Some required texts, and any other JSON content."""

    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class Experiment(_FreeFields):
    """The settings of the run."""

    model: Text


class Hashes(_FreeFields):
    """SHA-256 of the rows; also of the base weights and the adapter where there are any."""

    train_rows: Text
    eval_rows: Text


class Reliability(_Fields):
    """Rows, mean confidence and accuracy of each bin; null in empty bins."""

    counts: Annotated[list[Whole], _Bins]
    confidence: Annotated[list[Share | None], _Bins]
    accuracy: Annotated[list[Share | None], _Bins]


class Selective(_Fields):
    """The confidence threshold for a target error; `threshold` and `error` are null if no threshold reaches it."""

    target: Share
    threshold: Share | None
    coverage: Share
    rows: Whole
    error: Share | None
    interval: Annotated[list[Share], _Pair]


class PredictionSets(_Fields):
    """Sets calibrated on half of the rows: scores on the other half, as `metrics.split_conformal` gives them."""

    alpha: Share
    threshold: Share
    calibration_rows: Positive
    rows: Positive
    coverage: Share
    size: Annotated[float, Field(ge=0)]


class Histogram(_Fields):
    """Rows in bins of equal width from 0 to `end`."""

    end: float
    counts: Annotated[list[Whole], Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)]


def _check_ends(histograms: dict[str, Histogram]) -> dict[str, Histogram]:
    for name, histogram in histograms.items():
        if histogram.end != HISTOGRAM_ENDS[name]:
            raise ValueError(f"found {name}.end = {histogram.end}, expected {HISTOGRAM_ENDS[name]}")
    return histograms


_Two, _Three, _Four = (Field(min_length=number) for number in (2, 3, 4))
Intervals = Annotated[dict[Literal["accuracy", "nll", "ece", "brier"], Annotated[list[Nats], _Pair]], _Four]
"""95 % bootstrap intervals."""
RiskCoverage = Annotated[dict[Literal["coverage", "risk"], Annotated[list[Share], _Points]], _Two]
"""The points where coverage first reaches 1 %, 2 %, ..., 100 %."""
Conformal = Annotated[dict[Literal["lac", "aps"], PredictionSets], _Two]
Uncertainty = Annotated[dict[Score, Histogram], _Three, AfterValidator(_check_ends)]
Detection = Annotated[dict[Score, Annotated[dict[Literal["auroc", "aupr"], Share], _Two]], _Three]
"""How well each uncertainty separates the rows of `eval_task` (positive) from those of `task`."""


class RowScores(_Fields):
    """Scores of each evaluated row, in their order: the NLL in nats, and 1 if the answer is right, else 0."""

    nll: list[Nats]
    correct: list[Annotated[int, Field(ge=0, le=1)]]


class InDistribution(_Fields):
    """The histograms of the rows of `task`."""

    rows: Positive
    uncertainty: Uncertainty


class CellFields(_Fields):
    """A cell: scores over `rows` rows, how confidence and errors go together, and how the run was made.

    Accuracy and ECE are from 0 to 1, the NLL is in nats, and the Brier score is summed over classes. `aurc` is the
    area under `risk_coverage`. `conformal` is null with too few rows to calibrate on. `conformal` and `row_scores`
    are absent in older cells.
    """

    table: Name
    method: Name
    task: Name
    eval_task: Name
    seed: Whole
    draws: Whole
    accuracy: Share
    nll: Nats
    ece: Share
    brier: Brier
    intervals: Intervals
    rows: Positive
    train_rows: Positive
    reliability: Reliability
    aurc: Share
    risk_coverage: RiskCoverage
    selective: Annotated[list[Selective], Field(min_length=len(TARGETS), max_length=len(TARGETS))]
    conformal: Conformal | None = None
    uncertainty: Uncertainty
    row_scores: RowScores | None = None
    steps: Positive
    seconds: Annotated[float, Field(ge=0)]
    command: Annotated[list[str], Field(max_length=10_000)]
    experiment: Experiment
    sha256: Hashes
    versions: dict[str, JsonValue]
    hardware: dict[str, JsonValue]

    @field_validator("row_scores")
    @classmethod
    def _check_rows(cls, scores: RowScores | None, info: Any) -> RowScores | None:
        rows = info.data.get("rows")
        for name, values in ({} if scores is None else dict(scores)).items():
            if len(values) != rows:
                raise ValueError(f"found {len(values)} values of {name}, expected one for each of {rows} rows")
        return scores


class TransferFields(CellFields):
    """A cell whose `eval_task` is not the `task` that the run was trained on."""

    detection: Detection
    in_distribution: InDistribution


def check_cell(record: Cell, *, where: str) -> None:
    """Raise a ConfigError that names `where` and the first field that is missing, unknown or out of bounds."""
    transfer = isinstance(record.get("task"), str) and record.get("eval_task") != record["task"]
    try:
        (TransferFields if transfer else CellFields).model_validate(record)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_one_line(error.errors(include_url=False)[0])}.") from None


def _one_line(error: ErrorDetails) -> str:
    """Say which field is wrong, what was found and what was expected."""
    place = error["loc"][:2] if error["loc"][:1] and error["loc"][0] in _FREE else error["loc"]
    field, value = shown(".".join(map(str, place))).strip("'"), error["input"]
    match error["type"]:
        case "missing":
            return f"found no field {field}, expected one"
        case "extra_forbidden":
            return f"unknown field {field}, expected only the fields of a cell"
        case "value_error":
            return f"field {field}: {error['msg'].removeprefix('Value error, ')}"
        case "recursion_loop" | "recursion_depth_exceeded":
            return f"cannot be read: field {field} is nested too deeply"
    found = f"a {type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else shown(value)
    expected = re.sub(r"^\w+ should (be|have|match) ", "", error["msg"]).partition(" after validation")[0]
    return f"field {field}: found {found}, expected {expected}"
