"""How Snakemake ends: a signal ends its jobs too, and the lock of a killed Snakemake does not stop the next run.

Without this file, Snakemake waits for its jobs on SIGTERM, leaves its lock on SIGHUP, and asks for --unlock after
kill -9. Jobs on other hosts are cancelled through their scheduler.
"""

import contextlib
import fcntl
import os
import platform
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def remove_lock_of_the_killed():
    """Remove Snakemake's lock where no Snakemake of this workflow lives, as `--unlock` does.

    Each of them holds a shared flock on one file until its process ends, on whatever host. The kernel releases the
    flock at any end. So a process that gets the exclusive flock knows that it is alone. On a file system without flock,
    the lock stays. Some file systems hold a flock among the processes of one host alone. So the file has the name of the
    host that last held it alone, and the lock of another host stays.
    """
    with contextlib.suppress(OSError):
        Path(".snakemake").mkdir(exist_ok=True)
        # The file stays open, and locked, until the process ends.
        alive = os.open(".snakemake/auto-quantize-alive", os.O_CREAT | os.O_RDWR)
        if workflow.is_main_process:  # the others run jobs of a living one, without a lock
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                here, locks = platform.node().encode(), Path(".snakemake/locks")
                if os.pread(alive, 1000, 0) in (b"", here) or not any(locks.glob("*")):
                    shutil.rmtree(locks, ignore_errors=True)
                    os.ftruncate(alive, 0)
                    os.pwrite(alive, here, 0)
        fcntl.flock(alive, fcntl.LOCK_SH)


def unlock_on_signals():
    """Until the first job starts, have signals end Snakemake by an exception, so that it removes its lock."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def stop_jobs_on_signals():
    """From the first job on, have a signal end all running jobs and start no more.

    The score store keeps all scores. Snakemake treats the jobs as failed, removes its lock and ends with 1. A signal
    that nohup ignores stays ignored. A second Ctrl-C interrupts Snakemake itself, as without this file. Where jobs run
    on other hosts, each signal acts as Ctrl-C does, because then Snakemake has the scheduler cancel them.
    """
    start_no_more = signal.getsignal(signal.SIGTERM)  # Snakemake's own

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # In a thread, because Snakemake's handler takes a lock that the interrupted thread may hold.
        threading.Thread(target=end_jobs, args=(start_no_more,), daemon=True).start()

    def cancel(number, frame):
        for other in STOPPING:
            signal.signal(other, signal.SIG_IGN)
        end_children(set())
        raise KeyboardInterrupt

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop if workflow.local_exec else cancel)


def end_jobs(start_no_more):
    """End all jobs, and those that are about to start. This runs in a thread that ends with the process."""
    start_no_more(signal.SIGTERM, None)
    told = set()
    while True:
        end_children(told)
        time.sleep(0.2)


def end_children(told):
    """End the jobs on this host that were not told before. The commands of a scheduler are no Python, and go on."""
    for job in set(psutil.Process().children(recursive=True)) - told:
        with contextlib.suppress(psutil.Error):
            if workflow.local_exec or os.path.samefile(job.exe(), sys.executable):
                told.add(job)
                job.terminate()


remove_lock_of_the_killed()
if threading.current_thread() is threading.main_thread():
    unlock_on_signals()
