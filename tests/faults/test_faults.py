"""Faults lose nothing: a quick share of each kind. ``make faults`` runs them in full."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyengine
from tests.support import ROOT, comparisons, run_check


def run_module(module: str, *arguments: object) -> str:
    """What a fault run printed that found nothing wrong."""
    command = [sys.executable, "-m", f"tests.faults.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_a_refused_allocation_is_a_status_and_the_same_objects_go_on() -> None:
    """Every allocation of a failure's description, every 40th of the rest: once, and from then on."""
    assert comparisons(run_check("fault_check", "--every", 40, pyengine.demo_model_path())) > 1000


@pytest.mark.as_built  # has a library of its own preloaded first
def test_failing_writes_and_kills_leave_the_whole_file_or_what_was_there() -> None:
    printed = run_module("writes", "--faults", 24, "--kills", 8)
    assert printed.count(" 0 failures") == 2


def test_a_model_file_that_changes_while_a_command_uses_it_ends_in_a_message() -> None:
    assert " 0 failures" in run_module("changed", "--trials", 24)


@pytest.mark.as_built  # sanitizers reserve more addresses than any limit
def test_commands_that_are_refused_memory_say_so() -> None:
    printed = run_module("memory", "--step", 24 << 10, "--most", 168)
    assert printed.count(" 0 failures") == 6
