"""A mixture of experts through the workflow, in a file of its own, so that it runs next to `test_workflow`."""

import json
from pathlib import Path

import pytest
from test_workflow import copy_checkout, on_texts, snakemake, write_config


@pytest.mark.slow
def test_experts_are_measured_in_schemes_that_need_no_inc(tmp_path: Path) -> None:
    from auto_quantize_model.made.tiny_text import write_tiny_text

    directory = copy_checkout(tmp_path / "checkout")
    write_tiny_text("mixtral", directory / "resources" / "models" / "tiny")
    schemes = ["FP8_DYNAMIC", "NVFP4"]
    write_config(directory, on_texts(directory, schemes))
    results = "results/tiny/texts"
    targets = [f"{results}/{name}_cpu.json" for name in ("audit", "frontier")]
    ended = snakemake(directory, *targets, "--cores", "1", "--resources", "gpu=1")
    assert ended.returncode == 0, ended.stdout
    plan, capture, audit, frontier = (
        json.loads((directory / results / f"{name}.json").read_text())
        for name in ("plan", "capture_cpu", "audit_cpu", "frontier_cpu")
    )
    assert list(plan["schemes"]) == schemes and plan["inc_check"] == {"status": "not_asked"}
    experts = [op for op in plan["ops"] if op["expert"]]
    assert len(experts) == 2 * 4 * 2 and all(op["inc_int8"] is None for op in plan["ops"])
    assert plan["coverage"]["share"] > 0.9
    assert audit["status"] == "not_measured" and {*audit["served"]} > {*schemes}
    of_all = [score for score in capture["scores"] if score["map"] == "all"]
    assert all(0 <= score["router_agreement"] <= 1 for score in of_all) and len(of_all) == 2
    units = {unit["name"]: unit["ops"] for unit in frontier["units"]}
    assert [len(ops) for name, ops in units.items() if name.endswith(".experts")] == [8, 8]
    assert {point["name"] for point in frontier["controls"]} >= {*schemes}
