"""A record is read back as it was written, to the byte; a document with other fields is refused."""

import json

import pytest
from build import a_plan, two_units
from test_document import UNMEASURED, parts

from auto_quantize_model.config import Target
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.documents import write_document
from auto_quantize_model.files import InputError, canonical_json
from auto_quantize_model.records import (
    Audit,
    CalibrationManifest,
    Capture,
    Frontier,
    ModelManifest,
    NotMeasured,
    Plan,
    Profiles,
    as_record,
    body_of,
)

MANIFEST, CALIBRATION, PLAN, CAPTURE, AUDIT, *_ = parts()
MISSED = build_profiles(two_units(), a_plan("ab"), Target(max_weight_bytes=1, max_divergence=0.02))


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (ModelManifest, MANIFEST),
        (CalibrationManifest, CALIBRATION),
        (Plan, PLAN),
        (Capture, CAPTURE),
        (Audit, AUDIT),
        (Frontier | NotMeasured, two_units()),
        (Frontier | NotMeasured, UNMEASURED),
        (Profiles, MISSED),
    ],
)
def test_a_record_that_was_written_is_read_back_to_the_byte(kind, record):
    written = canonical_json(body_of(record))
    found = as_record(kind, json.loads(written))
    assert (found, canonical_json(body_of(found))) == (record, written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": 1}, r"plan\.json: ops: Input should be a valid tuple; make it again .*--forcerun plan_quantization"),
        ({"more": 1}, r"plan\.json: more: Unexpected keyword argument; make it again"),
        ({"excluded": [{"op_name": "a", "op_type": "b"}]}, r"plan\.json: excluded\.0\.reason: "),
    ],
)
def test_a_document_with_other_fields_is_refused_by_the_place(tmp_path, changes, message):
    document = write_document(tmp_path / "plan.json", "plan", body_of(a_plan(["a"])) | changes)
    with pytest.raises(InputError, match=message):
        as_record(Plan, document)
