"""Simulated studies with a known score: does the 95 % interval hold it, and does the null under drift give 5 %?"""
import numpy as np
from scipy.stats import norm

from synapse_nb.evaluate.image_quality import two_way_score
from synapse_nb.evaluate.metrics import auc, balanced_accuracy, group_score, permutation_test, top_k
from synapse_nb.evaluate.retrieval import retrieval_scores


def inside(s, truth): return s.ci_low <= truth <= s.ci_high


def one_person(seed, n_pictures=100, repeats=5, K=4, spread=4.0):
    "Balanced accuracy: classes differ in difficulty, pictures in how well they are seen, each shown several times."
    g = np.random.default_rng(seed)
    cat = np.arange(n_pictures) % K
    recall = 0.4 + 0.15 * (2 * np.arange(K) / (K - 1) - 1)
    seen = g.beta(spread * recall[cat], spread * (1 - recall[cat])) if spread else recall[cat]
    y, pic = np.repeat(cat, repeats), np.repeat(np.arange(n_pictures), repeats)
    pred = np.where(g.random(len(y)) < np.repeat(seen, repeats), y, (y + 1 + g.integers(0, K - 1, len(y))) % K)
    return inside(balanced_accuracy(y, pred, clusters=pic if repeats > 1 else None, n_perm=1), recall.mean())


def independent_trials(seed): return one_person(seed, 400, 1, spread=0)
def few_pictures(seed): return one_person(seed, 40, 4)


def runs_differ(seed, n_runs=6, n=60, d=0.6, spread=0.25):
    "AUC over runs whose effect differs."
    g = np.random.default_rng(seed)
    y, run = g.integers(0, 2, n_runs * n), np.repeat(np.arange(n_runs), n)
    s = y * (d + spread * g.normal(size=n_runs))[run] + g.normal(size=len(y))
    return inside(auc(y, s, runs=run, n_perm=1), norm.cdf(d / np.sqrt(2 + spread**2)))


def auc_trials(seed):
    g = np.random.default_rng(seed); y = g.integers(0, 2, 200)
    return inside(auc(y, 0.6 * y + g.normal(size=200), n_perm=1), norm.cdf(0.6 / np.sqrt(2)))


def group(seed, people=10, pictures=60):
    "A group: people and pictures differ."
    g = np.random.default_rng(seed)
    mean = np.clip(0.6 + 0.08 * g.normal(size=(people, 1)) + 0.12 * g.normal(size=(1, pictures)), 0, 1)
    return inside(group_score("pairwise", (g.random((people, pictures)) < mean).astype(float), 0.5, n_boot=500), 0.6)


def top_five(seed):
    g = np.random.default_rng(seed); n, K = 200, 50
    S = g.normal(size=(n, K)); t = g.integers(0, K, n); S[np.arange(n), t] += 1.5
    return inside(top_k(t, S, 5), 0.56958)


def two_way(seed, n=60, noise=1.5):
    "Two-way identification: pictures take part as target and as candidate. The truth is for cosine of 8 Gaussian features."
    g = np.random.default_rng(seed); z = g.normal(size=(n, 8))
    return inside(two_way_score(z + noise * g.normal(size=z.shape), z, similarity="cosine", n_perm=1), TWO_WAY)


TWO_WAY = 0.87958                                    # by 8e7 pairs; see `two_way_truth`


def two_way_truth(noise=1.5, n=4000, draws=5):
    from synapse_nb.evaluate.image_quality import two_way_identification
    return float(np.mean([two_way_identification((z := np.random.default_rng(10**6 + i).normal(size=(n, 8))) + noise * np.random.default_rng(10**7 + i).normal(size=(n, 8)), z, similarity="cosine").mean() for i in range(draws)]))


COVERAGE = [one_person, independent_trials, few_pictures, runs_differ, auc_trials, group, top_five, two_way]


# ---- the null: nothing of the label in the data ----
def wander(g, n_runs, n, C, drift):
    "Features that wander through the recording, labels in random order within each run."
    X = drift * np.cumsum(g.normal(size=(n_runs * n, C)), 0) / 4 + g.normal(size=(n_runs * n, C))
    return X, np.repeat(np.arange(n_runs), n), np.concatenate([g.permutation(np.arange(n) % 2) for _ in range(n_runs)])


def nearest_mean(X, y, tr, te):
    m = [X[tr & (y == k)].mean(0) for k in (0, 1)]
    return (X[te] - (m[0] + m[1]) / 2) @ (m[1] - m[0])


def held_out(seed, drift=1.0):
    "Trained on three runs, tested on three."
    X, run, y = wander(np.random.default_rng(seed), 6, 120, 8, drift); tr = run < 3
    return y[~tr], nearest_mean(X, y, tr, ~tr), run[~tr]


def null_accuracy(seed):
    y, s, run = held_out(seed)
    return balanced_accuracy(y, (s > np.median(s)).astype(int), runs=run, n_perm=199).p <= 0.05


def null_auc(seed):
    y, s, run = held_out(seed)
    return auc(y, s, runs=run, n_perm=199).p <= 0.05


def cross_auc(seed, drift=1.0):
    "Every run held out once: the frozen predictions, widened."
    X, run, y = wander(np.random.default_rng(seed), 6, 40, 8, drift); s = np.empty(len(y))
    for r in range(6): s[run == r] = nearest_mean(X, y, run != r, run == r)
    return y, s, run


def null_cross_auc(seed):
    y, s, run = cross_auc(seed)
    return auc(y, s, runs=run, folds=run, n_perm=199).p <= 0.05


def null_refitted(seed):
    "Every run held out once, refitted for each permutation."
    X, run, y = wander(np.random.default_rng(seed), 4, 30, 4, 1.0)

    def score(labels):
        s = np.empty(len(labels))
        for r in range(4): s[run == r] = nearest_mean(X, labels, run != r, run == r)
        rank = s.argsort().argsort() + 1; m = labels.sum()
        return (rank[labels == 1].sum() - m * (m + 1) / 2) / (m * (len(labels) - m))
    return permutation_test(score, y, runs=run, n_perm=99)[1] <= 0.05


def null_habits(seed):
    "No skill, but the decoder has a habit for each picture, shown eight times."
    g = np.random.default_rng(seed); y = np.repeat(g.permutation(np.arange(60) % 2), 8); pic = np.repeat(np.arange(60), 8)
    return balanced_accuracy(y, (g.random(480) < np.repeat(g.random(60), 8)).astype(int), clusters=pic, n_perm=199).p <= 0.05


def null_retrieval(seed):
    "Predictions that wander and repeat by picture, but know nothing: pairwise identification."
    g = np.random.default_rng(seed); t = g.permutation(np.repeat(np.arange(30), 3))
    pred = np.cumsum(g.normal(size=(90, 6)), 0) / 3 + g.normal(size=(30, 6))[t]
    return retrieval_scores(pred, g.normal(size=(30, 6)), t, ks=(), n_perm=199)[-1].p <= 0.05


NULL = [null_accuracy, null_auc, null_cross_auc, null_refitted, null_habits, null_retrieval]


def rate(case, n=1000, seed=0): return float(np.mean([case(seed + i) for i in range(n)]))
