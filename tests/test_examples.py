"""The examples run and draw."""

import re

import torch

from examples import invert_one_gather, simulate_and_gradient, train_tiny_network


def test_the_gradient_example_draws(tmp_path, capsys):
    simulate_and_gradient.main([str(tmp_path / "gradient.png")])
    assert (tmp_path / "gradient.png").stat().st_size > 10_000
    misfit = float(re.search(r"([\d.]+)%", capsys.readouterr().out)[1])
    assert 0.1 < misfit < 20


def test_the_inversion_example_draws_and_comes_nearer(tmp_path, capsys):
    invert_one_gather.main([str(tmp_path / "inversion.png")], minutes=2.0)
    assert (tmp_path / "inversion.png").stat().st_size > 10_000
    before, after = map(float, re.search(r"error ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())
    assert after < 0.5 * before


def test_the_training_example_learns(tmp_path):
    loss = train_tiny_network.main([str(tmp_path / "network.png")], n_maps=8, n_steps=30)
    assert (tmp_path / "network.png").stat().st_size > 10_000
    assert loss < 450  # untrained: 700 and more


def test_examples_leave_the_number_of_threads_alone():
    assert torch.get_num_threads() == 1
