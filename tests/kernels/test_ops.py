"""The check programs of the operations and of the thread pool, run as `make test` builds them."""

from __future__ import annotations

from tests.support import comparisons, run_check


def test_every_tier_equals_the_scalar_operations_and_they_equal_long_double_arithmetic() -> None:
    assert comparisons(run_check("ops_check")) > 100_000


def test_attention_of_every_tier_equals_the_scalar_one_and_that_equals_a_long_double_softmax() -> None:
    assert comparisons(run_check("attention_check")) > 5_000


def test_the_thread_pool_loses_no_task_no_wakeup_and_no_cpu_time() -> None:
    assert comparisons(run_check("pool_check")) > 100
