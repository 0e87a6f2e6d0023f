"""The output on the terminal: the decision or the failure comes last. `make run` shows one line for each step."""

import atexit
import logging
import os
import shlex
import sys
from pathlib import Path

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

from auto_quantize_model.documents import read_document
from auto_quantize_model.escape import printable, redacted
from auto_quantize_model.files import InputError

QUIET = "PIPELINE_QUIET" in os.environ  # the jobs read it too
# Errors of Snakemake that a failed job causes. The job's own sentence says more, and comes last.
CAUSED = ("RuleException:\nCalledProcessError", "WorkflowError:\nAt least one job did", "Exiting because a job")


class Steps(logging.Handler):
    """Follows the jobs by Snakemake's messages.

    Attributes:
        failed: a line for each failed job's log, then the last line of that log.
    """

    def __init__(self):
        super().__init__()
        self.begun, self.total, self.failed = 0, 0, []

    def emit(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.total = sum(count for rule, count in record.stats.items() if rule not in ("all", "total"))
        elif event == LogEvent.JOB_INFO and record.rule_name != "all":
            self.begun += 1
            if QUIET:
                purpose = (workflow.get_rule(record.rule_name).docstring or "").strip().partition("\n")[0]
                say(f"[{self.begun:{len(str(self.total))}}/{self.total}] {record.rule_name}: {purpose}", sys.stderr)
        elif event == LogEvent.JOB_ERROR and not record.indent:  # a job of a group has an indent, and no log here
            # A storage gets the log of a step later. This host may have its local copy now, and a pod has it.
            copies = [log for job in workflow.dag.jobs if workflow.dag.jobid(job) == record.jobid for log in job.log]
            self.failed += self.lines(record.rule_name, record.log, map(str, copies))
        elif event == LogEvent.GROUP_ERROR:
            names = ", ".join(sorted(job["rule_name"] for job in record.job_error_info))
            own = [log for job in record.job_error_info for log in job["log"]]
            self.failed += self.lines(f"one of {names}", record.aux_logs or own)
        elif record.getMessage() == NOTHING_TO_BE_DONE_MSG:
            show_result()

    def lines(self, name, logs, copies=()):
        """What to show of a failure. A scheduler's own log comes after that of the step, whose last line says more."""
        logs = [*reversed(logs)]
        for log in [log for log in dict.fromkeys([*logs, *copies]) if Path(log).is_file()] or logs:
            yield f"{name} failed; its log: {log}"
            text = Path(log).read_text(errors="replace") if Path(log).is_file() else ""
            yield from text.rstrip().splitlines()[-1:]  # that of a pod ends with an empty line


def say(text, stream=None):
    """Print a line without secrets and control characters."""
    print(printable(redacted(text)), file=stream or sys.stdout, flush=True)


def is_news(record):
    """Whether a message of Snakemake is for the terminal of `make run`."""
    if record.levelno < logging.WARNING or getattr(record, "event", None) == LogEvent.JOB_ERROR:
        return False
    return not record.getMessage().startswith(CAUSED)


def show_result():
    """When Snakemake has ended, show the decision, the page and the next command, if the run made them."""
    if workflow.dryrun:
        return
    made = {job.rule.name: job for job in workflow.dag.jobs}
    try:
        from auto_quantize_model.report import sentences  # takes numpy and scipy, which planning has not

        if "render_page" in made:
            step = made["render_page"]
            if step.output.html.is_storage:  # the local copies are gone by now
                atexit.register(say, f"The page is in the storage: {step.output.html.storage_object.query}")
                return
            exports = str(Path(step.input.exports).parent)
            found = read_document(Path(step.input.report), "report")
            lines = sentences.closing(found, step.output.html, exports, config_files(), elsewhere())
        elif "quantize_model" in made:
            record = Path(made["quantize_model"].output.record)
            lines = [sentences.quantized(read_document(record, "quantized"), str(record.parent))]
        else:
            return
    except InputError as error:
        lines = [f"error: {error}"]
    except ModuleNotFoundError as error:  # the jobs ran elsewhere
        lines = [f"The results are made. Their summary needs {error.name}, which this Python has not."]
    atexit.register(say, "\n".join(lines))


def show_failure():
    """When Snakemake has ended, show the failed jobs, and last the sentence with the cause."""
    atexit.register(lambda: STEPS.failed and say("\n".join(STEPS.failed), sys.stderr))


def config_files():
    """The config files of the command line, as make's CONFIG takes them."""
    files = [Path(file).absolute() for file in workflow.config_settings.configfiles]
    return " ".join(shlex.quote(str(file)) if elsewhere() else os.path.relpath(file) for file in files)


def elsewhere():
    """The options that name this Snakefile and a working directory that is not the checkout; empty in the checkout."""
    if Path.cwd() == ROOT:
        return ""
    return f"--snakefile {shlex.quote(str(ROOT / 'workflow/Snakefile'))} --directory {shlex.quote(str(Path.cwd()))}"


STEPS = Steps()
logger.addHandler(STEPS)
if workflow.remote_exec:  # Snakemake runs no onerror here, and the log of a pod is all that its host sees
    show_failure()
if QUIET:
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler":  # the file in .snakemake/log keeps all messages
            handler.addFilter(is_news)
