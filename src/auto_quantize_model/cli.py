"""What every script shares: chatter into the log, progress and results on the terminal, errors in one line."""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import psutil
from tqdm import tqdm

from auto_quantize_model.escape import one_line, printable, redacted
from auto_quantize_model.files import InputError

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_terminal: dict[str, TextIO] = {}


def say(text: str) -> None:
    """Print a result on the terminal, also while chatter goes to a log."""
    print(printable(redacted(text)), file=_terminal.get("out", sys.stdout), flush=True)


def progress(steps: Sequence[Any], what: str) -> tqdm:
    """A progress bar with the time left, on the terminal, to iterate over."""
    stream = _terminal.get("err", sys.stderr)
    # A bar in a file or a CI page is a line for every update: far between then.
    return tqdm(steps, desc=what, file=stream, mininterval=0.5 if stream.isatty() else 15, dynamic_ncols=True)


class TerminalBar(tqdm):
    """A bar for libraries that make their own from a class: on the terminal too, while chatter goes to a log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stream = _terminal.get("err", sys.stderr)
        kwargs.pop("name", None)  # huggingface_hub's, for groups of bars
        super().__init__(*args, **kwargs | {"file": stream, "mininterval": 0.5 if stream.isatty() else 15})

    def __str__(self) -> str:
        """The bar as it is drawn; its label holds names of files from the hub."""
        return printable(redacted(super().__str__())).replace("\n", " ")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that says itself how far it is: call what is yielded with what is done and the total."""
    with progress((), what) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def json_value(text: str) -> Any:
    """A value of a script's command line as JSON: a `type` of argparse, which prints the message in one line."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f'not valid JSON ({error}); write {{"key": value}}') from None


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, so that no orphan goes on writing.

    Linux alone has that signal; elsewhere the journal's lock still keeps a second writer out. The workflow says who it
    is in the environment: it may have ended while this process was still importing.
    """
    if sys.platform != "linux":
        return
    workflow = int(os.environ.get("PIPELINE_PID", os.getppid()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        ended = psutil.Process(workflow).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        ended = True
    if ended:
        raise SystemExit("error: the process that started this one has ended")


def run(work: Callable[[], None], log: Path | None) -> int:
    """Run `work` and return the exit code: 0, 2 for an input that the user can mend, 1 for anything else.

    Args:
        work: the script's job.
        log: where standard output and error go meanwhile, those of C libraries too; None leaves them on the terminal.
    """
    if log is None:
        with _streams_redacted():
            return _guarded(work, None)
    with _chatter_into(log), _streams_redacted():
        return _guarded(work, log)


def _guarded(work: Callable[[], None], log: Path | None) -> int:
    try:
        work()
    except InputError as error:
        _report_error(str(error), log)
        return 2
    except Exception as error:  # the outermost frame: whatever it is, it is logged whole and named in one line
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
        where = f"; the whole story is in {log}" if log else ""
        _report_error(f"{type(error).__name__}: {error}{where}", log)
        return 1
    return 0


def _report_error(message: str, log: Path | None) -> None:
    message = one_line(redacted(message))
    if log:
        print(f"error: {message}", file=sys.stderr, flush=True)
    print(f"error: {message}", file=_terminal.get("err", sys.stderr), flush=True)


@contextlib.contextmanager
def _streams_redacted() -> Iterator[None]:
    """Hide secrets in what Python writes to its standard streams: libraries print URLs with passwords.

    The streams themselves are patched and not replaced, as handlers of loggers hold them already.
    """
    with contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            stack.enter_context(
                mock.patch.object(stream, "write", lambda text, write=stream.write: write(redacted(text)))
            )
        yield


@contextlib.contextmanager
def _chatter_into(log: Path) -> Iterator[None]:
    """Point file descriptors 1 and 2 at `log`; keep the terminal for `say` and `progress`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "w", encoding="utf-8") as file, open(saved[0], "w") as out, open(saved[1], "w") as err:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        _terminal.update(out=out, err=err)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # C's own buffer too, or its chatter would come out on the terminal at exit.
            ctypes.CDLL(None).fflush(None)
            _terminal.clear()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
