"The simulated study: the same twice, readable by others, its clocks and amplitudes as planted, and nothing to decode where nothing was put."
import warnings

import mne
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError, file_hash
from synapse_nb.stimuli.images import load_pictures, make_pictures
from synapse_nb.studies.simulate import (PRESETS, add_sensors, get_preset, load_truth, make_person, make_schedule, regressors,
                                         simulate_run, simulate_study)

mne.set_log_level("error")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("simulated") / "study"
    return simulate_study(root, n_subjects=1, quick=True, seed=11, progress=False)


def stem(study, modality, run="01"): return study.root / f"sub-01/ses-01/{modality}/sub-01_ses-01_task-pictures_run-{run}"
def key(modality, run="01"): return f"sub-01_ses-01_task-pictures_run-{run}_{modality}"


def open_raw(study, modality, run="01"):
    s = stem(study, modality, run)
    if modality == "meg": return mne.io.read_raw_fif(f"{s}_meg.fif", preload=True)
    return mne.io.read_raw_brainvision(f"{s}_eeg.vhdr", preload=True)


def test_same_seed_same_study(study, tmp_path):
    again = simulate_study(tmp_path / "b", n_subjects=1, quick=True, seed=11, modalities=("eeg",), progress=False)
    for end in ("eeg.eeg", "eeg.vmrk", "events.tsv"):
        assert file_hash(f"{stem(study, 'eeg')}_{end}") == file_hash(f"{stem(again, 'eeg')}_{end}")
    other = simulate_study(tmp_path / "c", n_subjects=1, quick=True, seed=12, modalities=("eeg",), progress=False)
    assert file_hash(f"{stem(study, 'eeg')}_eeg.eeg") != file_hash(f"{stem(other, 'eeg')}_eeg.eeg")


def test_interrupted_study_goes_on(study, tmp_path, monkeypatch):
    import synapse_nb.studies.simulate as sim
    real, n = sim.simulate_run, []

    def stop(*a, **k):
        n.append(1)
        if len(n) == 2: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(sim, "simulate_run", stop)
    with pytest.raises(KeyboardInterrupt): simulate_study(tmp_path / "x", n_subjects=1, quick=True, seed=11, modalities=("eeg",), progress=False)
    with pytest.raises(SynapseError): load_truth(tmp_path / "x")
    monkeypatch.setattr(sim, "simulate_run", lambda *a, **k: n.append(1) or real(*a, **k))
    done = simulate_study(tmp_path / "x", n_subjects=1, quick=True, seed=11, modalities=("eeg",), progress=False)
    assert len(n) == 3 and file_hash(f"{stem(done, 'eeg', '02')}_eeg.eeg") == file_hash(f"{stem(study, 'eeg', '02')}_eeg.eeg")
    with pytest.raises(SynapseError, match="another study"): simulate_study(tmp_path / "x", n_subjects=1, quick=True, seed=12, progress=False)


@pytest.mark.parametrize("modality", ["meg", "eeg"])
def test_photodiode_shows_the_planted_clock(study, modality):
    raw, run = open_raw(study, modality), study.runs[key(modality)]
    ev = pd.read_csv(f"{stem(study, modality)}_events.tsv", sep="\t")
    light, fs = raw.get_data("photodiode")[0], raw.info["sfreq"]
    shown, seen = ev.onset[ev.trial_type != "catch"].to_numpy(), []
    for t in shown:
        at = int((run["offset"] + t) * fs)
        seen.append(at / fs + np.interp(.11, light[at:at + 40], np.arange(40) / fs))
    slope, lag = np.polyfit(shown, seen, 1)
    assert abs((slope - 1) * 1e6 - run["drift_ppm"]) < 15                 # 40 s of recording say no more
    assert abs(np.median(np.array(seen) - run["offset"] - (1 + run["drift_ppm"] * 1e-6) * shown) - run["delay"]) < 3e-4


def test_triggers_and_lost_pulses(study):
    ev = pd.read_csv(f"{stem(study, 'meg', '02')}_events.tsv", sep="\t")
    found = mne.find_events(open_raw(study, "meg", "02"), "STI 014", shortest_event=1)
    lost = study.runs[key("meg", "02")]["lost_digital"]
    assert list(found[:, 2]) == list(np.delete(ev.value.to_numpy(), lost))
    assert {"exp", "test", "catch"} == set(ev.trial_type)


def test_amplitudes_are_those_of_recordings(study):
    meg, eeg = open_raw(study, "meg"), open_raw(study, "eeg")
    assert set(meg.get_channel_types()) == {"mag", "stim", "misc"} and len(mne.pick_types(meg.info, meg="mag")) == 160
    m = np.median(meg.filter(.5, 40, picks="mag").get_data("mag").std(1))
    e = np.median(eeg.set_eeg_reference("average").filter(.5, 40).get_data("eeg").std(1))
    assert 5e-14 < m < 5e-13 and 3e-6 < e < 2e-5


def test_bids_readers_open_it(study):
    mne_bids = pytest.importorskip("mne_bids")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for modality in ("meg", "eeg"):
            p = mne_bids.BIDSPath(subject="01", session="01", task="pictures", run="01", datatype=modality, root=study.root)
            raw = mne_bids.read_raw_bids(p, verbose="error")
            bad = study.runs[key(modality)]["bad"]
            assert raw.info["bads"] == [raw.ch_names[bad]] and raw.get_montage() is not None


def test_pictures_are_split(study):
    pics = load_pictures(study.root / "stimuli")
    shown = pd.concat([pd.read_csv(f"{stem(study, 'meg', r)}_events.tsv", sep="\t", keep_default_na=False) for r in ("01", "02")])
    train, test = (set(shown.stim_file[shown.trial_type == k]) for k in ("exp", "test"))
    assert not train & test and test == set(study.test_images) and (train | test) == set(pics.table.image)


def lda_accuracy(seed, **changes):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    preset = get_preset("easy", n_runs=1, **changes)
    pics = make_pictures(60, seed)
    person = add_sensors(make_person(preset, seed, "sub-01", np.cov(regressors(pics.features).T)), preset, seed, "meg")
    is_test = np.arange(len(pics)) % 60 >= 30
    plan = make_schedule(preset, seed, "sub-01", "meg", pics.table[~is_test], pics.table[is_test], 1, 1)["01"]
    z = np.array([pics.features[pics.row(i)] if i else np.full(64, np.nan) for i in plan.image])
    x, t = simulate_run(preset, seed, person, "meg", "01", plan, z)
    x = np.delete(x, t["bad"], 0)[::2]
    bins = np.stack([x[:, int(o * 500) - 50:int(o * 500) + 250].reshape(len(x), 15, 20).mean(-1) for o in t["onset"]])   # 40 ms: no mains
    X = (bins[:, :, 3:] - bins[:, :, :2].mean(-1, keepdims=True)).reshape(len(bins), -1)
    X = np.clip(X / np.median(np.abs(X)), -20, 20)
    a, b = (plan.trial_type == k for k in ("exp", "test"))
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=.5)
    X = X @ np.linalg.svd(X[a], full_matrices=False)[2][:120].T
    return (lda.fit(X[a], plan.category[a]).predict(X[b]) == plan.category[b]).mean(), int(b.sum())


def test_signal_decodes_and_no_signal_does_not():
    acc, n = lda_accuracy(0)
    zero, _ = lda_accuracy(0, snr=0.)
    sd = np.sqrt(.125 * .875 / n)
    assert acc > .125 + 5 * sd and abs(zero - .125) < 3.3 * sd, (acc, zero)


def test_presets_refuse_what_they_do_not_know():
    with pytest.raises(SynapseError, match="easy"): get_preset("esay")
    with pytest.raises(SynapseError, match="snr"): get_preset("easy", snrr=1)
    assert set(PRESETS) == {"easy", "meg", "eeg1", "eeg2", "film"}


def test_block_order_makes_drift_decode_the_category():
    "The data flaw of block designs: near perfect when trials are split at random, chance when runs are."
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    preset, pics = get_preset("easy", order="block", n_runs=4, soa=.6, snr=0., catch=0.), make_pictures(24, 5)
    person = add_sensors(make_person(preset, 5, "sub-01", np.cov(regressors(pics.features).T)), preset, 5, "eeg")
    plan = make_schedule(preset, 5, "sub-01", "eeg", pics.table, pics.table.iloc[:0], 4, 0)
    X, y, run = [], [], []
    for k, d in plan.items():
        order = {c: (i * 3 + int(k) * 5) % 8 for i, c in enumerate(sorted(set(d.category)))}         # other blocks order in every run
        d = d.assign(o=d.category.map(order)).sort_values("o", kind="stable").assign(onset=np.sort(d.onset)).reset_index(drop=True)
        x, t = simulate_run(preset, 5, person, "eeg", k, d, np.array([pics.features[pics.row(i)] for i in d.image]))
        x = np.delete(x, t["bad"], 0)
        X += [x[:, int(o * 500):int(o * 500) + 250].mean(1) for o in t["onset"]]
        y += d.category.tolist()
        run += [k] * len(d)
    X, y, run = np.array(X) * 1e6, np.array(y), np.array(run)
    lda, acc = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-3), []
    for k in sorted(set(run)): acc.append((lda.fit(X[run != k], y[run != k]).predict(X[run == k]) == y[run == k]).mean())
    leaky = []
    for k in sorted(set(run)):
        i = np.flatnonzero(run == k)
        a, b = i[::2], i[1::2]
        leaky.append((lda.fit(X[a], y[a]).predict(X[b]) == y[b]).mean())
    assert np.mean(leaky) > .9 and np.mean(acc) < .3, (leaky, acc)


def test_gaze_is_seen_at_the_front():
    pics = make_pictures(6, 2)
    cov = np.cov(regressors(pics.features).T)
    for eye, k in ((0., 32), (.15, 33)):
        preset = get_preset("easy", eye=eye)
        p = add_sensors(make_person(preset, 2, "sub-01", cov), preset, 2, "eeg")
        assert p.patterns["eeg"].shape == (63, k) == (63, len(p.w))
    from synapse_nb.studies.simulate import EEG_NAMES
    strong = np.array(EEG_NAMES)[np.argsort(-np.abs(p.patterns["eeg"][:, -1]))[:12]]
    assert sum(n.startswith(("AF", "Fp", "F")) for n in strong) >= 9, strong


def test_a_second_of_film_is_worth_three_pictures():
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from _study import film_second
    assert PRESETS["film"].version == "1" and 2.2 < film_second(range(300, 306)) < 4           # set to 3 on other people (500-503)


def two_way(d, step=5):
    "Two-way identification of single trials by ridge, and its probability when pictures are exchanged."
    from synapse_nb.evaluate.ceiling import ranks
    flat = lambda x: x[..., :x.shape[-1] // step * step].reshape(*x.shape[:2], -1, step).mean(-1).reshape(len(x), -1)
    A, B = flat(d["X"]), flat(d["X_test"]); mean, sd = A.mean(0), A.std()
    A, B = ((x - mean).clip(-6 * sd, 6 * sd) / sd for x in (A, B)); z = d["z"] - d["z"].mean(0)
    C = A.T @ A; out = B @ np.linalg.solve(C + .3 * np.trace(C) / len(C) * np.eye(len(C)), A.T @ z)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    similar = unit(out) @ unit(d["gallery"] - d["z"].mean(0)).T; g, n = np.random.default_rng(0), len(d["gallery"])
    value = lambda target: 1 - ranks(similar, target).mean() / (n - 1)
    own, null = value(d["target"]), [value(g.permutation(n)[d["target"]]) for _ in range(199)]
    return own, (1 + sum(v >= own for v in null)) / 200


@pytest.fixture(scope="module")
def rapid():
    from synapse_nb.studies.simulate import simulate_trials
    return simulate_trials("eeg1", 1500, 6, n_test=60, test_repeats=6, snr=.95, window=(-.1, 100, 100.))


def test_controls_of_a_run(rapid):
    from synapse_nb.studies.simulate import controls
    own, p = two_way(rapid); found = {k: two_way(c) for k, c in controls(rapid)}
    assert own > .55 and p < .02, (own, p)
    for k in ("shuffled", "no signal"): assert found[k][0] < own - .03 and found[k][1] > .02, (k, found)
    assert found["shifted"][0] < own - .03, found
    assert found["previous"][0] > .52 and found["previous"][1] < .05, found         # at ten a second the picture before is still there
    assert found["eyes"][0] < own


@pytest.mark.slow
def test_no_signal_gives_uniform_p():
    "200 studies without any response: every p is as probable as another."
    from scipy.stats import kstest
    from synapse_nb.studies.simulate import simulate_trials
    p = [two_way(simulate_trials("easy", 120, s, n_test=30, test_repeats=2, snr=0., session_noise=0., n_meg=24, window=(0., 40, 100.)))[1] for s in range(200)]
    assert kstest(np.array(p) - np.random.default_rng(0).uniform(0, 1 / 200, 200), "uniform").pvalue > .01 and .01 <= np.mean(np.array(p) <= .05) <= .10
