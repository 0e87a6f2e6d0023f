"""The config: one frozen model for each block, with the meaning, the range and the default of each key.

`make config` generates config/config.yaml, config/config.schema.json and docs/config.md from these models. The module
`config_text` reads configs into these models. The Snakefile imports both modules, so neither imports torch.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    WrapValidator,
    model_validator,
)
from pydantic.annotated_handlers import GetCoreSchemaHandler
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from auto_quantize_model.escape import quoted

INC_INT8, UNQUANTIZED = "inc_int8", "unquantized"  # as in schemes.scheme, which no root module imports
SHIPPED_MODEL = "resources/models/digits_vlm"  # the snapshot that is part of the repository
RESERVED = re.compile(r"(archives|logs|benchmarks|model_manifest\.json)\Z|(con|prn|aux|nul|com\d|lpt\d)(\.|\Z)", re.I)


class Contradiction(ValueError):
    """Values that are right one by one and wrong together. Each line of the message names the keys itself."""


@dataclass(frozen=True)
class Matching:
    """Text that must match a pattern as a whole; `fault` describes text that does not match, and says what to write."""

    pattern: str
    fault: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": f"^{self.pattern}$"}

    def checked(self, text: str) -> str:
        """`text` itself."""
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"{quoted(text)} is {self.fault}")
        return text


def free(name: str) -> str:
    """`name`, after a check that neither the pipeline below results/ nor a file system uses that name itself."""
    if RESERVED.match(name):
        raise ValueError(
            f"{quoted(name)} is a name that the pipeline or a file system uses itself; choose another name"
        )
    return name


def expanded(path: str) -> str:
    """`path` with the home folder in place of a `~` at its start."""
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ValueError(f"{quoted(path)}: no such user; write the path out")
    return full


def regular_expression(pattern: str) -> str:
    """`pattern`, after a check that Python can compile it."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression ({error}); correct it") from None
    return pattern


def each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, after a check that no entry is repeated."""
    if len(set(names)) < len(names):
        raise ValueError("an entry is there twice; remove one of the two")
    return names


Name = Annotated[
    str,
    Field(max_length=64),
    Matching(
        r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?",
        "not a name; write letters, digits, '_', '-' and '.', with a letter or digit first and no '.' last",
    ),
    AfterValidator(free),
]
Line = Annotated[
    str,
    Field(min_length=1, max_length=4096),
    Matching(r"[^\x00-\x1F\x7F]*", "more than a line of text; remove line breaks and control characters"),
]
Location = Annotated[Line, AfterValidator(expanded)]
Repository = Annotated[  # the hub's own rule
    str,
    Field(max_length=193),
    Matching(
        r"(?!.*(--|\.\.))([A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?/)?"
        r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?(?<!\.git)",
        "not a repository of the hub; write owner/name, without an address",
    ),
]
Prompt = Annotated[
    str, Field(min_length=1, max_length=10_000), Matching(r"[\s\S]*\S[\s\S]*", "blank; write what to ask")
]
Pattern = Annotated[str, Field(max_length=1000), AfterValidator(regular_expression)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000_000)]
Pixels = Annotated[int, Field(ge=28 * 28, le=8192 * 8192)]
Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=2**20, strict=True)]
# INC 2.6's static INT8, and the presets of compressed-tensors 0.20.
Scheme = Literal[
    "inc_int8",
    "W8A8",
    "INT8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP4A16",
    "MXFP4XFP8",
    "MXFP6A16",
    "MXFP6A8",
    "MXFP8",
    "MXFP8A16",
    "W4A16",
    "W4A16_ASYM",
    "W4AFP8",
    "W2A4",
    "W2A8",
    "W2A16",
    "W3A4",
    "W3A8",
    "W3A16",
    "W4A4",
    "W4A8",
    "W5A8",
    "W5A16",
    "W6A8",
    "W6A16",
    "W7A8",
    "W7A16",
    "W8A16",
]
Map = Literal["isolated", "fallback", "requantize"]
Maps = Annotated[  # not strict: files hold lists
    tuple[Map, ...],
    Field(strict=False, json_schema_extra={"uniqueItems": True}),
    AfterValidator(each_once),
]


class Block(BaseModel):
    """A block of keys. An unknown key is an error, so a misspelled key never means a default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _without_contradictions(self) -> "Block":
        if found := list(self.contradictions()):
            raise Contradiction("\n".join(found))
        return self

    def contradictions(self) -> Iterator[str]:
        """A line for each rule that keys of this block break together."""
        yield from ()


class FromSource(Block):
    """A block whose key `source` decides which other keys must not be null."""

    block: ClassVar[str]
    needs: ClassVar[dict[str, tuple[str, ...]]]

    def contradictions(self) -> Iterator[str]:
        source = getattr(self, "source")  # noqa: B009  a field of each subclass
        for key in self.needs.get(source, ()):
            if getattr(self, key) is None:
                yield f"{self.block}.{key}: null; write text, as {self.block}.source is {source}"

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler.resolve_ref_schema(made := handler(schema))
        found["allOf"] = [
            {
                "if": {"required": ["source"], "properties": {"source": {"const": source}}},
                "then": {"properties": {key: {"type": "string"} for key in keys}},
            }
            for source, keys in cls.needs.items()
        ]
        return made


class ModelSpec(FromSource):
    """Which model is measured."""

    block = "model"
    needs = {"hub": ("repo_id", "revision")}

    name: Name
    """Name of the model. The results lie in results/NAME/."""
    source: Literal["digits", "smollm2", "local", "hub"]
    """digits: the shipped digit reader. smollm2: SmolLM2-135M through pip. local: your own. hub: download one."""
    path: Location
    """Directory of the snapshot. With smollm2 the pipeline makes it. With hub it is a link that the pipeline makes."""
    repo_id: Repository | None = None
    """hub: the repository, as owner/name."""
    revision: Line | None = None
    """hub: the commit, 40 hexadecimal digits."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.source == "digits" and os.path.normpath(self.path) != SHIPPED_MODEL:
            yield (
                f"model.path: {quoted(self.path)} is not the shipped snapshot {SHIPPED_MODEL}, which model.source"
                " digits takes; set model.source: local to take your own"
            )


class Columns(Block):
    """The columns of a hub data set, by what they hold. null: the data set has no such column."""

    id: Line | None = None
    """Name of a row. null: rows are numbered."""
    image: Line | None = None
    """Image. null: samples are text alone."""
    prompt: Line | None = None
    """User's turn. Of a list the first text counts. null: calibration.prompt."""
    answer: Line | None = None
    """Assistant's turn. Of a list the first text counts. null: an empty turn."""


class CalibrationSpec(FromSource):
    """Which samples the observers see and the scores come from."""

    block = "calibration"
    needs = {"local": ("path",), "hub": ("repo_id", "revision", "split")}

    name: Name
    """Name of the calibration set. The results lie in results/MODEL/NAME/."""
    source: Literal["digits", "local", "hub"]
    """digits: scikit-learn's, turned and shifted. local: the file or folder at path. hub: a streamed data set."""
    path: Location | None = None
    """local: a .jsonl, .json or .parquet file, or a folder of images."""
    prompt: Prompt = "Describe this image."
    """Question for each image that has no prompt of its own."""
    format: Literal["chat", "plain"] = "chat"
    """chat: the model's chat template. plain: no template, for base models, encoders, T5 and BART, and PaliGemma."""
    repo_id: Repository | None = None
    """hub: the data set, as owner/name."""
    revision: Line | None = None
    """hub: the commit, 40 hexadecimal digits."""
    split: Line | None = None
    """hub: the split, such as val."""
    columns: Columns = Columns()
    num_samples: Count
    """Calibration samples. All set the scales; the first batches are scored."""
    num_heldout: CountOrNone
    """Held-out samples. No calibration sees them."""
    seed: Seed
    """Seed of the draw of the samples."""
    batch_size: Count
    """Samples in a batch. They must have equal lengths: nothing is padded."""
    heldout_batch_size: Count | None = None
    """Held-out samples in a batch; larger batches take less time. null: batch_size."""
    min_pixels: Pixels
    """Smaller images are enlarged to this area, by Qwen's processors alone."""
    max_pixels: Pixels
    """Larger images are reduced to this area. Many models then resize any image to their own size."""
    max_tokens: Annotated[int, Field(ge=1, le=2**20)]
    """Samples with more tokens are refused."""

    @property
    def place(self) -> str:
        """Where the samples come from, for messages."""
        return self.path or self.repo_id or f"calibration.source {self.source}"

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.num_samples < self.batch_size:
            yield (
                f"calibration.num_samples ({self.num_samples}) is below calibration.batch_size ({self.batch_size});"
                " raise num_samples"
            )
        if self.min_pixels > self.max_pixels:
            yield "calibration.min_pixels is above calibration.max_pixels; raise max_pixels"


def two(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`sizes`, after a check that there are two of them."""
    if len(sizes) != 2:
        raise ValueError(f"{len(sizes)} numbers; write two, the rows and the columns of a block")
    return sizes


# The forms in which compressed-tensors stores floats of fewer than 8 bits: (strategy, group_size, scale_dtype).
MX = ("group", 32, "torch.uint8")
LAYOUTS = {4: (MX, ("tensor_group", 16, "torch.float8_e4m3fn")), 6: (MX,)}


class Side(Block):
    """How weights or inputs are quantized: fields of `QuantizationArgs` of compressed-tensors.

    Ranges are minima and maxima, so there is no field for an observer.
    """

    num_bits: Annotated[int, Field(ge=2, le=8)]
    """Bits of a value. float: 4, 6 or 8."""
    type: Literal["int", "float"] = "int"
    """Type of a value."""
    symmetric: bool = True
    """false: integers with a zero_point."""
    group_size: Width | None = None
    """Columns that share a scale, with the strategies group and tensor_group."""
    scale_dtype: Literal["torch.float8_e4m3fn", "torch.uint8"] | None = None
    """Type that scales are rounded to. torch.uint8: powers of two, as in MXFP4. null: the model's type."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Side":
        if found := next(self.faults(getattr(self, "strategy")), ""):  # noqa: B009  a field of each subclass
            raise ValueError(found)
        return self

    def faults(self, strategy: str) -> Iterator[str]:
        """Each rule that fields of this side break together, as a clause."""
        if self.type == "float" and self.num_bits not in (4, 6, 8):
            yield f"no float has {self.num_bits} bits; set num_bits to 4, 6 or 8"
            return
        if self.type == "float" and not self.symmetric:
            yield "a float has no zero_point; set symmetric to true"
        grouped = strategy in ("group", "tensor_group")
        if grouped != (self.group_size is not None):
            yield f"strategy {strategy} {'needs a' if grouped else 'takes no'} group_size; correct one of the two"
        layout = (strategy, self.group_size, self.scale_dtype)
        if self.type == "float" and self.num_bits < 8 and layout not in LAYOUTS[self.num_bits]:
            nvfp4 = "; or tensor_group, 16 and torch.float8_e4m3fn, as in NVFP4" if self.num_bits == 4 else ""
            yield (
                f"a float of {self.num_bits} bits needs strategy group, group_size 32 and scale_dtype torch.uint8, as"
                f" in MXFP{self.num_bits}{nvfp4}"
            )
        elif strategy == "tensor_group" and (self.type, self.num_bits) != ("float", 4):
            yield "strategy tensor_group is that of 4-bit floats; take group"
        elif self.scale_dtype == "torch.uint8" and (self.type, strategy, self.group_size) != ("float", "group", 32):
            yield "scale_dtype torch.uint8 needs type float, strategy group and group_size 32; correct one of them"


class Weights(Side):
    """How weights are quantized."""

    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"]
    """Values that share a scale: all, a row, group_size columns of a row, a block, or as in NVFP4."""
    block_structure: Annotated[tuple[Width, ...], Field(strict=False), AfterValidator(two)] | None = None
    """block: rows and columns of a block, such as [128, 128]."""

    def faults(self, strategy: str) -> Iterator[str]:
        yield from super().faults(strategy)
        if (strategy == "block") != (self.block_structure is not None):
            needs = "needs a" if strategy == "block" else "takes no"
            yield f"strategy {strategy} {needs} block_structure; correct one of the two"


class Inputs(Side):
    """How inputs are quantized."""

    strategy: Literal["tensor", "token", "group", "tensor_group"]
    """Values that share a scale: all, a token, group_size columns of a token, or as in NVFP4."""
    dynamic: Literal[True, False, "local"] = False
    """true: scales of each input. false: those of the calibration. local: its global scale alone, as in NVFP4."""

    def faults(self, strategy: str) -> Iterator[str]:
        yield from super().faults(strategy)
        if self.dynamic is False and strategy != "tensor":
            yield f"strategy {strategy} is dynamic; set dynamic to {'local' if strategy == 'tensor_group' else 'true'}"
        if (strategy == "tensor_group") != (self.dynamic == "local") and self.dynamic is not False:
            yield "dynamic local and strategy tensor_group go together; correct one of the two"


class OwnScheme(Block):
    """A scheme of one's own, by its fields or from a checkpoint."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["weights"]}, {"required": ["checkpoint"]}]})

    name: Name
    """Name of the scheme, which no other scheme has."""
    weights: Weights | None = None
    """How weights are quantized. null: as in the checkpoint."""
    input_activations: Inputs | None = None
    """How inputs are quantized. null: they stay as they are."""
    checkpoint: Location | None = None
    """Take each op from this checkpoint of compressed-tensors: a folder, or owner/name@commit of the hub."""

    @model_validator(mode="after")
    def _by_fields_or_checkpoint(self) -> "OwnScheme":
        if (self.weights is None) == (self.checkpoint is None):
            raise ValueError("a scheme has weights or a checkpoint; write one of the two")
        if self.checkpoint and self.input_activations:
            raise ValueError("the checkpoint says how inputs are quantized; remove input_activations")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that `schemes.compressed.scheme_of` takes, or the checkpoint."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


def repository_at(checkpoint: str) -> tuple[str, str] | None:
    """Repository and commit of a checkpoint on the hub; None for a folder."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", checkpoint)
    return (found[1], found[2]) if found else None


NAMED = TypeAdapter(Scheme)


def by_name_or_own(value: Any, either: Any) -> str | OwnScheme:
    """An entry of `sensitivity.schemes`, read as a mapping or as a name, so that an error is of that form alone."""
    if isinstance(value, Mapping | OwnScheme):
        return OwnScheme.model_validate(value)
    return NAMED.validate_python(value)


def named_once(entries: tuple[str | OwnScheme, ...]) -> tuple[str | OwnScheme, ...]:
    """`entries`, after a check that no two schemes have one name."""
    own = [entry.name for entry in entries if isinstance(entry, OwnScheme)]
    taken = {name.lower(): name for name in get_args(Scheme)}
    for name in own:
        if name.lower() in taken:
            raise ValueError(
                f"{quoted(name)} is the name of a scheme already ({taken[name.lower()]}); choose another name"
            )
    each_once((*own, *(entry for entry in entries if isinstance(entry, str))))
    return entries


Schemes = Annotated[  # not strict: files hold lists
    tuple[Annotated[Scheme | OwnScheme, WrapValidator(by_name_or_own)], ...],
    Field(strict=False, json_schema_extra={"uniqueItems": True}),
    AfterValidator(named_once),
]


Names = Annotated[
    tuple[str, ...],
    Field(strict=False, json_schema_extra={"uniqueItems": True}),
    AfterValidator(each_once),
]


class PlanSpec(Block):
    """The keys of the block sensitivity that the plan depends on."""

    engine: Literal["replay", "inc", "auto"] = "replay"
    """replay: INC's arithmetic in place, bit for bit. inc: INC itself. auto: INC where replay cannot."""
    confidence_batches: Count = 2
    """Calibration batches that are scored, each on its own."""
    schemes: Schemes = ("inc_int8",)
    """Schemes to measure: inc_int8, presets of compressed-tensors such as W8A8, and schemes of your own."""
    maps: Maps = ("isolated", "fallback", "requantize")
    """Maps to measure. isolated gives the ranking, so it must be one of them."""
    experts: Literal["each", "block"] = "each"
    """each: every matrix of an expert is an op. block: the same matrix of all experts is one op, without inc_int8."""
    fallback_schemes: Names = ()
    """Schemes in which the map fallback is measured as well, of those in schemes; it is always in inc_int8."""
    reduce_range: bool | None = None
    """true: activations take 7 bits of 8. false: 8. null: INC's choice, 7 on a CPU without VNNI."""
    op_type_dict: dict[str, Literal["fp32"]] = {}
    """Op types that stay in FP32, such as {Embedding: fp32}."""
    op_name_dict: dict[Pattern, Literal["fp32"]] = {}
    """Ops that stay in FP32: regular expressions for whole names, such as {"model.visual.*": fp32}."""

    @property
    def fields_of_schemes(self) -> dict[str, dict[str, Any]]:
        """{name of each scheme: its fields}; a scheme by name has none."""
        return dict((each.name, each.fields) if isinstance(each, OwnScheme) else (each, {}) for each in self.schemes)


class SensitivitySpec(PlanSpec):
    """What is measured, and how."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the replay. cuda: a GPU. --resources gpu=0 means cpu."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch in the steps that measure. null: as many as --cores gives the job."""
    tf32: bool = False
    """true: a GPU may round float32 products to TF32, which changes scores."""
    deterministic: bool = True
    """false: torch may choose faster algorithms, whose last bits can differ from run to run."""
    exact: Annotated[
        str,
        Matching(r"auto|all|none|top:[1-9]\d{0,5}", "not a choice; write auto, all, none, or top:N, such as top:40"),
    ] = "auto"
    """Scores of the isolated map to measure; the others are estimated. auto: all if cheap, else top:40 of a scheme."""
    time_budget: (
        Annotated[str, Matching(r"[1-9]\d{0,5}[smh]", "not a time; write a number and s, m or h, such as 20m")] | None
    ) = None
    """Time for the capture, such as 20m. It chooses the estimates, and with exact auto the scores. null: no limit."""
    parts: Annotated[int, Field(ge=1, le=1000)] = 1
    """Jobs that share the capture, such as one for each node of a cluster. The results have the same bytes."""
    audit_ops: Annotated[int, Field(ge=2)] = 4
    """Ops that INC's own helpers measure again, the most and the least sensitive among them."""

    def contradictions(self) -> Iterator[str]:
        if self.engine == "inc" and len(self.schemes) > 1:
            yield "sensitivity.engine inc measures inc_int8 alone; set sensitivity.schemes to [inc_int8]"
        if self.engine != "replay" and "inc_int8" not in self.schemes:
            yield f"sensitivity.engine {self.engine} measures inc_int8, which is not in sensitivity.schemes; add it"
        if self.experts == "block" and self.engine != "replay":
            yield "sensitivity.experts block needs sensitivity.engine replay; set engine to replay"
        if self.experts == "block" and list(self.schemes) == ["inc_int8"]:
            yield "sensitivity.experts block needs a scheme of compressed-tensors; add one, such as W8A8, to schemes"
        if self.engine != "replay" and self.exact not in ("auto", "all"):
            yield f"sensitivity.exact {self.exact} needs sensitivity.engine replay; set one of the two to its default"
        if self.time_budget and self.engine != "replay":
            yield "sensitivity.time_budget needs sensitivity.engine replay; remove time_budget"
        if self.time_budget and self.exact == "all":
            yield "sensitivity.time_budget has nothing to choose with sensitivity.exact all; set exact to auto"
        if self.parts > 1 and self.engine != "replay":
            yield "sensitivity.parts needs sensitivity.engine replay; set parts to 1"
        if self.parts > 1 and self.time_budget:
            yield "sensitivity.time_budget would choose otherwise in each part; set exact to top:N, or parts to 1"
        for name in self.fallback_schemes:
            if name not in self.fields_of_schemes:
                yield f"sensitivity.fallback_schemes: {quoted(name)} is not in sensitivity.schemes; add it there"
        if self.fallback_schemes and "fallback" not in self.maps:
            yield "sensitivity.fallback_schemes needs the map fallback; add fallback to sensitivity.maps"
        if "isolated" not in self.maps:
            yield "sensitivity.maps: isolated is not in the list; add isolated"
        if self.engine != "replay" and self.device == "cuda":
            yield "sensitivity.engine inc and auto run INC, on the CPU only; set sensitivity.device to cpu"


class DecideSpec(Block):
    """Which scheme each op gets under a budget, and the proof on held-out samples."""

    candidates: Names | None = None
    """Schemes to choose from. null: those of compressed-tensors in sensitivity.schemes, or inc_int8 without these."""
    heldout_batches: CountOrNone = 0
    """Held-out batches on which each choice of schemes is measured. 0: nothing is decided."""
    points: Annotated[int, Field(ge=2, le=100)] = 12
    """Budgets between the smallest model and the unquantized one. For each the best choice is measured."""
    refine_batches: CountOrNone = 0
    """Calibration batches on which the choices for the budgets in profiles are refined. 0: no choice is refined."""
    fixed: dict[Pattern, str] = {}
    """Schemes by regular expressions for whole names of ops, such as {lm_head: unquantized}."""
    never: dict[Pattern, Names] = {}
    """Schemes that ops do not get, such as {"model.visual.*": [NVFP4]}."""
    at_least: dict[Pattern, str] = {}
    """Schemes that set the fewest bytes of ops, such as {".*down_proj": FP8_DYNAMIC}."""
    seconds: dict[Pattern, dict[str, Annotated[float, Field(ge=0, le=10**6)]]] = {}
    """Seconds of an op in each scheme when served, such as {".*": {NVFP4: 1e-5, unquantized: 3e-5}}."""


class Target(Block):
    """What a profile must reach on the held-out samples. null asks for nothing."""

    max_divergence: Annotated[float, Field(gt=0, le=1000)] | None = None
    """smallest: the divergence from the unquantized model may be this much: nats per token, or the cosine distance."""
    max_accuracy_drop: Share | None = None
    """smallest: this share of the answers, 0 to 1, may become wrong where the unquantized model is right."""
    min_sqnr_db: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    """smallest: the SQNR of the output must be this high, in dB. 30 is an error of 0.1 %."""
    max_bits: Annotated[float, Field(gt=0, le=64)] | None = None
    """safest: a weight may take so many bits, on average over all ops and with scales."""
    max_weight_bytes: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """safest: the weights of the model may take so many bytes."""
    max_seconds: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """safest: the ops may take so much time, by the table decide.seconds."""


class QuantizeSpec(Block):
    """How the model is quantized. Only `snakemake quantize_model` reads this block."""

    profile: Literal["smallest", "balanced", "safest"] = "balanced"
    """Profile that is applied."""


class MachineSpec(Block):
    """What a step may take of its machine. No result depends on this block."""

    memory: Annotated[str, Matching(r"[1-9]\d{0,5}[MG]iB", "not a size; write it as 10GiB or 9000MiB")] | None = None
    """Memory of a step that runs the model, such as 10GiB. On the CPU, weights stay in their files if need be."""

    score_store: Location | None = None
    """Folder of the score store, such as one on a volume that outlives a job. Null: results/scores."""

    image: Location | None = None
    """Image for --sdm apptainer: a .sif file or docker://REGISTRY/NAME:TAG, made by the Dockerfile. Null: no image."""


class Config(Block):
    """All blocks. The defaults measure the embedded digit reader."""

    model: ModelSpec = ModelSpec(
        name="digits_vlm",
        source="digits",
        path=SHIPPED_MODEL,
    )
    calibration: CalibrationSpec = CalibrationSpec(
        name="digits",
        source="digits",
        num_samples=32,
        num_heldout=256,
        seed=0,
        batch_size=2,
        heldout_batch_size=64,
        min_pixels=56 * 56,
        max_pixels=56 * 56,
        max_tokens=512,
    )
    sensitivity: SensitivitySpec = SensitivitySpec(schemes=("inc_int8", "W8A8", "FP8_DYNAMIC", "W4A16", "NVFP4"))
    decide: DecideSpec = DecideSpec(heldout_batches=4)
    profiles: Target = Target(max_divergence=0.001, max_bits=6.0)
    quantize: QuantizeSpec = QuantizeSpec()
    machine: MachineSpec = MachineSpec()

    def contradictions(self) -> Iterator[str]:
        of_heldout = "heldout_batch_size" if self.calibration.heldout_batch_size else "batch_size"
        for drawn, measured, key in (
            ("calibration.num_samples", "sensitivity.confidence_batches", "batch_size"),
            ("calibration.num_heldout", "decide.heldout_batches", of_heldout),
            ("calibration.num_samples", "decide.refine_batches", "batch_size"),
        ):
            samples, batches, size = self.value(drawn), self.value(measured), getattr(self.calibration, key)
            if batches * size > samples:
                yield (
                    f"{measured} ({batches}) times calibration.{key} ({size}) is more than {drawn} ({samples});"
                    f" raise {drawn.partition('.')[2]}, or lower {measured.partition('.')[2]}"
                )
        yield from self.of_candidates()

    @property
    def candidates(self) -> tuple[str, ...]:
        """The schemes that a decision chooses from."""
        if self.decide.candidates is not None:
            return self.decide.candidates
        schemes = self.sensitivity.fields_of_schemes
        found = tuple(name for name, fields in schemes.items() if name != INC_INT8 and "checkpoint" not in fields)
        return found or (INC_INT8,)

    def of_candidates(self) -> Iterator[str]:
        """The contradictions of the block decide with the schemes."""
        schemes = self.sensitivity.fields_of_schemes
        for name in self.candidates:
            if name not in schemes:
                yield f"decide.candidates: {quoted(name)} is not in sensitivity.schemes; add it there"
            elif "checkpoint" in schemes[name]:
                yield f"decide.candidates: {quoted(name)} comes from a checkpoint and cannot be written; remove it"
        if not self.candidates:
            yield "decide.candidates is empty; name a scheme, or set decide.heldout_batches to 0"
        if INC_INT8 in self.candidates and len(self.candidates) > 1:
            yield (
                "decide.candidates: no engine serves inc_int8 together with schemes of compressed-tensors; name either"
                " inc_int8 alone or the others"
            )
        budgets = self.profiles.max_bits, self.profiles.max_weight_bytes, self.profiles.max_seconds
        if self.decide.refine_batches and INC_INT8 in self.candidates:
            yield "decide.refine_batches: no choice of inc_int8 can be refined; name other candidates, or set it to 0"
        if self.decide.refine_batches and not any(budgets):
            yield "decide.refine_batches: profiles has no budget to refine a choice for; set profiles.max_bits"
        if self.profiles.max_seconds is not None and not self.decide.seconds:
            yield "profiles.max_seconds needs the times of the ops; write a table into decide.seconds, or remove it"
        named = [("fixed", name) for name in self.decide.fixed.values()]
        named += [("at_least", name) for name in self.decide.at_least.values()]
        named += [("never", name) for names in self.decide.never.values() for name in names]
        named += [("seconds", name) for times in self.decide.seconds.values() for name in times]
        for key, name in named:
            if name not in (*self.candidates, UNQUANTIZED):
                yield (
                    f"decide.{key}: {quoted(name)} is not a candidate; write one of"
                    f" {', '.join((*self.candidates, UNQUANTIZED))}"
                )

    def value(self, key: str) -> Any:
        """The value of a key such as `calibration.seed`."""
        found: Any = self
        for name in key.split("."):
            found = getattr(found, name)
        return found


class _OfFiles(GenerateJsonSchema):
    """The schema of a file, which may hold only some of the keys; without titles, which only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False


def json_schema(block: type[Block] = Config) -> dict[str, Any]:
    """The JSON Schema of a block, with the definitions that it refers to."""
    return block.model_json_schema(schema_generator=_OfFiles)
