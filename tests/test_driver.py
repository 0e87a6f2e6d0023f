"""The driver runs without Snakemake on any snapshot and calibration set, and a bad one ends it early."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from auto_quantize_model.commands import inc_qwen2_5_vl_3b_sensitivity as driver
from auto_quantize_model.data.digits import digit_samples
from auto_quantize_model.files import InputError

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "scripts" / "qwen" / "inc_qwen2_5_vl_3b_sensitivity.py"
PUBLISHED = "context/summaries/inc-kb/qwen2_5_vl_3b_mse_sensitivity"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for sample in digit_samples([0, 1]):
        sample.images[0].save(tmp_path / f"{sample.id}.png")
    path = tmp_path / "photos.jsonl"
    rows = ({"image": f"digit-000{number}.png", "prompt": "Which?", "answer": str(number)} for number in range(2))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_the_driver_writes_the_report_and_publishes_it(tiny_snapshot, photos, tmp_path):
    common = ["--model", str(tiny_snapshot), "--calibration", str(photos), "--num-samples", "1"]
    keep = ["--maps", "isolated", "--keep-name", r"model\.visual\.blocks.*", r"model\.language_model\.layers.*"]
    command = [sys.executable, str(DRIVER), *common, *keep, "--reduce-range", "true", "--audit-ops", "2", "--publish"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "tmp/qwen2_5_vl_3b_inc/op_sensitivity_mse_v2_cpu.json").read_text())
    assert (report["measurement"]["reduce_range"], report["measurement"]["reduce_range_by"]) == (True, "config")
    assert f"{report['audit']['compared']} values by INC" in ended.stdout
    schema = json.loads((ROOT / "src" / "auto_quantize_model" / "report" / "schema.json").read_text())
    jsonschema.validate(report, schema)
    assert {op["status"] for op in report["ops"]} == {"measured"}
    for suffix in ("md", "json"):
        written = (tmp_path / f"tmp/qwen2_5_vl_3b_inc/op_sensitivity_mse_v2_cpu.{suffix}").read_bytes()
        assert (tmp_path / f"{PUBLISHED}.{suffix}").read_bytes() == written
    assert "The most sensitive ops of qwen2_5_vl_3b" in ended.stdout
    assert "INFO" not in ended.stdout
    assert not (tmp_path / "nc_workspace").exists()


def test_an_output_of_the_driver_is_refused_before_work(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("[]")
    command = ["--model", "nowhere", "--output", "run", "--device", "cpu"]
    with pytest.raises(InputError, match=r"^run/plan\.json is an input of this step; name another file"):
        driver.measure(driver.parser().parse_args([*command, "--calibration", "run/plan.json"]))
    published = tmp_path / f"{PUBLISHED}.md"
    published.mkdir(parents=True)
    with pytest.raises(InputError, match=r"mse_sensitivity\.md: a folder, where a file is to be written; name a file"):
        driver.measure(driver.parser().parse_args([*command, "--calibration", "photos", "--publish"]))


def test_a_bad_calibration_set_ends_the_driver_before_any_output(tiny_snapshot, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digit-0001.png").unlink()
    assert driver.main(["--model", str(tiny_snapshot), "--calibration", str(photos), "--num-samples", "2"]) == 2
    said = capfd.readouterr().err
    assert "line 2: image" in said and "does not exist" in said
    assert not list((tmp_path / "tmp").rglob("*.json"))
