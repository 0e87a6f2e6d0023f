"""What scripts show: chatter in the log, words on the terminal, errors in one line with their exit code."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from auto_quantize_model import cli

PREAMBLE = """
import ctypes, logging, os, sys
from pathlib import Path
from auto_quantize_model import cli
from auto_quantize_model.files import InputError
log = Path(sys.argv[1]) if len(sys.argv) > 1 else None
"""


def run_script(body: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `body`, which defines work(), as a script of its own: redirection is about a whole process."""
    code = f"{PREAMBLE}\n{body}\nraise SystemExit(cli.run(work, log))"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


CHATTER = """
logging.basicConfig(level=logging.INFO)
def work():
    print("python out")
    print("python err", file=sys.stderr)
    logging.info("logged before the redirection was set up")
    ctypes.CDLL(None).puts(b"c library")
    os.system("echo child process")
    cli.say("three ops")
"""


def test_chatter_goes_to_the_log_and_words_to_the_terminal(tmp_path: Path) -> None:
    ended = run_script(CHATTER, tmp_path / "logs" / "work.log")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "three ops\n", "")
    log = (tmp_path / "logs" / "work.log").read_text()
    for line in ("python out", "python err", "logged before", "c library", "child process"):
        assert line in log


def test_without_a_log_nothing_is_redirected() -> None:
    ended = run_script(CHATTER)
    assert ended.returncode == 0
    assert {"python out", "c library", "child process", "three ops"} <= set(ended.stdout.splitlines())
    assert "python err" in ended.stderr


@pytest.mark.parametrize("with_log", [True, False])
def test_a_users_error_is_one_line_and_exit_code_2(tmp_path: Path, with_log: bool) -> None:
    body = 'def work(): raise InputError("x.json: no such file;\\n  make it")'
    log = tmp_path / "work.log"
    ended = run_script(body, *([log] if with_log else []))
    line = "error: x.json: no such file; make it\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
    assert not with_log or log.read_text() == line


def test_any_other_error_is_one_line_that_names_the_log_with_the_traceback(tmp_path: Path) -> None:
    log = tmp_path / "work.log"
    ended = run_script("def work(): raise KeyError('weight')", log)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "KeyError" in ended.stderr and str(log) in ended.stderr
    assert "Traceback (most recent call last)" in log.read_text()


def test_any_other_error_without_a_log_shows_its_traceback() -> None:
    ended = run_script("def work(): raise KeyError('weight')")
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr


def test_progress_is_shown_on_the_terminal_and_not_in_the_log(tmp_path: Path) -> None:
    body = """
def work():
    for _ in cli.progress(range(3), "epochs"): pass
    with cli.progress(range(2), "ops") as bar:
        bar.update(); bar.update()
"""
    log = tmp_path / "work.log"
    ended = run_script(body, log)
    assert ended.returncode == 0
    assert "epochs: 100%" in ended.stderr and "3/3" in ended.stderr
    assert "ops: 100%" in ended.stderr and "2/2" in ended.stderr
    assert log.read_text() == ""


def test_streams_are_back_after_a_failure(tmp_path: Path) -> None:
    body = """
def fail(): raise ValueError("first")
cli.run(fail, log)
def work(): print("in the second log")
cli.run(work, log.with_name("second.log"))
print("on the terminal"); log = None
def work(): pass
"""
    ended = run_script(body, tmp_path / "first.log")
    assert ended.stdout == "on the terminal\n"
    assert (tmp_path / "second.log").read_text() == "in the second log\n"


@pytest.mark.parametrize("text", ["{", "{'a': 1}", '{"a": NaN}', '{"a": -Infinity}', "", "[" * 100_000])
def test_json_of_the_command_line_that_is_none_is_one_line(text, capsys):
    parser = argparse.ArgumentParser(usage="usage")
    parser.add_argument("--spec", type=cli.json_value)
    assert parser.parse_args(["--spec", '{"a": [1, null]}']).spec == {"a": [1, None]}
    with pytest.raises(SystemExit):
        parser.parse_args(["--spec", text])
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert "error: argument --spec: not valid JSON (" in line and line.endswith('write {"key": value}')


SECRET = "http://user:pass-word@127.0.0.1:9"


@pytest.mark.parametrize("kind", ["InputError", "RuntimeError"])
@pytest.mark.parametrize("with_log", [True, False])
def test_no_password_and_no_token_is_printed_or_logged(
    tmp_path: Path, with_log: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", SECRET)
    monkeypatch.setenv("HF_TOKEN", "opaque-token")
    body = f"""
logging.basicConfig(level=logging.INFO)
def work():
    logging.info("GET {SECRET}/api with opaque-token")
    print("chatter of {SECRET}", file=sys.stderr)
    cli.say("from {SECRET}")
    raise {kind}("{SECRET}/api cannot be reached, headers {{'authorization': 'Bearer opaque-token'}}")
"""
    log = tmp_path / "work.log"
    ended = run_script(body, *([log] if with_log else []))
    everything = ended.stdout + ended.stderr + (log.read_text() if with_log else "")
    assert "http://***@127.0.0.1:9/api cannot be reached" in ended.stderr
    assert ended.stdout == "from http://***@127.0.0.1:9\n"
    assert "INFO:root:GET http://***@127.0.0.1:9/api with ***" in everything
    assert "pass-word" not in everything and "opaque-token" not in everything


def test_control_characters_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    body = r"""
name = "a\x1b[31m\x9b2J\u202eb\udcff\r"
def work():
    cli.say(f"sample {name}\nnext line")
    raise KeyError(f"{name}\nforged: line")
"""
    ended = run_script(body)
    shown = r"a\x1b[31m\x9b2J\u202eb\udcff"
    assert ended.stdout == f"sample {shown}\\r\nnext line\n"
    assert not set(ended.stderr) & set("\x1b\x9b\u202e\r")
    assert ended.stderr.splitlines()[-1].startswith("error: KeyError: ")
    body = "def work(): raise InputError(f'{chr(27)}[2Jgone\\nerror: forged')"
    assert run_script(body).stderr == "error: \\x1b[2Jgone error: forged\n"


def test_a_bar_of_the_hubs_shows_names_of_files_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.TerminalBar(total=1, desc="\x1b[31mmodel\n.safetensors"):
        pass
    assert capsys.readouterr().err.startswith("\r\\x1b[31mmodel .safetensors:   0%|          | 0/1")
