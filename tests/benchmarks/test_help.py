"""Every benchmark says what it measures, without running."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    benchmark = import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")
