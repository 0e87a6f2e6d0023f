"""A job looks for its Snakemake where that Snakemake runs, and nowhere else."""

import os
import subprocess

from auto_quantize_model.host import has_ended, this_host, workflow_process


def test_a_process_id_counts_on_the_host_that_named_it() -> None:
    here = {"PIPELINE_PID": "7", "PIPELINE_HOST": this_host()}
    assert workflow_process(here) == 7
    assert workflow_process({"PIPELINE_PID": "7"}) == 7
    assert workflow_process(here | {"PIPELINE_HOST": "n1 boot pid:[1]"}) is None
    assert workflow_process({"PIPELINE_HOST": this_host()}) is None
    assert workflow_process({"PIPELINE_PID": "x"}) is None


def test_another_namespace_of_process_ids_is_another_host() -> None:
    name, boot, namespace = this_host().split(" ")
    assert name == os.uname().nodename and len(boot) == 36 and namespace.startswith("pid:[")


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(ended.pid) and not has_ended(os.getpid())
    ended.wait()
    assert has_ended(ended.pid)
