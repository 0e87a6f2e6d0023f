"""What a capture refuses before it measures."""

import pytest
from build import a_plan, an_op

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.capture import require_executions


@pytest.mark.parametrize(
    ("expert", "advice"),
    [
        (False, "make the plan again"),
        (True, "the router chooses otherwise on this device; set sensitivity.device to cpu, or make the plan again"),
    ],
)
def test_an_op_that_runs_more_often_than_planned_is_refused_with_what_to_do(expert: bool, advice: str) -> None:
    plan = a_plan([an_op("a", executions=(1,), expert=expert), an_op("b", executions=(1,))])
    require_executions(plan, 0, {"a": 1, "b": 1})
    with pytest.raises(InputError, match=rf"^a runs 2 times on batch 0, and the plan says 1; {advice}"):
        require_executions(plan, 0, {"a": 2, "b": 1})
