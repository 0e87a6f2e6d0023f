"""A journal loses what a kill cut off and nothing else, and never mixes scores of two runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.journal import Journal

OF = {"plan": "a", "threads": 1}


def fill(path, count):
    with Journal(path, OF) as journal:
        for number in range(count):
            journal.add(f"key{number}", {"mse_value": number / 3})


def test_records_are_there_again_exactly(tmp_path):
    fill(tmp_path / "j", 3)
    with Journal(tmp_path / "j", OF) as journal:
        assert journal.records == {f"key{number}": {"mse_value": number / 3} for number in range(3)}
        assert (journal.found, journal.dropped) == (3, "")


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_line_that_was_cut_off_is_dropped_and_the_journal_goes_on(tmp_path, cut):
    path = tmp_path / "j"
    fill(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, OF) as journal:
        assert journal.found == 2
        journal.add("key2", {"mse_value": 2 / 3})
    assert path.read_bytes() == whole


def test_a_journal_cut_off_in_its_first_line_starts_anew(tmp_path):
    path = tmp_path / "j"
    fill(path, 0)
    path.write_bytes(path.read_bytes()[:10])
    fill(path, 2)
    with Journal(path, OF) as journal:
        assert journal.found == 2


def test_another_fingerprint_starts_over_and_says_what_changed(tmp_path):
    path = tmp_path / "j"
    fill(path, 3)
    with Journal(path, OF | {"plan": "b"}) as journal:
        assert (journal.found, journal.records) == (0, {})
        assert journal.dropped == "plan changed"
        journal.add("key0", 1)
    with Journal(path, OF) as journal:
        assert journal.found == 0


def test_a_damaged_journal_starts_over_and_says_so(tmp_path):
    path = tmp_path / "j"
    path.write_text("not a journal\nat all\n")
    with Journal(path, OF) as journal:
        assert (journal.found, journal.dropped) == (0, "the journal is damaged")


def test_a_second_writer_is_refused_by_name_and_harms_nothing(tmp_path):
    path = tmp_path / "j"
    with Journal(path, OF) as journal:
        journal.add("key0", 1)
        with pytest.raises(InputError, match="j: another capture is writing it"):
            Journal(path, OF)
        journal.add("key1", 2)
    with Journal(path, OF) as journal:
        assert journal.found == 2
        journal.remove()
    assert not path.exists()


def test_a_killed_writer_leaves_every_record_but_the_last(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from auto_quantize_model.measure.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), {'plan': 'a', 'threads': 1})\n"
        "for number in range(10**6):\n"
        "    journal.add(f'key{number}', number)\n"
        "    print(number, flush=True)\n"
    )
    path = tmp_path / "j"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        pass
    process.kill()
    said = process.stdout.read().split("\n")
    process.wait()
    last = int(([line for line in said[:-1] if line] or ["50"])[-1])
    with Journal(path, OF) as journal:
        numbers = [int(key.removeprefix("key")) for key in journal.records]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_process_ends_with_its_parent():
    child = (
        "import os, time\n"
        "from auto_quantize_model.cli import end_with_parent\n"
        "end_with_parent()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'PIPELINE_PID': str(os.getpid())}})"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child goes on without its parent")


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
