"""The example of a language model runs, draws, and pays for what it says that it pays for."""

import numpy as np
import pytest
import torch
from helpers.scripts import EXAMPLES, load_script
from matplotlib.image import imread


@pytest.fixture
def example():
    threads = torch.get_num_threads()
    yield load_script(EXAMPLES / "grpo_text.py")
    torch.set_num_threads(threads)


def test_runs_and_draws(example, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    sizes = ["--seconds", "0.1", "--pretraining", "5", "--groups", "4", "--size", "4"]
    example.main([*sizes, "--figure", str(picture)])
    assert imread(picture).std() > 0.01  # not blank
    printed = capsys.readouterr().out
    assert printed.count("sorted in the last tenth") == 4
    assert str(picture) in printed


def test_rewards_and_advantages(example):
    torch.manual_seed(0)
    model = example.Transformer()
    example.pretrain(model, 30)
    # Answers that repeat a digit five times are sorted for prompts of that digit alone.
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-1e3)
        model.head.bias[7] = 0.0
    batch = example.draw_answers(model, 3, 4)
    assert (batch.answer == 7).all()
    assert batch.success == 0.0
    assert not batch.advantage.any()
    example.prompts = lambda n: torch.tensor([[7] * 5 + [10]]).expand(n, -1)
    assert example.draw_answers(model, 3, 4).success == 1.0


def test_old_probabilities_are_those_of_the_update(example):
    """The tokens drawn one by one have the probabilities that the whole line gives them: the ratio begins at 1."""
    torch.manual_seed(0)
    model = example.Transformer()
    batch = example.draw_answers(model, 3, 4)
    log_prob = torch.distributions.Categorical(logits=model.answers(batch.line)).log_prob(
        batch.answer
    )
    torch.testing.assert_close(log_prob, batch.old_log_prob, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_natural_steps_keep_their_bound_and_learn(example):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = example.Transformer()
    example.pretrain(start, 600)
    before = example.draw_answers(start, 100, 8).success
    rows = np.array(list(example.train(start, example.natural(0.03), 12.0, 32, 8)))
    assert rows[:, 3].max() <= 0.03 * (1 + 1e-3)
    assert rows[-5:, 2].mean() > before + 0.3
