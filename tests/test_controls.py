"What should fail in a decoding report: planted causes are found, each by its own control, and named in words."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest


class Trials:
    "Windows in memory: sensors Fp1, Fp2 know nothing, O1 knows the picture, O2 the picture before."
    ch_names, classes, sfreq = ["Fp1", "Fp2", "O1", "O2"], ["face", "house"], 100.

    def __init__(self, order, seed=0, n_runs=6, n=60):
        g, (y, run) = np.random.default_rng(seed), (np.zeros(n_runs * n, int), np.repeat(np.arange(n_runs), n))
        for r in range(n_runs): y[run == r] = g.permutation(np.arange(n) % 2) if order == "random" else np.arange(n) // (n // 2)
        before = np.where(np.r_[True, run[1:] != run[:-1]], 0, np.r_[0, y[:-1]])
        self.X = g.normal(size=(len(y), 4, 40)).astype(np.float32)
        self.X[:, 2, 15:25] += 1.5 * y[:, None]; self.X[:, 3, 15:25] += 1.5 * before[:, None]
        self.y, self.events = y, pd.DataFrame(dict(trial_id=[f"t{i}" for i in range(len(y))], subject="01", run=run.astype(str), onset=np.arange(len(y)) * 1., image=""))

    def __len__(self): return len(self.y)
    def arrays(self): return self.X, self.y

    def part(self, keep):
        out = object.__new__(Trials); out.X, out.y, out.events = self.X[keep], self.y[keep], self.events[keep].reset_index(drop=True)
        return out


@pytest.fixture
def controls(monkeypatch):
    from synapse_nb.train import decoding

    def run(order):
        w = Trials(order); test = (w.events["run"].astype(int) >= 4).to_numpy()
        monkeypatch.setattr(decoding, "_each_split", lambda *a: [("01", None, w)]); monkeypatch.setattr(decoding, "_sides", lambda *a: {"train": w.part(~test), "test": w.part(test)})
        return decoding.decode_controls(None, {}, decoding.DecodeConf(), "eeg").set_index("control")
    return run


def test_each_control_finds_its_own_cause(controls):
    t = controls("random")
    for name in ("as it is", "the picture before"): assert t.loc[name, "ci_low"] > .8, t
    for name in ("labels shuffled in each run", "trained on the label before"): assert t.loc[name, "p"] > .01 and t.loc[name, "expected"] == "chance", t
    assert t.loc["electrodes at the eyes alone", "ci_low"] < .5 < t.loc["electrodes at the eyes alone", "ci_high"], t
    assert t.loc["the picture before", "n"] == t.loc["as it is", "n"] - 2                  # a run's first picture has none before it


def test_blocks_are_told_by_the_label_before_and_named(controls, monkeypatch):
    from synapse_nb.train import recipes
    t = controls("blocks").reset_index()
    assert t.set_index("control").loc["trained on the label before", "p"] < .01
    said, ready = [], SimpleNamespace(stores={"eeg": None})
    for table in (t, controls("random").reset_index()):
        monkeypatch.setattr(recipes, "decode_controls", lambda *a, table=table: table)
        recipes.controls_section(SimpleNamespace(section=lambda *parts: said.append(parts)), ready, {}, None)
    assert "‘trained on the label before’" in said[0][1] and "order" in said[0][1]
    assert "Nothing is found" in said[1][1]
