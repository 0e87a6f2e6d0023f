"""The commands: each starts at once, takes options that are defined once, and is the script of its name."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from auto_quantize_model import options
from auto_quantize_model.commands import auto_quantize

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "src" / "auto_quantize_model" / "commands"
HEAVY = {"torch", "transformers", "neural_compressor", "datasets", "pandas", "scipy", "altair", "huggingface_hub"}
# These read JSON and write text: no step of them needs torch.
LIGHT = ("archive_results", "build_profiles", "draw_figures", "publish_summary", "render_page", "render_report")


def loaded(code: str) -> set[str]:
    """The top-level modules that a process of its own has loaded after `code`."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ended.stdout.split("\n")[-2].split())


def test_the_options_of_every_command_are_told_without_a_heavy_library() -> None:
    code = "from auto_quantize_model.commands import auto_quantize\n"
    code += "auto_quantize.parser().format_help()\n"
    code += "for name in auto_quantize.COMMANDS: auto_quantize.command(name).parser().format_help()"
    assert not loaded(code) & HEAVY


def test_the_steps_after_the_measurements_need_no_torch() -> None:
    imports = []
    for name in LIGHT:
        for line in inspect.getsource(auto_quantize.command(name)).splitlines():
            if line.startswith("    from auto_quantize_model"):
                imports.append(line.strip())
    assert not loaded("\n".join(imports)) & {"torch", "transformers", "neural_compressor"}


def test_every_command_is_listed_and_is_the_script_of_its_name() -> None:
    scripts = {path.stem: path for path in (ROOT / "scripts").rglob("*.py")}
    assert set(scripts) == set(auto_quantize.COMMANDS)
    assert {path.stem for path in FOLDER.glob("*.py")} == {*scripts, "__init__", "auto_quantize", "run", "loaded"}
    for name, path in scripts.items():
        called = 'if __name__ == "__main__":\n    raise SystemExit(main())\n'
        assert path.read_text() == f"from auto_quantize_model.commands.{name} import main\n\n{called}"


@pytest.mark.parametrize("name", auto_quantize.COMMANDS)
def test_no_command_defines_an_option_of_the_shared_table_again(name: str) -> None:
    source = inspect.getsource(auto_quantize.command(name))
    for option in (*options.FILES, *options.SETTINGS):
        assert f'"--{option.replace("_", "-")}"' not in source


def test_the_console_command_hands_its_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["auto-quantize"])
    with pytest.raises(SystemExit) as ended:
        auto_quantize.main(["draw-figures", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: auto-quantize draw-figures [-h] --report FILE")
    assert auto_quantize.main(["draw-figures", "--report", "gone.json", "--directory", "figures"]) == 2
    assert capsys.readouterr().err.startswith("error: gone.json: no such file, where the report is asked for; ")
