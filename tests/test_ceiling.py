"Ceilings: the S curve meets what is published, the Bayes rule meets its closed form, and a linear decoder stays below it."
import numpy as np
import pytest
from scipy.stats import norm

from synapse_nb.evaluate.ceiling import (attainable, check_pair, expected_topk, learn, log_likelihood, oracle, oracle_marginal,
                                         population, s_eff, split_half, topk)
from synapse_nb.studies.simulate import evidence, simulate_trials

SPECIFIED = {1: (.05, .155), 3.3: (.17, .40), 6: (.33, .62), 9: (.49, .77), 12: (.65, .88), 24: (.92, .99)}


@pytest.mark.parametrize("s", SPECIFIED)
def test_s_curve_table(s):
    assert abs(expected_topk(s) - SPECIFIED[s][0]) < .03 and abs(expected_topk(s, k=5) - SPECIFIED[s][1]) < .03


@pytest.mark.parametrize("pair", [(.161, .436), (.509, .797), (.632, .899), (.913, .988)])
def test_published_pairs_lie_on_the_curve(pair): assert check_pair(*pair).distance < .03


def test_s_eff_inverts_for_any_gallery():
    for n, k, s in ((2, 1, .5), (40, 5, 3.), (1000, 1, 20.)): assert abs(s_eff(expected_topk(s, n, k), n, k) / s - 1) < .02
    assert check_pair(.4, .42).on_curve is False


@pytest.fixture(scope="module")
def linear_twin():
    return simulate_trials("eeg2", 20, 3, n_test=40, test_repeats=8, snr=.34, modes=1, gain_sd=0., lapse=0., jitter=0., jitter_early=0., jitter_late=0., heavy=0., drift=0., session_noise=0.,
                           decline=0., adaptation=0., soa=2.0, nonlinear=0., products=0.)


def test_oracle_meets_the_closed_form(linear_twin):
    d, rows = linear_twin, np.arange(320)
    b, g = evidence(d["model"], d["X_test"], d["plan_test"], rows)
    drives = d["model"].drives(d["gallery"])
    score = log_likelihood(b, g, drives)
    own = score[rows, d["target"]][:, None]
    got = ((score < own).sum(1) / 39).mean()
    delta = drives[d["target"]][:, None] - drives[None]
    size = np.sqrt(np.einsum("ngk,nkl,ngl->ng", delta, g, delta))
    want = norm.cdf(size / 2)[size > 0].mean()
    assert .6 < want < .97 and abs(got - want) < .015, (got, want)


def test_wrong_evidence_is_worse(linear_twin):
    d, rows = linear_twin, np.arange(320)
    good = topk(oracle(d["model"], d["X_test"], d["plan_test"], rows, d["gallery"]), d["target"])
    rolled = topk(oracle(d["model"], np.roll(d["X_test"], 1, axis=0), d["plan_test"], rows, d["gallery"]), d["target"])
    assert good > .1 and rolled < .1


def test_order_of_ceilings_and_a_linear_decoder():
    from sklearn.linear_model import Ridge
    d = simulate_trials("meg", 1500, 4, n_test=50, test_repeats=4, snr=.6, modes=1, n_meg=60, subject_sd=0., window=(-.05, 120, 150.))
    m, rows, target = d["model"], np.arange(200), d["target"]
    args = (d["X_test"], d["plan_test"], rows, d["gallery"], d["known_test"])
    genie, quoted = topk(oracle(m, *args), target), topk(oracle_marginal(m, *args, nodes=5), target)
    pop = population(m, 80)
    post = {n: learn(m, d["X"][:n], d["plan"], np.arange(n), pop) for n in (100, 1500)}
    att = {n: topk(attainable(m, p, *args[:4]), target) for n, p in post.items()}
    flat = lambda x: (x[:, :, 15:90].reshape(len(x), 60, 15, 5).mean(-1).reshape(len(x), -1) / d["X"].std()).clip(-8, 8)
    pred = Ridge(3e3).fit(flat(d["X"]), d["z"]).predict(flat(d["X_test"]))
    linear = topk(-((pred[:, None] - d["gallery"]) ** 2).sum(-1), target)
    se = np.sqrt(.25 / 50)
    assert genie + .03 >= quoted and att[100] < att[1500] + .03 and att[1500] <= genie + .03
    assert linear <= genie + 3 * se and genie > .2, (genie, quoted, att, linear)


def test_split_half_knows_the_noise():
    r = np.random.default_rng(0)
    x = r.standard_normal((400, 3)) + 1.5 * r.standard_normal((6, 400, 3))
    assert np.allclose(split_half(x)["s"], 1 / 2.25, atol=.12) and split_half(r.standard_normal((6, 400, 3)))["s"].max() < .1


def test_previous_picture_is_still_there_at_ten_a_second():
    d = simulate_trials("eeg1", 20, 6, n_test=60, test_repeats=3, snr=.95, modes=1)
    m, plan, rows = d["model"], d["plan_test"], np.arange(1, 180)
    before = d["target"][rows - 1]
    b, g = evidence(m, d["X_test"][rows], plan, rows, latency=plan["latency"][rows - 1] - m.preset.soa, gain=plan["gain"][rows - 1])
    overlap = topk(log_likelihood(b, g, m.drives(d["gallery"])), before, 5)
    slow = simulate_trials("eeg1", 20, 6, n_test=60, test_repeats=3, snr=.95, modes=1, soa=1.5)
    b, g = evidence(m, slow["X_test"][rows], slow["plan_test"], rows, latency=plan["latency"][rows - 1] - m.preset.soa, gain=plan["gain"][rows - 1])
    alone = topk(log_likelihood(b, g, m.drives(d["gallery"])), slow["target"][rows - 1], 5)
    assert overlap > 5 / 60 + 4 * np.sqrt(.08 / 179) and alone < 5 / 60 + 4 * np.sqrt(.08 / 179), (overlap, alone)


def test_no_signal_no_score():
    d = simulate_trials("eeg2", 20, 7, n_test=50, test_repeats=4, snr=0., modes=1)
    s = oracle(d["model"], d["X_test"], d["plan_test"], np.arange(200), d["gallery"], d["known_test"])
    assert topk(s, d["target"]) == pytest.approx(1 / 50)              # every picture ties: chance, not 100 %
