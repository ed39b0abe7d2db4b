"""Metrics and settings as text."""

import pytest

from prunekit.contracts import Metric
from prunekit.results.metrics import format_metric, format_setting, is_fraction, is_main


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Metric(0.7144, unit="fraction"), "71.4%"),
        (Metric(0.98765, unit="sparsity"), "98.77%"),
        (Metric(0.61512, unit="pixels"), "0.6151"),
        (Metric(123456.7), "123457"),
        (0.5, "0.5"),
    ],
)
def test_a_number_is_shown_by_its_unit(value, text):
    assert format_metric(value) == text


def test_what_is_a_result_and_what_a_fraction():
    fraction, diagnosis = Metric(0.5, unit="fraction"), Metric(3, kind="diagnosis")
    setting = Metric(0.1, kind="setting")
    assert [is_main(v) for v in (fraction, diagnosis, setting, 0.5)] == [True, False, False, True]
    assert [is_fraction(v) for v in (fraction, setting, 0.5)] == [True, False, False]


def test_settings_as_text():
    assert format_setting({"use": "snip", "batches": 2}) == "snip(batches=2)"
    assert format_setting(None) == "-"
