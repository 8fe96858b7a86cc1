"""What may stand in report.json: the type of every field that a page, a table or a command reads.

A result may come from a stranger, so nothing of it is used before it was checked here. Fields that nothing reads, such
as those of another release inside an entry, may hold anything.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\Z")]
Picture = Annotated[str, Field(pattern=r"^data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]*={0,2}\Z")]
Answer = tuple[Count, Share]  # class and probability


_ENTRY = ConfigDict(regex_engine="python-re")  # whose \Z no line break passes


class _Entry(BaseModel):
    model_config = _ENTRY

    @model_validator(mode="after")
    def _ends_together(self) -> Self:
        """An interval has both ends or none."""
        values = vars(self)
        for name in (n.removesuffix("_low") for n in values if n.endswith("_low")):
            if (values[f"{name}_low"] is None) != (values[f"{name}_high"] is None):
                raise ValueError(f"{name} has one end of its interval, expected both or none")
        return self


class _Agreement(_Entry):
    top1_agreement: Share | None
    top1_agreement_low: Share | None
    top1_agreement_high: Share | None

    @model_validator(mode="after")
    def _certain(self) -> Self:
        if self.top1_agreement is not None and self.top1_agreement_low is None:
            raise ValueError("an agreement stands without its interval")
        return self


class _Disagreement(_Entry):
    image: str
    teacher: Answer
    student: Answer
    thumbnail: Picture | None = None


class _FeatureMap(_Entry):
    image: str
    thumbnail: Picture | None
    teacher: Picture
    student: Picture


class _Output(_Entry):
    part: str
    kind: Literal["scores", "multilabel", "embedding", "values", "map", "boxes"]
    imitated: bool
    error: Number | None
    error_low: Number | None
    error_high: Number | None
    correlation: Number | None
    agreement: Share | None
    agreement_low: Share | None
    agreement_high: Share | None
    overlap: Number | None
    cosine: Number | None
    cosine_low: Number | None
    cosine_high: Number | None
    neighbours: Number | None
    neighbours_low: Number | None
    neighbours_high: Number | None
    nearest: Count | None = None
    psnr: Number | None


class _Detections(_Entry):
    agreement: Share | None  # with its interval, or none of the three
    agreement_low: Share | None
    agreement_high: Share | None
    images_with_objects: Count
    objects_teacher: Count
    objects_student: Count
    objects_matched: Count
    map50: Number | None
    map: Number | None
    least_score: Number
    least_iou: Number

    @model_validator(mode="after")
    def _certain(self) -> Self:
        if (self.agreement is None) != (self.agreement_low is None):
            raise ValueError("the agreement stands without its interval, or the interval without it")
        return self


class _Latency(_Entry):
    runtime: str
    threads: Count | None
    batch: Count
    teacher_ms: Number
    student_ms: Number
    share: Number
    share_low: Number
    share_high: Number


class _LayerRow(_Entry):
    layer: str
    error: Size | None
    own: Size | None
    within: list[str]
    after: str | None = None


class _Layers(_Entry):
    images: Count
    kind: Literal["real", "random"]
    rows: list[_LayerRow]
    jump: str | None
    unseen: list[str]


class _Export(_Entry):
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+\Z")]
    bytes: Count
    precision: str
    tolerance: Number | None
    opset: Count | None
    batch: Annotated[str, Field(pattern=r"^(any|[0-9]{1,9})\Z")]
    fixed_because: str | None
    size: str | None = None
    size_fixed_because: str | None = None
    normalises: bool = False
    not_run: str | None = None
    error_random: Number | None
    error_real: Number | None
    layers: _Layers | None = None


class _Int8Row(_Agreement):
    name: str
    ms: Number
    share: Number
    bytes: Count


class _Int8Mimic(_Entry):
    steps: Count = 0
    rate: Number | None = None  # not in reports of before
    kept: Count = 0
    images: Count = 0
    judged_by: Count = 0
    error_before: Number | None = None
    error: Number | None = None
    unrounded: Count = 0
    failed: str | None = None


class _Int8(_Entry):
    runtime: str
    threads: Count | None
    batch: Count
    images: Count
    images_quantised_by: Count
    without_teacher: str | None
    rows: list[_Int8Row]
    weight_bits: Count | None = None
    mimic: _Int8Mimic | None = None
    required: bool = False


class _Alternative(_Agreement):
    name: str
    seconds: Number


class _Rehearsal(_Entry):
    without_extra: Number | None = None
    alone: tuple[Number, Number] | None = None
    tried: list[tuple[Any, Number]] = []
    steps: Count = 0
    images: Count = 0


class _Recovery(_Entry):
    rehearsal: _Rehearsal | None = None


class _Config(_Entry):
    mimic: dict[str, Any] | None = None
    recovery: _Recovery | None = None


class ReportFields(TypedDict, total=False):
    """The fields of a `Report`; reports of earlier releases lack some."""

    __pydantic_config__ = _ENTRY  # type: ignore[misc]

    params_teacher: Count | None
    params_student: Count | None
    macs_teacher: Count | None
    macs_student: Count | None
    macs_not_counted: list[str]
    top1_agreement: Share | None
    top1_agreement_low: Share | None
    top1_agreement_high: Share | None
    feature_error_relative: Number | None
    feature_cosine: Number | None
    agreement_by_class: dict[str, tuple[Count, Annotated[int, Field(ge=1, lt=2**63)]]]
    confidence_teacher: Share | None
    confidence_student: Share | None
    disagreements: list[_Disagreement]
    outputs: list[_Output]
    detections: _Detections | None
    feature_maps: list[_FeatureMap]
    class_names: dict[str, str]
    widths: dict[str, tuple[Count, Count]]
    losses: list[tuple[Count, Number | None]]
    min_agreement: Number | None
    max_error: Number | None
    top1_teacher: Number | None
    top1_student: Number | None
    top1_difference: Number | None
    top1_difference_low: Number | None
    top1_difference_high: Number | None
    map50_teacher: Number | None
    map50_student: Number | None
    map_teacher: Number | None
    map_student: Number | None
    objects_labelled: Count | None
    images_few: Count | None
    images_choose: Count | None
    images_extra: Count | None
    pictures_extra: Count | None
    extra: str | None
    images_held_out: Count | None
    images_labelled: Count | None
    image_hashes: dict[str, list[str]]
    images_check: dict[str, Any]
    latency: _Latency | None
    exports: dict[str, _Export]
    int8: _Int8 | None
    alternatives: list[_Alternative]
    crossfit: Count | None
    steps: Count | None
    seconds: Number | None
    config: _Config
    versions: dict[str, str]
    platform: dict[str, Any]
    notes: list[str]


class StoredFields(TypedDict, total=False):
    """What report.json keeps of the folder itself."""

    __pydantic_config__ = _ENTRY  # type: ignore[misc]

    weights_sha256: Digest
    plan_sha256: Digest
    extra: dict[str, Any]
    run: bool
