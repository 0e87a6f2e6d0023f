"""The report: scores aggregated over batches, ranked, and explained, as Markdown for people and JSON for programs.

In: the manifests, the plan and the capture. Out: one document, the same for the same inputs, and its two renderings.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from auto_quantize_model import escape
from auto_quantize_model.decide.proof import comparisons, prediction
from auto_quantize_model.decide.ranking import aggregated, isolated, ranked, ranking_metric
from auto_quantize_model.decide.schemes import agreements, of_schemes
from auto_quantize_model.decide.stability import Scores, assess, by_batch, rank_taus
from auto_quantize_model.files import InputError, canonical_json, read_json
from auto_quantize_model.measure.states import maps_of
from auto_quantize_model.records import (
    METRICS,
    Audit,
    CalibrationManifest,
    Capture,
    Frontier,
    ModelManifest,
    NotMeasured,
    Output,
    Plan,
    Profiles,
    Score,
    ScoredBatch,
    Why,
    body_of,
    digest_of_record,
)
from auto_quantize_model.report import coverage, explanations, sentences
from auto_quantize_model.schemes.scheme import INC_INT8, UNQUANTIZED, without_places

SCHEMA = Path(__file__).with_name("schema.json")
TEMPLATES = Path(__file__).with_name("templates")
SCHEMA_VERSION = 13
OF_THE_MODEL = ("model", "source", "architecture", "stand_in", "rounded", "digest")
# Below this SQNR the all-INT8 output is mostly error, and the error that one op in FP32 removes is noise.
FALLBACK_FLOOR_DB = 10.0
# Kendall's tau between batches, where 0 is chance.
FALLBACK_FLOOR_TAU = 0.3
# With four times the loss on samples that set no scale, the calibration set does not represent the data.
HELDOUT_GAP = 4.0
CALIBRATION_KEYS = ("source", "seed", "batch_size", "text_only", "image_backend", "digest")


def build_report(
    manifest: ModelManifest,
    calibration: CalibrationManifest,
    plan: Plan,
    capture: Capture,
    audit: Audit,
    frontier: Frontier | NotMeasured,
    profiles: Profiles,
    why: Why | NotMeasured = explanations.NOT_EXPLAINED,
) -> dict[str, Any]:
    """The report as a JSON-able document that its published schema describes.

    `decide.ranking.aggregated` says how batches are aggregated.

    Raises:
        InputError: the capture is of another plan, or holds a score that is not finite.
    """
    if capture.plan_digest != digest_of_record(plan):
        raise InputError("the capture was made from another plan; run the capture rule again (--forcerun)")
    require_finite(capture)
    references = [batch.reference for batch in capture.batches]
    exercised = [op for op in plan.ops if op.ran]
    main, metric = plan.main_scheme, ranking_metric(plan.main_scheme)
    scores = {label: capture.of_map(label, main) for label in maps_of(plan, main, plan.maps)}
    able = [op for op in exercised if main in op.schemes]
    maps = {
        label: isolated(plan, capture, main, metric)
        if label == "isolated"
        else ranked(label, able, scores[label], references, metric)
        for label in scores
    }
    complete = capture.effort.exact == "all"
    in_main = capture.all_in(main)
    in_words = "INT8" if main == INC_INT8 else main
    all_ops = aggregated(in_main, references)
    schemes = of_schemes(plan, capture)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {key: getattr(manifest, key) for key in OF_THE_MODEL},
        "calibration": {
            "name": calibration.calibration,
            **{key: getattr(calibration, key) for key in CALIBRATION_KEYS},
            "samples": {split: len(samples) for split, samples in calibration.samples.items()},
        },
        "measurement": measurement(plan, capture),
        "audit": body_of(audit),
        "versions": capture.versions,
        "coverage": plan.coverage,
        "warnings": [
            *coverage.warnings(plan.coverage),
            *of_the_run(manifest, calibration, len(plan.ops) - len(exercised)),
            *of_checkpoints(plan),
            *sentences.of_inc_check(plan.inc_check),
            *sentences.of_head(vars(plan)),
            *(of_fallback(all_ops, scores["fallback"]) if "fallback" in maps else []),
            *of_heldout(schemes, frontier, plan.output),
        ],
        "main_scheme": main,
        "all_ops": all_ops,
        "batches": [describe_batch(batch, score) for batch, score in zip(capture.batches, in_main, strict=True)],
        "most_sensitive": maps["isolated"][:10] if "isolated" in maps else [],
        "stability": assess(scores["isolated"], in_main, complete) if "isolated" in maps else None,
        "schemes": schemes,
        "scheme_agreements": agreements(schemes),
        "frontier": of_frontier(frontier, plan),
        "profiles": of_profiles(profiles),
        "why": body_of(why),
        "maps": {
            label: {"direction": sentences.DIRECTIONS[label].format(scheme=in_words), "ops": rows}
            for label, rows in maps.items()
        },
        "ops": [
            {
                "op_name": op.op_name,
                "op_type": op.op_type,
                "tower": op.tower,
                "status": "measured" if op.ran else "not_exercised",
                "executions": list(op.executions),
            }
            for op in plan.ops
        ],
        "excluded": [body_of(module) for module in plan.excluded],
    }


def of_frontier(frontier: Frontier | NotMeasured, plan: Plan) -> dict[str, Any]:
    """The frontier as the report shows it, without the values of each sample.

    It has what `decide.proof` finds, and the fields of each candidate, from which a recipe is written.
    """
    body = body_of(frontier)
    if isinstance(frontier, NotMeasured):
        return body
    for point in (*body["points"], *body["controls"]):
        del point["divergence_by_sample"]
    fields = {name: without_places(plan.schemes.get(name, {})) for name in frontier.candidates}
    return body | {"fields": fields, "comparisons": comparisons(frontier), "prediction": prediction(frontier)}


def of_profiles(profiles: Profiles) -> dict[str, Any]:
    """The profiles as the report shows them; a point lists the scheme of each unit, so assignments are left out."""
    body = body_of(profiles)
    for profile in body["profiles"].values():
        del profile["assignment"], profile["point"]["divergence_by_sample"]
    return body


def measurement(plan: Plan, capture: Capture) -> dict[str, Any]:
    """How the scores were measured: engine, arithmetic, and the plan behind them."""
    return {
        "engine": capture.engine,
        **body_of(capture.arithmetic),
        "tf32": capture.tf32,
        "effort": body_of(capture.effort),
        "plan_digest": capture.plan_digest,
        "measured_op": plan.measured_op,
        "head_only": plan.head_only,
        "output": asdict(plan.output),
        "config_digest": plan.config_digest,
        "reduce_range": plan.reduce_range,
        "reduce_range_by": plan.reduce_range_by,
        "inc_check": plan.inc_check,
    }


def describe_batch(batch: ScoredBatch, all_ops: Score) -> dict[str, Any]:
    """A batch of the capture as the report shows it."""
    return {
        "batch": batch.batch,
        "sample_ids": list(batch.sample_ids),
        "tokens": batch.tokens,
        "image_tokens": batch.image_tokens,
        "reference_sum_of_squares": batch.reference["all"],
        "all_ops_mse_value": all_ops.mse_value,
    }


def require_finite(capture: Capture) -> None:
    """Refuse a capture with a score that is not finite.

    Raises:
        InputError: naming op, map and batch.
    """
    for score in capture.scores:
        for metric in METRICS:
            value = getattr(score, metric)
            if value is not None and not math.isfinite(value):
                raise InputError(
                    f"map {score.map}, batch {score.batch}: the {metric} of {score.op_name or 'all ops'} is {value};"
                    " keep that op in FP32 with sensitivity.op_name_dict and run again"
                )


def of_the_run(model: ModelManifest, calibration: CalibrationManifest, not_exercised: int) -> list[str]:
    """Warnings about the model and the samples."""
    found = []
    if model.stand_in:
        found.append(f"This is a stand-in for a published model: {model.stand_in}.")
    if model.rounded:
        found.append(
            f"The weights were rounded once before this run: {model.rounded}. Every error here is measured against"
            " these rounded weights, and not against the published ones."
        )
    if calibration.text_only and calibration.image_backend:
        found.append("The vision tower was not exercised: no calibration sample has an image.")
    answers = calibration.answers["heldout"]
    if answers.located < answers.given:
        found.append(
            f"Answers were located in {answers.located} of {answers.given} held-out samples; accuracy is measured"
            " on these alone. The chat template changes the other answers, or their tokens also hold other text."
        )
    if not_exercised:
        ops = sentences.counted(not_exercised, "op")
        found.append(
            f"{ops} never ran on the scored batches, so nothing is known of {'it' if not_exercised == 1 else 'them'}."
        )
    return found


def of_checkpoints(plan: Plan) -> list[str]:
    """The warnings of schemes that come from a checkpoint."""
    return [f"{name}: {warning}." for name, fields in plan.schemes.items() for warning in fields.get("warnings", ())]


def of_fallback(all_ops: Mapping[str, Any], scores: Scores) -> list[str]:
    """A warning where the fallback map is mostly noise: the scheme breaks the output, or batches disagree."""
    seen, taus = all_ops["sqnr_db"], rank_taus(by_batch(scores)[1])
    found = []
    if seen is not None and seen < FALLBACK_FLOOR_DB:
        below = "an SQNR of {} dB, below {} dB".format(*sentences.apart(seen, FALLBACK_FLOOR_DB))
        found.append(
            f"With every op quantized the output has {below}. The fallback map is mostly noise there: use the isolated"
            " map."
        )
    elif taus and statistics.fmean(taus) < FALLBACK_FLOOR_TAU:
        found.append(
            "The fallback map is mostly noise: batches agree on its order with a Kendall's tau of"
            f" {statistics.fmean(taus):.2f}, where 0 is chance. Use the isolated map."
        )
    return found


def of_heldout(schemes: Mapping[str, Any], frontier: Frontier | NotMeasured, output: Output) -> list[str]:
    """A warning for each scheme that is far worse on held-out samples than on the scored ones."""
    found = []
    for point in frontier.controls if isinstance(frontier, Frontier) else ():
        seen = schemes[point.name]["all"]["divergence"] if point.name in schemes else None
        if point.kind == "uniform" and seen and point.divergence > HELDOUT_GAP * seen:
            found.append(
                f"{point.name} has a {output.divergence} of {sentences.number(seen, output.unit)} on the scored samples"
                f" and {sentences.number(point.divergence)} on held-out ones. Raise calibration.num_samples."
            )
    return found


def render(report: dict[str, Any]) -> tuple[str, str]:
    """The report as Markdown and as canonical JSON, after a check against its schema.

    Args:
        report: as `build_report` returns it.

    Raises:
        jsonschema.ValidationError: the report does not match its published schema.
    """
    if error := mismatch(report):
        raise error
    markdown, document = (
        environment.get_template(f"op_sensitivity.{kind}.j2").render(
            report=report, sentences=sentences, coverage=coverage, explanations=explanations
        )
        for kind, environment in environments().items()
    )
    return markdown, document


def mismatch(report: dict[str, Any]) -> ValidationError | None:
    """The most telling place where a report does not match its published schema."""
    found: ValidationError | None = best_match(checker().iter_errors(report))
    return found


@cache
def checker() -> Validator:
    """A validator of the published schema, which is checked itself."""
    schema = read_json(SCHEMA)
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@cache
def environments() -> dict[str, Environment]:
    """The environments of both templates: each template is compiled once."""
    # Every text that the Markdown shows is escaped unless it is Markup already; JSON holds the raw data.
    made = {
        "md": Environment(
            loader=FileSystemLoader(TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=True,
            finalize=lambda value: escape.prose(value) if type(value) is str else value,
        ),
        "json": Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined),  # noqa: S701  no HTML
    }
    made["md"].filters |= {"cell": markdown_cell, "code": escape.code}
    made["md"].filters["decibels"] = lambda value: "no error" if value is None else sentences.number(value)
    made["json"].filters["canonical_json"] = canonical_json
    return made


def markdown_cell(value: Any) -> str:
    """A value as the text of a Markdown table's cell: 4 significant digits, markup escaped, null as a dash."""
    if value is None:
        return "–"
    return sentences.number(value) if isinstance(value, float) else escape.prose(str(value))


def tables(report: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The report's `ranking`, `frontier` and `profiles` as flat tables. A table has no rows if nothing was measured.

    The ranking has the most sensitive op first. Texts are as `escape.spreadsheet_cell` returns them. Without an image
    there are no columns of image and text error, and without estimates no columns of these.
    """
    frontier = report["frontier"]
    measured = frontier["status"] == "measured"
    points = [*frontier["points"], *frontier["controls"]] if measured else []
    profiles = report["profiles"]["profiles"]

    def row(point: Mapping[str, Any]) -> dict[str, Any]:
        counts = {scheme: point["schemes"].count(scheme) for scheme in (*frontier["candidates"], UNQUANTIZED)}
        return {**point, "schemes": " ".join(f"{scheme}:{count}" for scheme, count in counts.items() if count)}

    found = {
        "ranking": pd.DataFrame(report["maps"]["isolated"]["ops"] if "isolated" in report["maps"] else []),
        "frontier": pd.DataFrame(row(point) for point in points),
        "profiles": pd.DataFrame(
            {"profile": name, **row(profile["point"]), "kept": " ".join(profile["kept"])}
            for name, profile in profiles.items()
        ),
    }
    absent = [] if sentences.has_images(report) else [*sentences.BY_MODALITY]
    if not sentences.has_times(report):
        absent.append("seconds")
    if not sentences.has_router(report):
        absent.append("router_agreement")
    if not report["measurement"]["effort"]["probes"]:
        absent += sentences.OF_ESTIMATES
    found = {name: table.drop(columns=absent, errors="ignore") for name, table in found.items()}
    return {
        name: table.map(lambda value: escape.spreadsheet_cell(value) if isinstance(value, str) else value)
        for name, table in found.items()
    }


def top_table(report: dict[str, Any]) -> str:
    """The ten most sensitive ops as a text table for the terminal."""
    if not report["most_sensitive"]:
        ran = "no op ran on the scored batches" if "isolated" in report["maps"] else "the isolated map was not measured"
        return f"{ran}: no ranking"
    rows = pd.DataFrame(report["most_sensitive"])
    columns = ["rank", "op_name", "op_type", "mse_value", "sqnr_db"]
    if not rows["measured"].all():  # the KL divergence ranks, and an estimate has no other metric
        columns = ["rank", "op_name", "op_type", "divergence", "standard_error", "measured"]
    return rows[columns].to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="–")
