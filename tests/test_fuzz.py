"""Some hundred damaged inputs of each of the ten parsers; `benchmarks/fuzz.py` runs many more."""

import pytest

from benchmarks.fuzz import main


@pytest.mark.full
def test_damaged_inputs_give_messages_only(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--number", "150", "--seed", "11"])
    table = capsys.readouterr().out
    assert code == 0, table
    assert len(table.strip().splitlines()) == 11, table
