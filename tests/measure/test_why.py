"""Facts about inputs and weights: what is planted is found, by its index."""

import pytest
import torch

from auto_quantize_model.measure.why import BINS, clipped_values, counted, kurtosis, watch_inputs, weight_facts
from auto_quantize_model.schemes.compressed import scheme_of


class Model(torch.nn.Module):
    """An op that sees its batch as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.op = torch.nn.Linear(16, 4).requires_grad_(False)

    def forward(self, hidden: torch.Tensor, mm_token_type_ids: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.op(hidden)
        return found


def batch(seed: int, image: bool = True) -> dict[str, torch.Tensor]:
    hidden = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(seed))
    kinds = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    return {"hidden": hidden, "mm_token_type_ids": kinds} if image else {"hidden": hidden}


def test_an_outlier_channel_is_named_by_its_index_and_values_beyond_the_calibration_are_counted() -> None:
    seen, unseen = batch(0), batch(1)
    for part in (seen, unseen):
        part["hidden"][..., 11] *= 40
        part["hidden"][..., 2] *= 12
    unseen["hidden"][0, 0, 5], unseen["hidden"][0, 4, 6] = -3.0, -2.0
    found = watch_inputs(Model(), ["op"], [seen], [unseen])["op"].facts()
    assert [channel.index for channel in found.outliers] == [11, 2] and found.outlier_count == 2
    assert found.outliers[0].ratio == pytest.approx(40, rel=0.3)
    assert found.clipped == pytest.approx(
        float(
            ((unseen["hidden"] < found.calibration_range[0]) | (unseen["hidden"] > found.calibration_range[1]))
            .double()
            .mean()
        )
    )
    assert found.clipped >= 2 / 160
    assert found.image_range and found.image_range[0] == -3.0 and found.text_range and found.text_range[0] == -2.0
    assert found.range[0] == -3.0 and sum(found.histogram.counts) == 160 and len(found.histogram.counts) == BINS


def test_without_an_image_all_positions_are_text() -> None:
    found = watch_inputs(Model(), ["op"], [batch(0, image=False)], [batch(1, image=False)])["op"].facts()
    assert found.image_range is None and found.text_range == found.range and found.outliers == ()


def test_the_row_with_the_heaviest_tail_is_named_with_its_op() -> None:
    torch.manual_seed(0)
    weights = {"q": torch.randn(8, 64), "k": torch.randn(4, 64)}
    weights["k"][2, 7] = 30.0
    found = weight_facts(weights, scheme_of("W8A8"))
    assert (found.worst_op, found.worst_row) == ("k", 2) and found.worst_kurtosis > 20 > abs(found.kurtosis) * 0
    assert found.histogram.high == 30.0 and sum(found.histogram.counts) == 12 * 64


def test_kurtosis_is_that_of_known_values() -> None:
    rows = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 4.0]])
    assert kurtosis(rows).tolist() == pytest.approx([-2.0, 0.0, 7 / 3 - 3])


def test_values_beyond_what_the_scale_can_represent_are_clipped() -> None:
    scheme = scheme_of("own", {"weights": {"num_bits": 4, "strategy": "channel"}})
    # The scale is 7.5 over the largest magnitude, so codes reach from -8 to 7: 7.5 is clipped and -7.5 is not.
    assert clipped_values(torch.tensor([[7.5, -7.5, 1.0, 6.9]]), scheme, None) == 1


def test_the_outer_bins_take_what_lies_beyond() -> None:
    found = counted(torch.tensor([-9.0, 0.0, 0.5, 1.0, 9.0]), 0.0, 1.0)
    assert (int(found[0]), int(found[BINS // 2]), int(found[-1])) == (2, 1, 2)
