"""Counters as Prometheus reads them."""

from __future__ import annotations

from progressdb_kms.service.metrics import Metrics


def test_a_count_is_told_to_its_last_digit() -> None:
    """`%g` would round 12,345,678 to six digits, and a rate over it would be nonsense."""
    text = Metrics(1).render(
        [("a_total", "counter", "A.", [("", 12_345_678)]), ("b", "gauge", "B.", [("", True), ("", 0.25)])]
    )
    assert "progressdb_kms_a_total 12345678\n" in text
    assert "progressdb_kms_b 1\nprogressdb_kms_b 0.25\n" in text


def test_each_operation_is_counted_by_itself_over_all_processes() -> None:
    metrics = Metrics(2)
    metrics.block(0).request("encrypt", 200, 0.001)
    metrics.block(1).request("encrypt", 200, 0.001)
    metrics.block(1).request("decrypt_batch", 404, 0.001)
    lines = metrics.render([]).splitlines()
    assert 'progressdb_kms_requests_total{op="encrypt",status="2xx"} 2' in lines
    assert 'progressdb_kms_requests_total{op="decrypt_batch",status="4xx"} 1' in lines
    assert 'progressdb_kms_requests_total{op="decrypt",status="2xx"} 0' in lines
