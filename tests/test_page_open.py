"""The drawn numbers of the page's benchmark have the fields of the records, so the benchmark does not fall behind."""

import random
from dataclasses import fields

import page_open

from auto_quantize_model.records import CalibrationManifest, Point

CHOSEN = {"kind", "name", "schemes", "weight_bytes", "active_bytes", "bits", "predicted", "predicted_error", "seconds"}


def test_a_drawn_state_has_all_metrics_of_a_point():
    (metrics,) = page_open.Drawn([], random.Random(0)).measure([{}])
    assert {field.name for field in fields(Point)} - {"router_agreement"} == CHOSEN | metrics.keys()


def test_the_calibration_is_a_manifest_of_today():
    assert isinstance(page_open.calibration(), CalibrationManifest)
