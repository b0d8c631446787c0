"""The comparison of warm starts: its page, and its refusal of a folder in use. The documents' commands run the rest."""

from __future__ import annotations

import pytest

from bench.warm_start import PHASES, PUBLISHED, SOFT, TEXT, main, page


def test_the_page_has_means_and_each_seed():
    def result(seed: int, rate: float) -> dict:
        rates = {TEXT: {2: rate, 10: 0.1}, SOFT: {2: 0.5, 10: 0.6}, PUBLISHED: {2: 0.7, 10: 0.8}}
        return {"seed": seed, "pass_at_1": rates, "read_back": {phase: [[1, 0.25], [9, 0.75]] for phase in PHASES}}

    record = {
        "results": [result(3, 0.2), result(4, 0.4)],
        "steps": {"sft_steps": 9},
        "held_out": 50,
        "seconds": 61.0,
        "environment": {"device": "some processor"},
    }
    lines = page(record).splitlines()
    assert "Seeds 3, 4; sft_steps 9." in lines
    assert f"| {TEXT} | 0.300 (0.200, 0.400) | 0.100 (0.100, 0.100) |" in lines
    assert "| union | 0.250, 0.250 | 0.750, 0.750 |" in lines


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        main(["--out", str(tmp_path)])
    assert error.value.code == 2
    assert "is not empty" in capsys.readouterr().err
