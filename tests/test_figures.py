"""Figures: drawn wherever matplotlib is, whatever backend the process has chosen, and without it."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from report.figures import prediction_figure


def test_the_figure_is_a_png_with_and_without_truth(tmp_path):
    pytest.importorskip("matplotlib")
    vel = np.full((70, 70), 2000, np.float32)
    prediction_figure(
        tmp_path / "f.png", [("a", np.zeros((5, 1000, 70)), None, vel), ("b", np.ones((5, 9, 70)), vel, vel)]
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    prediction_figure(tmp_path / "f.png", [])
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "tkagg"])
def test_any_backend_named_by_the_environment_draws(tmp_path, backend, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", backend)
    program = (
        "import sys\n"
        "import numpy as np\n"
        "from report.figures import prediction_figure\n"
        "map_ = np.full((70, 70), 2000.0)\n"
        "prediction_figure(sys.argv[1], [('a', np.ones((5, 9, 70)), map_, map_)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "f.png"], cwd=ROOT, check=True)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
