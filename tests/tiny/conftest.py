"""Shared by the tests of the tiny world's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_plans import quick_plan, record_commands

from iris_fast.tiny.recipe.ablation_plan import Plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan in a folder of its own."""
    return quick_plan(tmp_path)


@pytest.fixture
def called(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands of `plan`."""
    return record_commands(plan, monkeypatch)
