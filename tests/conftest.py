"""A real, tiny, untrained Qwen2.5-VL snapshot that tests read (and copy before they break it)."""

from pathlib import Path

import pytest
import slurm
import torch
from hypothesis import settings

from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.made.digits import build_snapshot
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.family import Processor
from auto_quantize_model.models.snapshot import load_processor

# How long an example takes depends on the machine, and no test is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


# Files that take minutes, the longest first. They begin first: else one process works on the last of them alone.
LONGEST = [
    "test_workflow",
    "test_storage",
    "test_model",
    "test_plan_and_capture",
    "test_hub",
    "test_page",
    "test_figures",
    "test_driver",
    "test_slurm",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU here"))
    for item in items:
        if item.get_closest_marker("slurm") and (why := slurm.why_not()):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def tiny_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("snapshot") / "tiny"
    build_snapshot(directory, depth=1, hidden=32, seed=0)
    return directory


@pytest.fixture(scope="session")
def processor(tiny_snapshot: Path) -> Processor:
    return load_processor(tiny_snapshot)


@pytest.fixture(scope="session")
def batches(processor: Processor) -> list[dict[str, torch.Tensor]]:
    """Two batches of one digit each."""
    return [collate([encode(sample, processor, LIMITS)]) for sample in digit_samples([0, 1])]
