"""A table of runs: each row becomes a checked config, and each fault names its line."""

from pathlib import Path

import pytest

from auto_quantize_model.config_text import read_config
from auto_quantize_model.files import InputError
from auto_quantize_model.runs import read_runs

ROOT = Path(__file__).parents[1]
HEAD = "model\tconfig\tcalibration\n"


def table(folder: Path, text: str) -> Path:
    path = folder / "models.tsv"
    path.write_text(text)
    return path


def test_a_row_is_the_defaults_its_files_and_what_holds_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.yaml").write_text("calibration: {name: short, num_samples: 20}\n")
    (tmp_path / "all.yaml").write_text("decide: {points: 5}\n")
    text = f"# a remark\n{HEAD}\na-1\tconfig/smollm2_135m.yaml\nb\tconfig/smollm2_135m.yaml\tshort.yaml\na_1\t\n"
    runs = read_runs(table(tmp_path, text), ROOT, [tmp_path / "all.yaml"], {"calibration": {"seed": 3}})
    assert list(runs) == ["a_1", "b", "a_1_6"]
    assert [run.model.name for run in runs.values()] == ["a-1", "b", "a_1"]
    assert [run.model.source for run in runs.values()] == ["smollm2", "smollm2", "digits"]
    assert [run.calibration.name for run in runs.values()] == ["moby_dick", "short", "digits"]
    assert runs["b"].calibration.num_samples == 20 != runs["a_1"].calibration.num_samples
    assert {(run.decide.points, run.calibration.seed) for run in runs.values()} == {(5, 3)}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_checked_config_is_the_same_when_a_module_reads_it_again(path: Path) -> None:
    default = ROOT / "config/config.yaml"
    below = [path.with_name("qwen2_5_vl_3b.yaml")] if path.stem in ("standin", "qwen2_5_vl_7b") else []
    config = read_config([default, *below, path], {})
    assert read_config([default], config.model_dump(mode="json")) == config


def test_the_shipped_table_is_valid() -> None:
    assert list(read_runs(ROOT / "config/models.tsv", ROOT, [], {})) == ["digits_vlm", "smollm2_135m"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the first line is not model config calibration, with tabs between; correct it"),
        ("model config\n", "the first line is not model config calibration, with tabs between; correct it"),
        (HEAD, "no row; add one for each run"),
        (
            f"{HEAD}\tconfig/config.yaml\n",
            "line 2: not a name, configs and a calibration with tabs between; correct it",
        ),
        (f"{HEAD}a\tb\tc\td\n", "line 2: not a name, configs and a calibration with tabs between; correct it"),
        (f"{HEAD}a\t\nb\t\na\t\n", "line 4: a names the results of line 2; write another name for this run"),
        (f"{HEAD}a/b\t\n", "line 2: config: model.name: 'a/b' is not a name; "),
        (f"{HEAD}a\tgone.yaml\n", "line 2: gone.yaml: No such file or directory; "),
    ],
)
def test_a_fault_of_a_table_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"models.tsv: {said}"):
        read_runs(table(tmp_path, text), ROOT, [], {})
    with pytest.raises(InputError, match=r"gone.tsv: cannot be read"):
        read_runs(tmp_path / "gone.tsv", ROOT, [], {})
