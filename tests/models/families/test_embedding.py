"""Models that embed texts or images, measured at their last hidden state."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import LIMITS, loaded, noise, snapshot

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.made.tiny_embeddings import EMBEDDING_SHAPES
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.heldout import record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.architecture import check_architecture
from auto_quantize_model.models.encode import collate, encode
from auto_quantize_model.models.families.embedding import IMAGE_EMBEDDING, TEXT_EMBEDDING
from auto_quantize_model.models.hidden_state import HIDDEN_STATE
from auto_quantize_model.models.sample import Batch, Sample
from auto_quantize_model.models.snapshot import build_manifest
from auto_quantize_model.records import Output

TEXTS = ("The ship lay quiet in the harbour.", "Two numbers are prime to each oth.")


def batch_of(name: str, seed: int = 0) -> Batch:
    processor = loaded(name)[1]
    if processor.family is TEXT_EMBEDDING:
        return collate([encode(Sample(text, text), processor, LIMITS) for text in TEXTS])
    samples = [Sample("a", "", (noise(60, 40, seed + number),)) for number in range(2)]
    return collate([encode(sample, processor, LIMITS) for sample in samples])


@pytest.mark.parametrize("name", [name for name in EMBEDDING_SHAPES if not name.startswith("dinov3")])
def test_a_snapshot_is_accepted_and_measured_at_its_hidden_state(name: str) -> None:
    assert build_manifest(snapshot(name), name, "local", {}).architecture == EMBEDDING_SHAPES[name].architecture
    model, processor = loaded(name)
    assert processor.family in (TEXT_EMBEDDING, IMAGE_EMBEDDING)
    batch = batch_of(name)
    state = model(**batch).last_hidden_state
    assert state.ndim == 3 and len(state) == 2 and bool(state.isfinite().all())
    reference = Reference.of(state, batch, HIDDEN_STATE)
    kind = "text_positions" if processor.family is TEXT_EMBEDDING else "image_positions"
    assert reference.totals()[kind] == state.shape[:-1].numel()
    record = record_of(3 * state, reference, batch, [None, None])
    assert record["divergence"] == pytest.approx(0, abs=1e-12) and "top1_agreement" not in record
    found = summary([record], [totals(reference, 0)], 0)
    assert found["top1_agreement"] is found["perplexity"] is found["accuracy"] is None


@pytest.mark.parametrize("name", ["bert_embedding", "vit_embedding"])
def test_ops_are_ranked_by_the_cosine_distance_and_estimates_come_near(name: str, tmp_path: Path) -> None:
    model, batch = loaded(name)[0], batch_of(name)
    spec = PlanSpec(schemes=("inc_int8", "W8A8", "NVFP4"), confidence_batches=1)
    plan = build_plan(model, [batch], spec)
    assert plan.inc_check["status"] == "no_plan" and "it has no head" in plan.inc_check["reason"]
    assert (plan.measured_op, plan.output) == (HIDDEN_STATE, Output("position", ""))
    assert any(module.op_name == "pooler.dense" and "no part" in module.reason for module in plan.excluded)
    exact, _ = capture_sensitivity(model, [batch], plan, ScoreStore(tmp_path / "exact"))
    rows = {score.op_name: score for score in exact.scores if (score.map, score.scheme) == ("isolated", "W8A8")}
    assert rows.keys() == set(plan.op_names) and all(score.top1_agreement is None for score in rows.values())
    assert all(0 < score.divergence < 1e-2 for score in rows.values() if score.divergence is not None)
    estimated, _ = capture_sensitivity(model, [batch], plan, ScoreStore(tmp_path / "none"), exact="none")
    made = {estimate.op_name: estimate for estimate in estimated.estimates if estimate.scheme == "W8A8"}
    total, expected = (sum(one.divergence or 0 for one in found.values()) for found in (made, rows))
    assert made.keys() == rows.keys() and total == pytest.approx(expected, rel=0.3)


def test_other_classes_are_refused_by_name(tmp_path: Any) -> None:
    def family(model_type: str, architecture: str) -> Any:
        return check_architecture({"model_type": model_type, "architectures": [architecture]}, tmp_path)

    assert family("bert", "BertModel") is TEXT_EMBEDDING and family("dinov2", "Dinov2Model") is IMAGE_EMBEDDING
    assert family("t5", "T5EncoderModel") is TEXT_EMBEDDING
    for model_type, architecture, why in (
        ("t5", "T5Model", "an encoder-decoder without a head; use its encoder's class"),
        ("clip", "CLIPModel", "takes images or sound .vision_config."),
        ("layoutlm", "LayoutLMModel", "it takes the places of words"),
        ("whisper", "WhisperModel", "WhisperModel takes no text and no image, and is not supported"),
    ):
        with pytest.raises(InputError, match=why):
            family(model_type, architecture)
