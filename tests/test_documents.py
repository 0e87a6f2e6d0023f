"""A document that was changed, mixed up or damaged is refused by every script that reads it, by name, in one line."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import damages
import pytest

from auto_quantize_model import cli
from auto_quantize_model.commands import auto_quantize
from auto_quantize_model.commands.run import Run, read_parts
from auto_quantize_model.documents import (
    CONFIG,
    HEAD,
    RULES,
    VERSION,
    Document,
    read_document,
    read_documents,
    require_listed,
    why_stale,
    write_document,
)
from auto_quantize_model.files import InputError, digest_of
from auto_quantize_model.records import Arithmetic, HeldOutPart, Part, body_of

# Where each kind lies, and the kinds that its step reads.
# Parts of a step's work are read by steps that join them; a test of their own is below.
OF_PARTS = ("probes", "scores", "audit_part", "heldout")
NAMES = {kind: f"{kind}.json" for kind in RULES if kind not in OF_PARTS} | {"exports": "exports/index.json"}
READS: dict[str, tuple[str, ...]] = {
    "model_manifest": (),
    "calibration_manifest": ("model_manifest",),
    "plan": ("model_manifest", "calibration_manifest"),
    "scales": ("model_manifest", "calibration_manifest", "plan"),
    "capture": ("model_manifest", "calibration_manifest", "plan", "scales"),
    "audit": ("model_manifest", "calibration_manifest", "plan", "scales", "capture"),
    "frontier": ("model_manifest", "calibration_manifest", "plan", "scales", "capture"),
    "profiles": ("plan", "frontier"),
    "why": ("model_manifest", "calibration_manifest", "plan", "scales", "frontier", "profiles"),
    "exports": ("model_manifest", "calibration_manifest", "plan", "profiles", "why"),
    "report": ("model_manifest", "calibration_manifest", "plan", "capture", "audit", "frontier", "profiles", "why"),
    "quantized": ("model_manifest", "calibration_manifest", "plan", "scales", "frontier", "profiles", "exports"),
}
# Each script with the kinds that its options name; its other arguments stand in OTHERS.
OPTIONS = {
    "model_manifest": "--manifest",
    "calibration_manifest": "--calibration-manifest",
    "exports": "--exports",
    "report": "--report",
} | {kind: f"--{kind}" for kind in ("plan", "scales", "capture", "audit", "frontier", "profiles", "why")}
SCRIPTS = {
    "extract_calibration": READS["calibration_manifest"],
    "plan_quantization": READS["plan"],
    "calibrate_scales": READS["scales"],
    "capture_sensitivity": READS["capture"],
    "audit_capture": READS["audit"],
    "measure_frontier": READS["frontier"],
    "build_profiles": READS["profiles"],
    "explain_units": READS["why"],
    "export_profiles": READS["exports"],
    "render_report": READS["report"],
    "draw_figures": ("report",),
    "render_page": ("report", "exports"),
    "publish_summary": ("report",),
    "quantize_model": READS["quantized"],
    "archive_results": tuple(kind for kind in NAMES if kind != "quantized"),
}
SETS = ["--calibration-set", "a.parquet"]
OTHERS = {
    "extract_calibration": ["--spec", "{}", *SETS, "--heldout-set", "b.parquet", "--calibration-manifest", "made.json"],
    "plan_quantization": ["--spec", "{}", *SETS, "--plan", "made.json"],
    "calibrate_scales": [*SETS, "--scales", "made.json", "--tensors", "made.safetensors"],
    "capture_sensitivity": [*SETS, "--capture", "made.json", "--run-record", "made.json"],
    "audit_capture": [*SETS, "--audit", "made.json"],
    "measure_frontier": [*SETS, "--heldout-set", "b.parquet", "--spec", "{}", "--target", "{}", "--candidates", "W8A8"]
    + ["--frontier", "made.json"],
    "build_profiles": ["--target", "{}", "--profiles", "made.json"],
    "explain_units": [*SETS, "--heldout-set", "b.parquet", "--why", "made.json"],
    "export_profiles": ["--directory", "made"],
    "render_report": ["--markdown", "made.md", "--json", "made.json"]
    + [f"--{table}-table={table}.csv" for table in ("ranking", "frontier", "profiles")],
    "draw_figures": ["--directory", "made"],
    "render_page": ["--markdown", "report.md", "--html", "made.html"],
    "publish_summary": ["--markdown", "report.md", "--into-markdown", "made.md", "--into-json", "made.json"],
    "quantize_model": [*SETS, "--heldout-set", "b.parquet", "--profile", "smallest", "--directory", "made"]
    + ["--record", "made.json"],
    "archive_results": ["--archive", "made.tar", "--checksums", "made.json"],
}
CASES = [(script, kind) for script, kinds in SCRIPTS.items() for kind in kinds]


def write_run(folder: Path) -> dict[str, Document]:
    """One document of each kind, of one run, in `folder`, with the files of exports and report."""
    made: dict[str, Document] = {}
    (folder / "exports").mkdir(parents=True)
    (folder / "exports" / "kept.json").write_text("{}\n")
    (folder / "report.md").write_text("# Report\n")
    files = {"exports": [folder / "exports" / "kept.json"], "report": [folder / "report.md"]}
    files["calibration_manifest"] = [folder / "a.parquet", folder / "b.parquet"]
    for path in files["calibration_manifest"]:
        path.write_bytes(b"PAR1 samples PAR1")
    for kind, reads in READS.items():
        sources = [made[source] for source in reads]
        body = {"ops": [{"op_name": "lm_head"}], "value": 0.5, "path": "nowhere"}
        made[kind] = write_document(folder / NAMES[kind], kind, body, sources, "0" * 64, files.get(kind, ()))
    return made


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "run"
    write_run(folder)
    return folder


@pytest.fixture
def run(run_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(run_once, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def arguments(name: str) -> list[str]:
    """The command line of a script on the run in the current folder."""
    kinds = SCRIPTS[name]
    if name == "archive_results":
        documents = [NAMES[kind] for kind in kinds]
        pairs = [f"{kind}={NAMES[kind]}" for kind in kinds]
        return [*OTHERS[name], "--documents", *pairs, "--", *documents, "report.md", "exports/kept.json"]
    options = OPTIONS | ({"report": "--json"} if name == "publish_summary" else {})
    return [*OTHERS[name], *(word for kind in kinds for word in (options[kind], NAMES[kind]))]


def error_of(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What a script prints as its error; it must be an error that the user can correct, on one line."""
    monkeypatch.setattr(cli, "end_with_parent", lambda: None)  # here the parent is the test runner's
    assert auto_quantize.command(name).main(arguments(name)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and not list(Path().glob("made*"))
    return lines[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_script_refuses_every_damage_of_every_document_by_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, kind: str
) -> None:
    path = run / NAMES[kind]
    whole = path.read_bytes()
    for damage, apply in damages.DAMAGES.items():
        apply(path)
        error = error_of(name, monkeypatch, capsys)
        assert error.startswith(f"error: {NAMES[kind]}: "), f"{damage}: {error}"
        assert f"(snakemake --cores 1 --forcerun {RULES[kind]})" in error, f"{damage}: {error}"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [name for name, words in OTHERS.items() if "a.parquet" in words][1:])
def test_every_script_refuses_a_changed_set_before_it_loads_a_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str
) -> None:
    for stored in ("a.parquet", "b.parquet"):
        if stored in OTHERS[name]:
            (run / stored).write_bytes(b"PAR1 sampler PAR1")
            error = error_of(name, monkeypatch, capsys)
            assert error.startswith(f"error: {stored}: changed since it was written, as calibration_manifest.json says")
            (run / stored).write_bytes(b"PAR1 samples PAR1")


def closure(kind: str) -> set[str]:
    """The kinds that a kind is made from, also by way of others."""
    return {found for source in READS[kind] for found in {source, *closure(source)}}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in CASES if any(kind in closure(other) for other in SCRIPTS[name])]
)
def test_every_script_refuses_a_document_of_another_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, kind: str
) -> None:
    """It is whole, so two files are named: which of them is the right one, nobody can say."""
    damages.of_another_run(run / NAMES[kind])
    others = [other for other in SCRIPTS[name] if kind in closure(other)]
    error = error_of(name, monkeypatch, capsys)
    assert NAMES[kind] in error and any(NAMES[other] in error for other in others), error
    assert any(f"(snakemake --cores 1 --forcerun {RULES[other]})" in error for other in others), error


def test_two_documents_of_different_origin_are_refused_though_the_origin_is_not_read(run: Path, tmp_path: Path) -> None:
    """Exports read profiles and plan, and not the frontier by which the profiles are of another plan."""
    other = write_run(tmp_path / "other")
    changed = write_document(other["plan"].path, "plan", {"ops": []}, [])
    frontier = write_document(other["frontier"].path, "frontier", {}, [changed])
    profiles = write_document(Path("profiles.json"), "profiles", {}, [frontier])
    assert profiles.made_from == {"plan": changed.digest, "frontier": frontier.digest}
    with pytest.raises(
        InputError, match="profiles.json: made from another plan than plan.json; make it again .*build_"
    ):
        read_documents({"plan": Path("plan.json"), "profiles": Path("profiles.json")})
    with pytest.raises(InputError, match="profiles.json and capture.json: made from different versions of the plan; "):
        read_documents({"capture": Path("capture.json"), "profiles": Path("profiles.json")})


@pytest.mark.parametrize(("name", "file"), [("publish_summary", "report.md"), ("render_page", "report.md")])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("# Another\n")])
def test_a_text_that_is_not_the_reports_is_not_published(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, file: str, change: Any
) -> None:
    change(run / file)
    error = error_of(name, monkeypatch, capsys)
    assert error.startswith(f"error: {file}: ") and "--forcerun render_report)" in error


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("[]\n")])
@pytest.mark.parametrize("name", ["render_page", "archive_results"])
def test_an_export_that_was_changed_is_neither_shown_nor_packed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, change: Any
) -> None:
    change(run / "exports" / "kept.json")
    error = error_of(name, monkeypatch, capsys)
    assert error.startswith("error: exports/kept.json: ") and "--forcerun export_profiles)" in error


def test_a_whole_run_is_packed_and_published(run: Path) -> None:
    for name in ("publish_summary", "archive_results"):
        assert auto_quantize.command(name).main(arguments(name)) == 0
    assert Path("made.md").read_bytes() == Path("report.md").read_bytes()
    assert Path("made.tar").stat().st_size


def test_a_document_comes_back_as_it_was_written_and_says_what_it_was_made_from(tmp_path: Path) -> None:
    model = write_document(tmp_path / "a.json", "model_manifest", {"digest": "weights"}, config="1" * 64)
    body = {"unicode": "é\u2028", "tuple": (1, 2.5), "deep": {2: None, 10: True}, "small": 5e-324}
    plan = write_document(tmp_path / "sub" / "b.json", "plan", body, [model], config="2" * 64, files=[model.path])
    found = read_document(plan.path, "plan")
    assert found == {"unicode": "é\u2028", "tuple": [1, 2.5], "deep": {"2": None, "10": True}, "small": 5e-324}
    assert (found.kind, found.path, found.digest) == ("plan", plan.path, plan.digest)
    assert found.made_from == {"model_manifest": model.digest, CONFIG: "2" * 64}
    assert list(found.files) == ["../a.json"]
    assert list(json.loads(plan.path.read_text())) == [HEAD, *found]
    require_listed(found, model.path)
    with pytest.raises(InputError, match=f"{plan.path}: no file of {plan.path}"):
        require_listed(found, plan.path)


@pytest.mark.parametrize(("version", "named"), [(None, 0), (VERSION + 1, VERSION + 1)])
def test_a_document_of_another_version_is_refused_and_stale(tmp_path: Path, version: int | None, named: int) -> None:
    """Its digest is right; without the version a reader would miss a key in the middle of its work."""
    body = {"value": 1}
    head = {"kind": "plan", "made_from": {}, "files": {}} | ({} if version is None else {"version": version})
    digest = digest_of({**body, HEAD: head})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({HEAD: {**head, "digest": digest}, **body}))
    message = (
        f"plan.json: written by another version of this code \\(format {named}, and this one reads {VERSION}\\);"
        " make it again"
    )
    with pytest.raises(InputError, match=message):
        read_document(path, "plan")
    assert why_stale(path, None) == f"{path} was written by another version of this code"


def test_layout_and_order_of_keys_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    written = write_document(path, "plan", {"b": 1, "a": {"d": 2, "c": 3}})
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=7))
    assert read_document(path, "plan").digest == written.digest


def test_a_document_is_stale_where_another_config_made_it_or_its_files_are_gone(run: Path) -> None:
    export = Path("exports/kept.json")
    assert why_stale(Path("plan.json"), "0" * 64) == ""
    assert why_stale(Path("plan.json"), "1" * 64) == "plan.json was made by another config"
    assert why_stale(Path("exports/index.json"), "0" * 64) == ""
    export.unlink()
    assert why_stale(Path("exports/index.json"), "0" * 64) == "exports/kept.json is gone"
    Path("exports/index.json").unlink()
    assert why_stale(Path("exports/index.json"), "0" * 64) == "exports/index.json is gone"
    Path("plan.json").write_text("{}")
    assert why_stale(Path("plan.json"), "1" * 64) == ""
    assert why_stale(Path("calibration.parquet"), "1" * 64) == ""


def test_a_part_that_is_damaged_or_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    plan = write_document(tmp_path / "plan.json", "plan", {"ops": 1})
    run = Run(argparse.Namespace(), (plan,))
    here = HeldOutPart(number=1, parts=1, arithmetic=Arithmetic("cpu", 1, "AVX2", "exact"), records=())
    part = tmp_path / "heldout_1.json"
    write_document(part, "heldout", body_of(here), [plan])
    assert read_parts(run, [part], "heldout", HeldOutPart) == [here]
    with pytest.raises(InputError, match=r"heldout_1.json: a heldout, where the scores is asked for; .*measure_scores"):
        read_parts(run, [part], "scores", Part)
    write_document(part, "heldout", body_of(here), [write_document(tmp_path / "other.json", "plan", {"ops": 2})])
    with pytest.raises(InputError, match=r"heldout_1.json: made from another plan than .*forcerun measure_heldout"):
        read_parts(run, [part], "heldout", HeldOutPart)
