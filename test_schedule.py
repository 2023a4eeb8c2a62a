"""Tests of the training loop in 4.1: what is done when, how often, and at which rates."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import dreamer
from dreamer import Agent, Config, Log, PixelEnv, ReplayBuffer, train
from test_dreamer import RUN, SMALL, D, Z, spy


def test_training_acts_and_learns_when_and_as_fast_as_it_should(tmp_path, monkeypatch):
    steps = (1_499, 1_500, 1_503, 1_504, 4_999, 5_000, 5_400)
    due = [dreamer.updates_due(Config(), step) for step in steps]
    assert due == [0, 500, 500, 501, 1_374, 1_675, 1_675]
    acted, begun, rates, behaved, fresh, batches, patch = [], [], [], [], [], [], monkeypatch
    sample = ReplayBuffer.sample

    def drawn(replay, *sizes):
        assert sizes == (3, 6)
        batches.append(sample(replay, *sizes))
        return batches[-1]

    spy(patch, Agent, "act", lambda agent, *args, **kw: acted.append((len(begun), args[1], kw)))
    spy(patch, PixelEnv, "reset", lambda env, seed: begun.append(seed))
    spy(patch, dreamer, "update_world_model", lambda agent, batch, anneal: rates.append(anneal))
    spy(patch, dreamer, "update_behavior", lambda *args: behaved.append((len(batches), *args[1:])))
    patch.setattr(ReplayBuffer, "sample", drawn)
    spy(patch, ReplayBuffer, "refresh", lambda replay, feat: fresh.append(feat))
    patch.setattr(dreamer, "evaluate", lambda *args: {})
    config = Config(**RUN | dict(seed=1, runs=str(tmp_path)))
    train(config)
    assert begun == [2_000_000 + 2 * i for i in range(6)]  # of evaluations they are odd
    assert len(acted) == 96 and all(options["explore"] for *_, options in acted)
    assert [n for n, state, _ in acted if state is None] == [1, 2, 3, 4, 5, 6]
    repeats = [bool(options["repeat"]) for *_, options in acted]
    assert not any(repeats[0::16])  # an episode's first action has none before it
    assert len(batches) == 25 and len(rates) == len(fresh) == 21
    assert not any(feat.requires_grad for feat in fresh)
    fresh += [batch["prev_feat"] for batch in batches[21:]]  # in posttrain the world model rests
    assert [n for n, *_ in behaved] == list(range(4, 26))  # not while the model is pretrained
    for n, start, anneal in behaved:  # dreams begin in every fourth state of the last batch
        assert torch.equal(start, fresh[n - 1][:, [0, 4]].reshape(6, D + Z))
        assert anneal == pytest.approx(min(1, (26 - n) / 4))
    for update, rate in enumerate(rates):
        step = next(step for step in range(97) if dreamer.updates_due(config, step) > update)
        assert rate == pytest.approx(min((update + 1) / 200, 3 * (96 - step) / 56))


def test_rates_warm_up_and_end_at_zero_the_behaviors_in_posttrain():
    expected = {
        (1_500, 0): (1 / 200, 1),
        (1_500, 198): (199 / 200, 1),
        (1_500, 499): (1, 1),
        (3_833, 1_083): (1, 1),
        (4_125, 1_156): (0.75, 1),  # the last third is of the steps after the prefill
        (4_999, 1_373): (3 / 3_500, 1),
        (5_000, 1_374): (0, 1),  # the world model rests, while 300 updates are left
        (5_007, 1_525): (0, 0.5),
        (5_007, 1_674): (0, 1 / 300),
    }
    rates = {key: dreamer.schedule(Config(), *key) for key in expected}
    assert rates == {key: pytest.approx(x) for key, x in expected.items()}
    assert dreamer.schedule(Config(posttrain=0), 5_000, 1_374) == (0, 1)


@pytest.mark.parametrize(
    "rate, spread, later", [(0.01, 0.9e-3, 0.75), (0.01, 1.1e-3, 0.02), (0, 0, 0.02)]
)
def test_how_often_actions_are_repeated(rate, spread, later, tmp_path, monkeypatch):
    """One step in 50 begins to repeat. In odd episodes three of four do so during the prefill, and
    then while the spread of dreamed returns is small. Three of four go on with it."""
    repeats = []

    def act(agent, obs, state, explore, repeat):
        repeats.append(bool(repeat))
        if len(repeats) == 8_000:  # the prefill's last step
            agent.return_range += torch.tensor([-3.0, spread - 3.0])  # percentiles of returns
        return 5, (torch.zeros(1, D + Z), None)

    monkeypatch.setattr(Agent, "act", act)
    monkeypatch.setattr(dreamer, "small_frame", lambda image: np.zeros(1))  # quicker
    for name in ("save_checkpoint", "evaluate"):
        monkeypatch.setattr(dreamer, name, lambda *args: {})
    config = SMALL | dict(env="Long-v0", steps=16_000, pretrain=0, train_ratio=0.0, posttrain=0)
    config |= dict(prefill=8_000, return_rate=rate, eval_every=16_000, runs=str(tmp_path))
    train(Config(**config))
    halves = np.reshape(repeats, (2, 400, 20))
    for half, odd in zip(halves, (0.75, later), strict=True):
        before, after = half[:, :-1], half[:, 1:]
        for i, chance in enumerate([0.02, odd]):
            begins = after[i::2][~before[i::2]]
            assert begins.mean() == pytest.approx(chance, abs=0.007 if chance < 0.1 else 0.05)
        assert after[before].mean() == pytest.approx(0.75, abs=0.06)


def test_each_row_keeps_the_state_in_which_its_action_was_chosen(tmp_path, monkeypatch):
    states, act = [], Agent.act

    def watched(agent, *args, **options):
        action, state = act(agent, *args, **options)
        states.append(state)
        return action, state

    monkeypatch.setattr(Agent, "act", watched)
    monkeypatch.setattr(dreamer, "evaluate", lambda *args: {})
    config = RUN | dict(pretrain=0, train_ratio=0.0, posttrain=0, runs=str(tmp_path))
    rows = dreamer.read_checkpoint(train(Config(**config)))["rows"]
    feat, action = map(torch.cat, zip(*states, strict=True))
    first = rows["is_first"]
    assert first.sum() == 6 and not rows["prev_feat"][first].any() and feat.any(1).all()
    assert torch.equal(rows["prev_feat"][~first], feat)
    assert torch.equal(rows["prev_action"][~first], action)


@pytest.mark.parametrize("steps", [1_600, 5_000, 160_000, 1_600_000])
def test_the_numbers_below_the_curves_do_not_touch(tmp_path, monkeypatch, steps):
    figures = []
    monkeypatch.setattr(dreamer, "Figure", Figure)  # other modules of tests draw nothing
    spy(monkeypatch, Figure, "savefig", lambda figure, *args, **kw: figures.append(figure))
    log = Log(tmp_path)
    for step in range(steps // 16, steps + 1, steps // 16):
        names = "env/return eval/return wm/recon wm/kl ac/entropy eval/reward_rho".split()
        log.write({"env/step": step} | dict.fromkeys(names, 1 + step))
    log.draw()
    for axes in figures[0].axes:
        boxes = [x.get_window_extent() for x in axes.get_xticklabels() if x.get_text()]
        shown = [x for x in boxes if axes.bbox.x0 <= (x.x0 + x.x1) / 2 <= axes.bbox.x1]
        assert len(shown) > 2 and all(a.x1 + 5 < b.x0 for a, b in pairwise(shown))
