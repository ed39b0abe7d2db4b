"""What the name of a metric says."""

from __future__ import annotations

import pytest

from prunekit.results.metrics import is_fraction, is_main


@pytest.mark.parametrize(
    ("metric", "main", "fraction"),
    [
        ("pgd.accuracy", True, True),
        ("pgd-0.031.accuracy", True, True),
        ("certify.certified@0.25", True, True),
        ("certify.certified@0.25_low", False, True),
        ("certify.acr", True, False),
        ("pgd.n", False, False),
        ("pgd.zero_gradient", False, False),
        ("verified.crown-ibp_verified", True, True),
        ("verified.errors", False, False),
        ("verified.timeouts", False, False),
        ("sparsity", True, True),
        ("accuracy-of-names.loss", True, False),
    ],
)
def test_what_a_metrics_name_says(metric: str, main: bool, fraction: bool) -> None:
    assert (is_main(metric), is_fraction(metric)) == (main, fraction)
