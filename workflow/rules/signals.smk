"""A signal to Snakemake ends its jobs too. By itself Snakemake waits for them on SIGTERM, and SIGHUP leaves its lock."""

import signal
import sys
import threading
import time

import psutil

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def unlock_on_signals():
    """Until the first job starts, have signals end Snakemake by an exception, so that it gives up its lock."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def stop_jobs_on_signals():
    """From the first job on, have a signal end all running jobs and start no more.

    Each job keeps its journal (see `cli`). Snakemake takes the jobs for failed, gives up its lock and ends with 1. A
    signal that nohup ignores stays ignored. A second Ctrl-C interrupts Snakemake itself, as it always did.
    """
    start_no_more = signal.getsignal(signal.SIGTERM)  # Snakemake's own

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # In a thread: Snakemake's handler takes a lock that the interrupted thread may hold.
        threading.Thread(target=end_jobs, args=(start_no_more,), daemon=True).start()

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def end_jobs(start_no_more):
    """Have all jobs end, and those that were about to start; a thread that ends with the process."""
    start_no_more(signal.SIGTERM, None)
    told = set()
    while True:
        for job in set(psutil.Process().children(recursive=True)) - told:
            told.add(job)
            try:
                job.terminate()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.2)


if threading.current_thread() is threading.main_thread():
    unlock_on_signals()
