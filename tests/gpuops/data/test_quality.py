"""Each rule names variable, place and physical value; one broken rule is enough to stop the commit."""

import numpy as np
import pytest

from gpuops.data.writing.quality import Rules, check, gate
from gpuops.errors import QualityError

PACKING = (0.5, -10.0, 255)


def block() -> np.ndarray:
    stored = np.full((3, 2, 4), 60, np.uint8)
    stored[:, 0, 0] = 61
    return stored


@pytest.mark.parametrize("missing", [0, 255])
def test_a_block_that_keeps_its_rules(missing: int) -> None:
    stored = block()
    stored[1, 1, 1] = missing  # no value that a bound could be held against
    rules = Rules(valid_min=20, valid_max=20.5, allow_constant=False)
    assert check("a", stored, 0, rules, (0.5, -10.0, missing)) == []
    assert len(check("a", stored, 0, rules, (0.5, -10.0, None))) == 1


@pytest.mark.parametrize(("rules", "rule"), [(Rules(valid_max=25), "valid_max 25"), (Rules(valid_min=15), "valid_min")])
def test_a_value_out_of_bounds(rules: Rules, rule: str) -> None:
    stored = block()
    value = 100 if "max" in rule else 10
    stored[1, 1, 2] = stored[2, 0, 3] = value
    (found,) = check("rain", stored, 40, rules, PACKING)
    assert found.index == (41, 1, 2), "the place in the stored array, not in the block"
    assert found.value == value * 0.5 - 10
    assert found.count == 2
    assert f"rain[41, 1, 2] = {found.value:g} breaks '{rule}" in str(found)


def test_bounds_are_physical_under_a_negative_scale() -> None:
    stored = np.array([[0, 10]], np.int16)
    (found,) = check("a", stored, 0, Rules(valid_min=-5), (-1.0, 0.0, None))
    assert (found.index, found.value) == ((0, 1), -10)


def test_values_on_a_bound_are_valid() -> None:
    assert check("a", np.array([[0, 10]], np.int16), 0, Rules(valid_min=0, valid_max=10), (1.0, 0.0, None)) == []


def test_infinity_breaks_a_rule_of_its_own_and_nan_is_missing() -> None:
    stored = np.array([[1.0, np.nan], [-np.inf, 2.0]], np.float32)
    (found,) = check("a", stored, 5, Rules(), (1.0, 0.0, None))
    assert found.index == (6, 0)
    assert found.rule == "finite"
    assert found.value == -np.inf


def test_a_constant_record() -> None:
    stored = block()
    stored[2] = 70
    (found,) = check("a", stored, 10, Rules(allow_constant=False), PACKING)
    assert found.index == (12,)
    assert found.value == 25
    assert found.count == 1
    assert check("a", stored, 10, Rules(), PACKING) == []


def test_the_gate_names_the_first_three_and_counts_the_rest() -> None:
    found = [v for i in range(5) for v in check(f"v{i}", block(), i, Rules(valid_max=0), PACKING)]
    with pytest.raises(
        QualityError, match=r"nothing was committed: v0\[0, 0, 0\].*v1.*v2\[2, 0, 0\].*; and 2 more"
    ) as e:
        gate(found, {}, {})
    assert "v3" not in str(e.value)


def test_the_gate_holds_missing_data_to_its_share() -> None:
    rules = {"a": Rules(max_missing=0.25), "b": Rules(max_missing=0.25)}
    gate([], {"a": 0.25, "b": 0.0}, rules)
    with pytest.raises(QualityError, match=r"b: 26.00% of the values are missing, max_missing allows 25.00%"):
        gate([], {"a": 0.25, "b": 0.26}, rules)
