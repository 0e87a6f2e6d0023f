"""How large the page of the 3B shape is, and how fast a browser opens it: 417 ops in five schemes, three maps.

    python benchmarks/page_open.py [--times N] [--page FILE.html]

Names, shapes, units, bytes and exports are those of Qwen2.5-VL-3B, made without its weights. The scores are drawn at
random, so the page says nothing about that model: only its size and its speed are real. Needs Chromium or Chrome.
"""

import argparse
import os
import platform
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, sync_playwright
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from auto_quantize_model import cli
from auto_quantize_model.commands.render_page import texts_of
from auto_quantize_model.config import DecideSpec, Target
from auto_quantize_model.decide.frontier import Decision, options_of
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.documents import read_document
from auto_quantize_model.export.exports import export
from auto_quantize_model.files import InputError, write_json, write_text
from auto_quantize_model.inc.plan import inventoried, with_schemes
from auto_quantize_model.made.shapes import QWEN2_5_VL_3B
from auto_quantize_model.models.coverage import cover
from auto_quantize_model.models.units import units_of
from auto_quantize_model.records import (
    Answers,
    Arithmetic,
    Audit,
    CalibrationManifest,
    Capture,
    Excluded,
    Frontier,
    IncInt8,
    ModelManifest,
    Plan,
    SampleEntry,
    Score,
    ScoredBatch,
    Side,
    digest_of_record,
)
from auto_quantize_model.report.document import build_report
from auto_quantize_model.report.page import render_page
from auto_quantize_model.schemes.compressed import fields_of, scheme_of

FOLDER = Path("tmp/bench/page")
MAPS = ("isolated", "fallback", "requantize")
# How many nats a scheme costs next to INC's INT8, so that the frontier has a choice to make.
COSTS = {"inc_int8": 1.0, "W8A8": 0.5, "FP8_DYNAMIC": 0.7, "W4A16": 8.0, "NVFP4": 15.0}
CANDIDATES = tuple(COSTS)[1:]
ARITHMETIC = Arithmetic("cpu", 1, "AVX2", "saturating")
BATCHES, SAMPLES, TOKENS = 2, 32, 8192
ROWS = {
    "paint": "first contentful paint, ms",
    "load": "load event, ms",
    "load_cpu": "load event, CPU time of all of Chromium's processes, ms",
    "slider": "answer of the slider after a key, just after the load event, ms",
    "blocked": "longest task, ms",
}
# The page notes its longest task, and how long after a key the budget has changed.
WATCH = """
(() => {
  const times = (window.times = { blocked: 0 });
  const longer = (entry) => (times.blocked = Math.max(times.blocked, entry.duration));
  new PerformanceObserver((list) => list.getEntries().forEach(longer)).observe({ type: "longtask", buffered: true });
  addEventListener("keydown", (event) => {
    new MutationObserver(() => (times.slider ??= performance.now() - event.timeStamp))
      .observe(document.getElementById("budget-facts"), { childList: true });
  }, { once: true, capture: true });
})();
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7, help="how often the page is opened (7)")
    parser.add_argument("--page", type=Path, help="a page to open in place of the made one")
    args = parser.parse_args()
    return cli.run(lambda: bench(args), None)


def bench(args: argparse.Namespace) -> None:
    page = args.page or FOLDER / "page.html"
    if not args.page:
        report, links = made()
        write_json(FOLDER / "report.json", report)
        write_json(FOLDER / "links.json", links)
        write_text(page, render_page(report, links))
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise InputError("no Chromium or Chrome on PATH; install one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        runs = [opened(browser, page) for _ in range(args.times)]
        version = browser.version
        browser.close()
    size = page.stat().st_size
    cores = len(os.sched_getaffinity(0))
    cli.say(f"\n{processor()}, {cores} core{'s' if cores > 1 else ''}; Chromium {version}")
    cli.say(f"Load of the machine in the last minute: {os.getloadavg()[0]:.1f}\n")
    cli.say(f"{page}: {size / 1e6:.2f} MB\n")
    cli.say("| | median | lowest | highest |\n|---|---:|---:|---:|")
    for key, name in ROWS.items():
        values = [run[key] for run in runs if run[key] is not None]
        cli.say(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    write_json(FOLDER / "page_open.json", {"bytes": size, "runs": runs})


def processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def opened(browser: Browser, path: Path) -> dict[str, float | None]:
    """Open the page once, press a key on its slider, and draw all pictures: times in ms."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.add_init_script(WATCH)
    before = cpu_time(browser)
    page.goto(path.absolute().as_uri(), wait_until="load", timeout=120_000)
    spent = cpu_time(browser) - before
    page.locator("#bits").press("ArrowRight", timeout=120_000)
    page.wait_for_function("window.times.slider", timeout=120_000)
    for chart in page.locator(".chart").all():  # a picture is drawn when it comes near the view
        chart.scroll_into_view_if_needed()
        chart.locator("svg").first.wait_for(timeout=120_000)
    found: dict[str, float | None] = page.evaluate(
        "() => ({ paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null,"
        " load: performance.getEntriesByType('navigation')[0].loadEventEnd, ...window.times })"
    )
    page.close()
    return found | {"load_cpu": spent}


def cpu_time(browser: Browser) -> float:
    """The CPU time that the browser's processes have taken, in ms. Other processes on the core do not count."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return float(1000 * sum(process["cpuTime"] for process in processes))


def made() -> tuple[dict[str, Any], dict[str, Any]]:
    """A report of the 3B shape with random scores, and the links of its exports."""
    draw = random.Random(0)  # noqa: S311
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(QWEN2_5_VL_3B)))
    plan = planned(model)
    capture = captured(plan, draw)
    spec, target = DecideSpec(heldout_batches=SAMPLES), Target(max_divergence=0.02, max_bits=8)
    by, units = options_of(plan, capture, CANDIDATES, spec)
    other = 2 * (plan.coverage["weights_total"] - sum(unit.weights for unit in units))
    decision = Decision(units, other, Drawn(units, draw))  # type: ignore[arg-type]  of `HeldOut` it needs `measure`
    points = decision.measured([*decision.frontier(spec, target), *decision.controls(CANDIDATES, spec)])
    frontier = Frontier(
        **vars(ARITHMETIC),
        candidates=CANDIDATES,
        loss=by,
        units=tuple(units),
        other_bytes=other,
        calibration_batches=SAMPLES,
        batches=SAMPLES,
        samples=SAMPLES,
        tokens=TOKENS,
        answers=SAMPLES,
        points=tuple(point for point in points if point.kind == "frontier"),
        controls=tuple(point for point in points if point.kind != "frontier"),
    )
    profiles = build_profiles(frontier, plan, target)
    note = "its scores are drawn at random; only the size and the speed of this page are real"
    manifest = ModelManifest(
        model="qwen2_5_vl_3b",
        source="local",
        path="models/qwen2_5_vl_3b",
        architecture="Qwen2_5_VL",
        stand_in=note,
        rounded=None,
        files=(),
        digest="0" * 64,
        details={},
    )
    audit = Audit("bit_identical", "inc", 0, plan.op_names[:2], ("isolated",), 2, {}, dict.fromkeys(CANDIDATES, 2))
    report = build_report(manifest, calibration(), plan, capture, audit, frontier, profiles)
    modules = {name: type(module) for name, module in model.named_modules()}
    exports = FOLDER / "exports"
    export(exports, profiles, plan, modules, [f"{name}.weight" for name in plan.op_names], SAMPLES)
    index = read_document(exports / "index.json", "exports")
    return report, {"files": {}, "exports": index["profiles"], "texts": texts_of(index)}


def planned(model: torch.nn.Module) -> Plan:
    """The ops that INC plans in that model, with the schemes that each can have."""
    kinds = {torch.nn.Linear: "Linear", torch.nn.Conv3d: "Conv3d", torch.nn.Embedding: "Embedding"}
    modules = dict(model.named_modules())
    schemes = {name: scheme_of(name) for name in CANDIDATES}
    side = Side({}, "int8", "sym", "per_channel", "minmax")
    ops = [
        replace(with_schemes(inventoried(name, kinds[type(module)], modules, inc), schemes), executions=(1,) * BATCHES)
        for name, module in modules.items()
        if type(module) in kinds
        for inc in [IncInt8(name, kinds[type(module)], side, side)]
    ]
    reason = "INC 2.6 has no static INT8 configuration for this module type"
    norms = [
        Excluded(name, type(module).__name__, reason)
        for name, module in modules.items()
        if "RMSNorm" in repr(type(module))
    ]
    return Plan(
        engine="replay",
        model="qwen2_5_vl_3b",
        confidence_batches=BATCHES,
        maps=MAPS,
        keep={"op_type_dict": {}, "op_name_dict": {}},
        reduce_range=True,
        reduce_range_by="inc",
        measured_op="lm_head",
        schemes={"inc_int8": {}} | {name: fields_of(scheme) for name, scheme in schemes.items()},
        ops=tuple(ops),
        units=tuple(units_of(ops, modules)),
        excluded=tuple(norms),
        coverage=cover(model, [op.op_name for op in ops], []),
        inc_check={"status": "reproduces_fp32"},
        versions={"torch": torch.__version__},
    )


def captured(plan: Plan, draw: random.Random) -> Capture:
    """A capture with random scores of each op and unit in each scheme and map."""
    positions = {"image_positions": 54.0, "text_positions": 20.0}
    scores = []
    for scheme in plan.schemes:
        maps = MAPS if scheme == "inc_int8" else ("isolated",)
        units = [unit.name for unit in plan.units if len(unit.ops) > 1 and scheme in unit.schemes]
        rows = [(label, op.op_name) for label in maps for op in plan.ops if scheme in op.schemes]
        for label, name in [*rows, *(("units", name) for name in units), ("all", "")]:
            kl = COSTS[scheme] * 10 ** draw.uniform(-6, -3) * (300 if label == "all" else 1)
            for batch in range(BATCHES):
                of_batch = kl * draw.uniform(0.8, 1.25)
                parts = {"image_error": 800 * of_batch, "text_error": 200 * of_batch}
                parts |= {"image_divergence": 54 * of_batch, "text_divergence": 20 * of_batch}
                sums = {"mse_value": 1000 * of_batch, "divergence": of_batch, "top1_agreement": 1 - min(1, of_batch)}
                scores.append(Score(batch, label, scheme, name, **sums, **parts))
    return Capture(
        engine="replay",
        arithmetic=ARITHMETIC,
        tf32=False,
        model=plan.model,
        calibration="set",
        plan_digest=digest_of_record(plan),
        versions=plan.versions,
        batches=tuple(
            ScoredBatch(index, positions | {"all": 1e6, "image": 8e5, "text": 2e5}, (f"photo {index}",), 74, 54)
            for index in range(BATCHES)
        ),
        second_pass=({},) * BATCHES,
        scores=tuple(scores),
        candidates=CANDIDATES,
    )


class Drawn:
    """In place of held-out samples: the sum of the units' losses, and metrics that follow from the sum."""

    def __init__(self, units: Sequence[Any], draw: random.Random) -> None:
        self.loss = {
            (name, scheme): unit.loss[scheme] for unit in units for name in unit.ops[:1] for scheme in unit.loss
        }
        self.draw = draw

    def measure(self, assignments: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        return [self.metrics(assignment) for assignment in assignments]

    def metrics(self, assignment: dict[str, str]) -> dict[str, Any]:
        kl = sum(self.loss.get(choice, 0.0) for choice in assignment.items()) * self.draw.uniform(0.9, 1.1)
        return {
            **{name: kl for name in ("divergence", "image_divergence", "text_divergence", "relative_error")},
            "divergence_low": 0.9 * kl,
            "divergence_high": 1.1 * kl,
            "divergence_by_sample": (kl,) * SAMPLES,
            "top1_agreement": 1 - min(1, kl),
            "perplexity": 10 + kl,
            "accuracy": 0.9 - min(0.9, kl / 10),
            "answers_lost": round(SAMPLES * min(0.9, kl / 10)),
            "sqnr_db": 20.0 if kl else None,
            "sqnr_db_lowest": 19.0 if kl else None,
        }


def calibration() -> CalibrationManifest:
    """The manifest of a set of photographs with answers."""
    sample = SampleEntry("photo", "1" * 64, "3" * 64, tokens=74, image_tokens=54, answer_tokens=1)
    return CalibrationManifest(
        calibration="photos",
        source="local",
        path="photos.jsonl",
        source_digest="4" * 64,
        seed=0,
        samples={"calibration": (sample,) * SAMPLES, "heldout": (sample,) * SAMPLES},
        limits={"min_pixels": 3136, "max_pixels": 50176, "max_tokens": 128},
        batch_size=1,
        heldout_batch_size=1,
        format="chat",
        image_backend="pil",
        text_only=False,
        answers={"calibration": Answers(SAMPLES, SAMPLES), "heldout": Answers(SAMPLES, SAMPLES)},
        digest="2" * 64,
        details={},
    )


if __name__ == "__main__":
    raise SystemExit(main())
