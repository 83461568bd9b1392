import json
import mmap

import pytest

import bench
from benchmarks import data_speed as bench_data


def test_every_contender_gets_a_row_and_its_rate_over_sequential_reading(tmp_path, capsys):
    words = ["data", "--files=2", "--samples=8", "--batch_size=4", "--workers=1,2", "--processes=1"]
    words += ["--repeats=1", "--cold=1", f"--folder={tmp_path}", f"--json={tmp_path / 'result.json'}"]
    bench.main(words)
    names = ["sequential", "batchwise", "memmap", "loader 1", "loader 2", "processes 1"]
    rows = capsys.readouterr().out.splitlines()
    assert "16 samples of 1.42 MB" in rows[0] and [row[:14].strip() for row in rows[2:]] == names
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["who"] for row in result["rows"]] == names
    for row in result["rows"]:
        for state in ("cold", "warm"):
            took, base = (result["times_s"][name][state][0] for name in (row["who"], "sequential"))
            assert row[state]["ratio"] == pytest.approx(base / took)
            assert row[state]["samples_per_s"] == pytest.approx(16 / took)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # the files made are gone


def test_the_soak_reads_as_many_samples_as_asked_and_shows_the_memory(tmp_path, capsys):
    bench.main(
        [
            "data",
            "--files=1",
            "--samples=8",
            "--batch_size=4",
            "--soak=20",
            "--workers=2",
            f"--folder={tmp_path}",
        ]
    )
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("2 workers, batches of 5.7 MB") and rows[-1].startswith(
        "      24 samples: USS "
    )


def test_own_memory_counts_what_is_written_to():
    before = bench_data.own_memory()
    held = mmap.mmap(
        -1, 30_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # not from the heap, where other tests left room
    for page in range(0, len(held), 4096):
        held[page] = 1
    after = bench_data.own_memory()
    assert all(20e6 < b - a < 40e6 for a, b in zip(before, after, strict=True)) and len(held)
