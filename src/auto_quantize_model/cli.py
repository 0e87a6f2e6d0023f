"""Run a command: library output goes into the log, progress and results to the terminal, an error takes one line."""

import argparse
import atexit
import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast
from unittest import mock

from tqdm import tqdm

from auto_quantize_model.escape import one_line, printable, redacted
from auto_quantize_model.files import (
    InputError,
    explained,
    named_errors,
    parse_json,
    require_endpoint,
    require_file,
    require_writable,
)
from auto_quantize_model.host import has_ended, workflow_process

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10  # for work to end after a signal; then the kernel ends the work
_terminal: dict[str, TextIO] = {}


def is_quiet() -> bool:
    """Whether the workflow that runs this job shows one line for each step (quiet mode)."""
    return "PIPELINE_QUIET" in os.environ


def say(text: str) -> None:
    """Print a result on the terminal, also while library output goes to a log; in quiet mode, print into the log."""
    stream = sys.stdout if is_quiet() else _terminal.get("out", sys.stdout)
    print(printable(redacted(text)), file=stream, flush=True)


def announce(text: str) -> None:
    """Print on the terminal, in quiet mode as well: for a line that a person waits for, such as how long work takes."""
    # To the stream of the bars: only there does tqdm move a bar out of the way.
    tqdm.write(printable(redacted(text)), file=_terminal.get("err", sys.stderr))


def _bar_settings() -> dict[str, Any]:
    """Where a progress bar is drawn, and how often. In quiet mode, a finished bar is removed."""
    stream = _terminal.get("err", sys.stderr)
    # In a file or on a CI page each update is a new line, so updates are rare there.
    return {"file": stream, "mininterval": 0.5 if stream.isatty() else 15, "leave": not is_quiet()}


def progress(steps: Sequence[Any], what: str) -> tqdm:
    """A progress bar with the time left, on the terminal, to iterate over."""
    return tqdm(steps, desc=what, dynamic_ncols=True, **_bar_settings())


def user_path(text: str) -> Path:
    """A path as a person writes it. `~` is the home folder, even if no shell has expanded it."""
    return Path(os.path.expanduser(text))


class TerminalBar(tqdm):  # type: ignore[misc]  # tqdm ships no types
    """A bar for libraries that make their bars from a class; shown on the terminal while other output goes to a log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)  # huggingface_hub's, for groups of bars
        super().__init__(*args, **kwargs | _bar_settings())

    def __str__(self) -> str:
        """The bar as it is drawn; its label holds names of files from the hub."""
        return printable(redacted(super().__str__())).replace("\n", " ")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that counts its own progress: call the yielded function with the number done and the total."""
    with progress((), what) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def json_value(text: str) -> Any:
    """A JSON value from a command line: a `type` of argparse, which prints the message in one line."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'not valid JSON ({error}); write {{"key": value}}') from None


def end_with_parent() -> None:
    """End a job of the workflow when the workflow ends, so that no orphan process keeps writing.

    The workflow names itself in the environment, because it may have ended while this process was still importing. A
    script that a person started is not a job, and does not end with any other program. Neither does a job whose
    Snakemake runs on another host: that scheduler ends its jobs. On Linux the kernel sends a signal when the parent
    ends. A container's own process may be the parent, so a thread waits for the workflow then. On other systems the
    score store's lock keeps a second writer out.
    """
    workflow = workflow_process(os.environ)
    if sys.platform != "linux" or workflow is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != workflow:
        with contextlib.suppress(AttributeError, OSError):  # an old kernel or a Python for one, or a process that ended
            threading.Thread(target=_end_with, args=(os.pidfd_open(workflow),), daemon=True).start()
    if has_ended(workflow):
        raise InputError("the Snakemake that started this job has ended; run Snakemake again")


def _end_with(process: int) -> None:
    """Send SIGTERM to the main thread when the process of a pidfd ends."""
    select.select([process], [], [])
    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGTERM)


class Stopped(BaseException):
    """A signal asks this process to end. It is not an `Exception`, so it passes through every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn the signals that end a process into `Stopped`, so that temporary files go and the terminal shows a line.

    A signal that is ignored stays ignored, such as SIGHUP under nohup. A library may swallow the exception or wait for
    its threads, so the kernel ends such work after GRACE_SECONDS.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        for other in STOPPING:
            signal.signal(other, signal.SIG_IGN)
        signal.alarm(GRACE_SECONDS)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def require_outputs(args: argparse.Namespace, **suffixes: str) -> None:
    """Refuse, before long work, an output path that would destroy a file of another kind or cannot be written.

    Args:
        args: the script's options; each path that is not an output counts as an input.
        suffixes: for each output, by its name in `args`, the ending of its name; an output that is None is left out.

    Raises:
        InputError: the suffix is another one, or the path is a folder, a device or an input, or cannot be written.
    """
    given = [value for name, value in vars(args).items() if name not in {*suffixes, "log"}]
    inputs = [path for value in given for path in (value if isinstance(value, list) else [value])]
    for name, suffix in suffixes.items():
        path, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if path.suffix != suffix:
            raise InputError(f"{option}: {path} does not end in {suffix}; name a file that does")
        require_place(path, [value for value in inputs if isinstance(value, Path)], f"{option}: ")


def require_place(path: Path, inputs: Iterable[Path], option: str = "") -> None:
    """Refuse, before long work, a path at which an output cannot or must not be written.

    Args:
        path: the output's path.
        inputs: what the step reads.
        option: begins the message where an option names the path.

    Raises:
        InputError: the path is a folder, a device or one of the inputs, or cannot be written.
    """
    with named_errors(path):
        require_file(path)
        require_writable(path.absolute().parent)
        if path.exists() and any(given.exists() and given.samefile(path) for given in inputs):
            raise InputError(f"{option}{path} is an input of this step; name another file")


def run(work: Callable[[], None], log: Path | None) -> int:
    """Run `work` and return the exit code.

    0: done. 2: the user can correct an input or the disk. 128 plus the signal's number: a signal stopped the work. 1:
    any other error. A job of the workflow ends with the workflow.

    Args:
        work: the script's work.
        log: the file for standard output and error during the work, those of C libraries too; None: the terminal.
    """
    with contextlib.ExitStack() as chatter, _streams_redacted():

        def logged() -> None:
            end_with_parent()
            # Some values break huggingface_hub when it is imported.
            require_endpoint(os.environ.get("HF_ENDPOINT") or None)
            if log is not None:
                chatter.enter_context(_chatter_into(log))
            work()

        return _guarded(logged, log)


def _guarded(work: Callable[[], None], log: Path | None) -> int:
    try:
        with _stopped_by_signals():
            work()
    except Stopped as stopped:
        _report(f"stopped by {signal.Signals(stopped.number).name}; run again to resume", log)
        return 128 + stopped.number
    except InputError as error:
        _report(f"error: {error}", log)
        return 2
    except BrokenPipeError:  # the reader of the output has ended, such as `head`; the buffered rest is dropped
        _drop_output(1)
        return 128 + signal.SIGPIPE
    except Exception as error:  # the outermost frame: the log gets the full traceback, the terminal one line
        # Errors of outputs name the output. All other files are the log and the temporary files of libraries.
        if message := explained(error, Path(tempfile.gettempdir()) if log is None else log):
            _report(f"error: {message}", log)
            return 2
        with contextlib.suppress(OSError):
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        where = f"; full traceback in {log}" if log else ""
        _report(f"error: {type(error).__name__}: {error}{where}", log)
        return 1
    return 0


def _drop_output(*descriptors: int) -> None:
    """Send all later output of these file descriptors nowhere, with what their buffers hold."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _report(message: str, log: Path | None) -> None:
    """Print one line into the log where there is one, and on the terminal. Either may be full or closed.

    In quiet mode the workflow shows the last line of the log when it ends, so the log is enough.
    """
    message = one_line(redacted(message))
    for stream in dict.fromkeys([sys.stderr, _terminal.get("err", sys.stderr)]):
        with contextlib.suppress(OSError):
            print(message, file=stream, flush=True)
            if is_quiet():
                return


def _report_early_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report in one line that Ctrl-C ended a script before `run`, while the script imported its libraries."""
    if issubclass(kind, KeyboardInterrupt):
        _report("stopped by SIGINT; run again", None)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report_early_end  # scripts import this module first
# At its end Python searches all objects for cycles. With torch and transformers loaded, that takes seconds.
atexit.register(gc.freeze)


@contextlib.contextmanager
def _streams_redacted() -> Iterator[None]:
    """Hide secrets in what Python writes to its standard streams, because libraries print URLs with passwords.

    The streams are patched and not replaced, because handlers of loggers already hold the streams.
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
    with named_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.is_file() and log.suffix != ".log":
            raise InputError(f"{log}: --log would empty this file, and its name does not end in .log; name another one")
        file = open(log, "w", encoding="utf-8")  # noqa: SIM115  closed below
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = open(saved[0], "w"), open(saved[1], "w")  # noqa: SIM115  closed below
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    file.close()
    _terminal.update(out=terminal[0], err=terminal[1])
    try:
        yield
    finally:
        # C's own buffer too: its content would otherwise appear on the terminal at exit.
        for flush in (sys.stdout.flush, sys.stderr.flush, lambda: ctypes.CDLL(None).fflush(None)):
            try:
                flush()
            except OSError:  # the log's disk is full, and the buffer keeps what does not fit
                _drop_output(1, 2)
                flush()
        _terminal.clear()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for stream in terminal:
            with contextlib.suppress(OSError):  # the reader has ended
                stream.close()
