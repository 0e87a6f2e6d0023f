"""What scripts show: library output in the log, results on the terminal, errors in one line with their exit code."""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from auto_quantize_model import cli
from auto_quantize_model.cli import require_outputs
from auto_quantize_model.files import InputError

PREAMBLE = """
import ctypes, logging, os, sys
from pathlib import Path
from auto_quantize_model import cli
from auto_quantize_model.files import InputError
log = Path(sys.argv[1]) if len(sys.argv) > 1 else None
"""


def run_script(body: str, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `body`, which defines work(), as a script of its own: redirection is about a whole process."""
    code = f"{PREAMBLE}\n{body}\nraise SystemExit(cli.run(work, log))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


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


def test_a_job_of_a_quiet_run_shows_its_bar_alone_and_its_words_are_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_QUIET", "1")
    body = """
def work():
    for _ in cli.progress(range(3), "epochs"): pass
    cli.say("three ops")
    raise InputError("x.json: no such file; make it")
"""
    log = tmp_path / "work.log"
    ended = run_script(body, log)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "epochs:   0%" in ended.stderr and "error" not in ended.stderr
    assert log.read_text() == "three ops\nerror: x.json: no such file; make it\n"
    assert run_script(body).stderr.endswith("error: x.json: no such file; make it\n")


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


STOPPABLE = """
import signal, time
from auto_quantize_model.files import atomic_path
def work():
    with atomic_path(Path("out.json")) as temporary:
        temporary.write_text("half")
        os.write(2 if log is None else cli._terminal["err"].fileno(), b"at work\\n")
        while True:
            try: time.sleep(60)
            except Exception: pass
"""


def start(body: str, directory: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """A script that has begun its work, which it says."""
    code = f"{PREAMBLE}\n{body}\nraise SystemExit(cli.run(work, log))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=directory,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509  no threads
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "at work\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("arguments", [[], ["logs/work.log"]])
def test_a_signal_ends_a_script_in_one_line_and_leaves_no_half_output(
    tmp_path: Path, name: str, arguments: list[str]
) -> None:
    process = start(STOPPABLE, tmp_path, *arguments)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate()
    line = f"stopped by {name}; run again to resume\n"
    assert (process.returncode, out, err) == (128 + getattr(signal, name), "", line)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {Path(path).name for path in arguments}
    assert all((tmp_path / path).read_text() == line for path in arguments)


def test_work_that_swallows_the_signal_is_ended_by_the_kernel(tmp_path: Path) -> None:
    body = """
import time
cli.GRACE_SECONDS = 1
def work():
    said = b"at work\\n"
    while True:
        try:
            os.write(2, said)
            said = b""
            time.sleep(60)
        except BaseException: pass
"""
    process = start(body, tmp_path)
    process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGALRM


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STOPPABLE, tmp_path)
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert process.communicate()[1] == "stopped by SIGTERM; run again to resume\n"


PARENT = """
import os, subprocess, sys
python = [sys.executable, "-c", sys.argv[1]]
shell = ["sh", "-c", '"$@"; true', "sh"]  # stays, as the process of a container does
child = subprocess.Popen(shell + python if sys.argv[3:] else python, env=os.environ | eval(sys.argv[2]))
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
@pytest.mark.parametrize(("job", "between"), [(True, []), (True, ["a shell"]), (False, [])])
def test_a_job_ends_with_its_workflow_and_a_script_started_by_hand_goes_on(
    tmp_path: Path, job: bool, between: list[str]
) -> None:
    body = """
import time
def work():
    Path("begun").touch()
    for _ in range(100): time.sleep(0.1)
"""
    code = f"{PREAMBLE}\nlog = Path('work.log')\n{body}\nraise SystemExit(cli.run(work, log))"
    settings = "{'PIPELINE_PID': str(os.getpid())}" if job else "{}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, code, settings, *between],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PIPELINE_PID"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    if job:
        while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
            time.sleep(0.05)
        assert (tmp_path / "work.log").read_text() == "stopped by SIGTERM; run again to resume\n"
    else:
        time.sleep(0.5)
        assert " Z " not in Path(f"/proc/{child}/stat").read_text()
        os.kill(child, signal.SIGKILL)


def test_a_job_whose_workflow_ended_before_it_began_does_nothing(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    os.environ["PIPELINE_PID"] = str(ended.pid)
    try:
        job = run_script("def work(): print('worked')", tmp_path / "work.log")
    finally:
        del os.environ["PIPELINE_PID"]
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr == "error: the Snakemake that started this job has ended; run Snakemake again\n"


def test_a_process_id_of_another_host_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setenv("PIPELINE_PID", str(ended.pid))
    monkeypatch.setenv("PIPELINE_HOST", "login01 4b6f pid:[4026531836]")
    assert run_script("def work(): pass", tmp_path / "work.log").returncode == 0


@pytest.mark.parametrize("log", ["file/work.log", "notes.txt", "folder", "n" * 256 + ".log"])
def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path, log: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    ended = run_script("def work(): pass", tmp_path / log)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and str(tmp_path / log.split("/")[0]) in ended.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_input_of_another_user_is_one_line(tmp_path: Path) -> None:
    body = 'def work(): raise PermissionError(13, "Permission denied", "theirs.json")'
    ended = run_script(body, tmp_path / "work.log")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: theirs.json: permission denied; ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["def work(): print('x' * 100_000)", "def work(): raise KeyError('weight')"])
def test_a_log_on_a_full_disk_costs_no_traceback(body: str) -> None:
    for settings in ({}, {"PIPELINE_QUIET": "1"}, {"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}):
        ended = run_script(body, "/dev/full", **settings)
        assert ended.returncode in (1, 2)
        assert len(ended.stderr.splitlines()) == 1 and "/dev/full" in ended.stderr


def test_a_reader_that_has_ended_is_no_error() -> None:
    code = (
        f"{PREAMBLE}\ndef work():\n    for n in range(100_000): cli.say('word')\nraise SystemExit(cli.run(work, log))"
    )
    command = f'{sys.executable} -c "$CODE" | head -n 1; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"CODE": code}, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("word\n141\n", "")


def test_an_output_is_refused_before_work_where_it_would_destroy_something(tmp_path: Path) -> None:
    for name in ("model.safetensors", "plan.json"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("plan.json")
    for name, said in (
        ("model.safetensors", r"--run-record: .*model\.safetensors does not end in \.json"),
        ("plan.json", r"--run-record: .*plan\.json is an input"),
        ("link.json", r"--run-record: .*link\.json is an input"),
        ("folder.json", "a folder"),
        ("plan.json/out.json", "a part of this path is a file"),
    ):
        args = argparse.Namespace(plan=tmp_path / "plan.json", run_record=tmp_path / name, log=None)
        with pytest.raises(InputError, match=said):
            require_outputs(args, run_record=".json")
    args = argparse.Namespace(files=[tmp_path / "plan.json"], checksums=tmp_path / "new" / "out.json", markdown=None)
    require_outputs(args, checksums=".json", markdown=".md")
    args.checksums = tmp_path / "plan.json"
    with pytest.raises(InputError, match="is an input"):
        require_outputs(args, checksums=".json")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cli.user_path("~/models/x") == Path("/home/someone/models/x")
    assert cli.user_path("models/~x") == Path("models/~x")


def test_a_hub_that_no_url_names_is_one_line_before_a_library_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:pass-word@host:99999")
    assert cli.run(lambda: pytest.fail("worked"), None) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: HF_ENDPOINT: no valid URL; write http://host:port, and")
    assert said.count("\n") == 1 and "pass-word" not in said


def test_ctrl_c_while_a_script_imports_is_one_line() -> None:
    ended = run_script("raise KeyboardInterrupt")
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "stopped by SIGINT; run again\n")


def test_another_error_while_a_script_imports_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    ended = run_script("raise ValueError('a bug')")
    assert ended.returncode == 1 and ended.stderr.startswith("Traceback") and "ValueError: a bug" in ended.stderr


def test_an_announcement_has_a_line_of_its_own_while_a_bar_is_drawn(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setenv("PIPELINE_QUIET", "1")
    monkeypatch.setitem(cli._terminal, "err", stream)
    with cli.progress_bar("capture") as on_progress:
        on_progress(1, 2)
        cli.announce("about 4 min")
    assert "about 4 min" in stream.getvalue().replace("\r", "\n").splitlines()
