"""Every study's folder in its owner's format, written, prepared, and asked trial by trial which trial it is: 100 % of them must know."""
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.store import open_store
from synapse_nb.studies.instances import WRITERS, read_bars, read_numbers, write_instance
from synapse_nb.studies.prepare import prepare
from synapse_nb.studies.study import get_study

# study: (options of the reader, options of the writer, pipeline, channel that spells, step, length at the store's rate)
CASES = {
    "things_eeg": ({"excluded": True}, {}, "clamp(1)", "Oz", 5e-7, 60),
    "things_meg": ({}, {"n": 14, "n_sensors": 272}, "pick(mag)", "MLC11-1609", 1e-13, 480),
    "things_meg_epochs": ({}, {}, "clamp(1000)", "MLC11-1609", 1e-15, 200),
    "things_eeg2": ({}, {}, "pick(eeg)", "Fp1", 2e-7, 100),
    "movie": ({"rows": "pulse"}, {"drama": 40, "sound": False}, "pick(mag)", 0, 1e-13, 40),
    "god": ({}, {}, "pick(mag)", 0, 1e-13, 300),
    "n170": ({}, {}, "clamp(1)", "TP10", 1e-5, 64),
    "stories": ({}, {}, "pick(mag)", "MEG0111", 1e-13, 900),
    "tones": ({}, {}, "pick(mag)", "MEG0111", 1e-13, 150),
}


@pytest.fixture(scope="session")
def instance(tmp_path_factory):
    "Instances, prepared, each made once: name -> (folder, truth, prepared)."
    made = {}
    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name); options, size, pipeline, *_ = CASES[name]
            truth = write_instance(name, root / "in", **size); study = get_study(name, root / "in", **options)
            bad = name == "n170"                                                             # one of its files has one single marker, and must say so
            if bad:
                with pytest.raises(SynapseError, match="one single marker"): study.check()
            else: study.check()
            made[name] = (root, truth, prepare(study, root / "store", pipeline, progress=False, skip_errors=bad))
        return made[name]
    return make


def mine(truth, key):
    "The truth of one recording of the store: the truth's words all occur in its key."
    for r in truth.recording.unique():
        if set(r.split("_")) <= set(key.split("_")): return truth[truth.recording == r].set_index("number")
    raise AssertionError(key)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_trial_carries_its_own_label(instance, name):
    _, truth, ready = instance(name); _, _, _, channel, step, length = CASES[name]; trials = 0
    for p in ready:
        if name == "stories" and "run-2" in p.key: continue                                  # its table is empty: below
        s = open_store(p.path); ev = s.events
        if name == "movie": ev = ev[ev.trial_type == "drama"]
        t = mine(truth, p.key if name != "things_meg_epochs" else "sub-BIGMEG1"); column = channel if isinstance(channel, int) else s.ch_names.index(channel)
        said = read_numbers(s.data[:, column], ev["sample"], step, length); row = t.loc[said]
        assert len(set(said)) == len(said) and ev.trial_id.is_unique
        if name == "movie": assert ev.frame.tolist() == row.frame.tolist()
        elif name == "things_meg_epochs": assert ev.concept.tolist() == row.concept.tolist()
        elif name not in ("stories", "tones", "n170"): assert ev.image.tolist() == row.image.tolist() and ev.concept.tolist() == row.concept.tolist()
        if name == "n170": assert ev.category.tolist() == row.category.tolist()
        elif name not in ("movie", "stories"): assert ev.trial_type.tolist() == row.kind.tolist()
        kept = t[~t.kind.isin(["catch", "target"])]
        assert sorted(said) == sorted(kept.index) and not row.kind.isin(["catch", "target"]).any()   # all of them, and none that was no trial
        trials += len(said)
    assert trials == {"stories": 30}.get(name, (~truth.kind.isin(["catch", "target"])).sum())


def test_instances_hold_catch_and_target_trials(instance):
    for name, kind in (("things_eeg", "target"), ("things_meg", "catch"), ("things_meg_epochs", "catch"), ("things_eeg2", "target")):
        assert (instance(name)[1].kind == kind).sum() >= 2, name


def test_every_study_has_an_instance():
    from synapse_nb.studies.study import list_studies
    assert set(list_studies()) - {"bids", "folder", "simulated", "things_eeg2_epochs", "p300", "left_right", "ssvep"} == set(WRITERS) == set(CASES)


def test_writers_import_no_reader(repo):
    for module in ("formats", "instances"):
        text = (repo / "synapse_nb" / "studies" / f"{module}.py").read_text()
        inside = [s for s in text.splitlines() if "import" in s and ("from ." in s or "synapse_nb" in s)]
        assert all("core" in s or ".formats" in s for s in inside), inside


# ---- THINGS --------------------------------------------------------------------------------------------------------------------------

def test_things_eeg_units_and_missing_columns(instance):
    root, truth, ready = instance("things_eeg")
    assert {p.subject for p in ready} == {"01", "02", "03", "04"} and {r.subject for r in get_study("things_eeg", root / "in").find_recordings()} == {"02", "03", "04"}
    for p in ready:
        ev = open_store(p.path).events; t = mine(truth, p.key)
        assert np.allclose(ev.duration, 0.05) and (ev.trial_type == "test").sum() == (t.kind == "test").sum()
        labels = {"aardvark": "animal", "bat1": "", "bat2": "", "zebra": "animal", "jar": "container", "t-shirt": "clothing", "ice_cream": "dessert", "ice-cream_cone": "dessert", "ice_cube": "food", "wheel": ""}
        assert all(c == labels[k] for c, k in zip(ev.category, ev.concept) if k in labels)


def test_things_meg_is_ctf_and_drops_the_silent_sensor(instance):
    _, truth, ready = instance("things_meg")
    for p in ready:
        s = open_store(p.path); t = mine(truth, p.key)
        assert p.n_channels == 271 and not [c for c in s.ch_names if c.startswith("MRO11")] and s.sfreq == 1200 and set(s.ch_types) == {"mag"}
        err = s.events.onset.to_numpy() - t.onset[~t.kind.isin(["catch"])].to_numpy()
        assert np.abs(err).max() < (1e-3 if "BIGMEG1" in p.key else .13)                       # optical: on the picture; scheduled: as planned
    assert any("BIGMEG2" in p.key for p in ready)


def test_the_light_sensor_corrects_a_plan(instance, tmp_path):
    root, truth, _ = instance("things_meg")
    study = get_study("things_meg", root / "in", optical="UADC016-1609", keep_catch=True)
    p, = prepare(study, tmp_path, "pick(mag)", subjects="BIGMEG2", progress=False)
    ev = open_store(p.path).events; t = mine(truth, p.key).reindex(ev.trial_id.str[-4:].astype(int)); seen = (t.kind != "catch").to_numpy()
    assert p.alignment["source"] == "photodiode" and np.abs(ev.onset.to_numpy() - t.onset.to_numpy())[seen].max() < 2e-3


def test_epochs_without_their_header_or_with_it(instance):
    root, truth, _ = instance("things_meg_epochs"); f = root / "in" / "image_concept_index.csv"; text = f.read_text()
    want = get_study("things_meg_epochs", root / "in"); ev = want.read_events(want.find_recordings()[0])
    f.write_text("concept\n" + text)
    try: got = get_study("things_meg_epochs", root / "in"); assert got.read_events(got.find_recordings()[0]).concept.tolist() == ev.concept.tolist()
    finally: f.write_text(text)


def test_eeg2_arrays_keep_their_repeats(instance, tmp_path):
    root, _, ready = instance("things_eeg2")
    study = get_study("things_eeg2_epochs", root / "in", channels="eeg17", block=4); counts = study.check()
    assert sum(v for k, v in counts.items() if "training" in k) == 6 * 4 and sum(v for k, v in counts.items() if "test" in k) == 2 * 80
    for p in prepare(study, tmp_path, "clamp(1e9)", progress=False):
        s = open_store(p.path); said = read_numbers(s.data[:, s.ch_names.index("Oz")], s.events["sample"], 1., 180)
        assert (said == 100 * (s.events.image_number - 1) + s.events["repeat"]).all() and p.n_channels == 17 and s.sfreq == 250
    assert all("n_averaged" not in open_store(p.path).events for p in ready)


def test_eeg2_says_what_is_missing_or_wrong(instance, tmp_path):
    import shutil
    root = tmp_path / "in"; shutil.copytree(instance("things_eeg2")[0] / "in", root); (root / "preprocessed_data_250Hz" / "sub-01" / "preprocessed_eeg_test.npy").unlink()
    f = root / "sub-01" / "ses-02" / "raw_eeg_test.npy"; d = np.load(f, allow_pickle=True).item(); stim = d["raw_eeg_data"][-1]; first = np.flatnonzero(stim == 1)[0]
    stim[first] = 2; np.save(f, d, allow_pickle=True)
    with pytest.raises(SynapseError, match="subject 01: picture 'yak0/yak0_01b.jpg' was shown 79 times in the test part, not 80"): get_study("things_eeg2", root).check()
    stim[first] = 77; np.save(f, d, allow_pickle=True)
    with pytest.raises(SynapseError, match="ses-02/raw_eeg_test.npy, sample .*: code 77"): get_study("things_eeg2", root).check()
    with pytest.raises(SynapseError, match="no channel 'Q9'"): s = get_study("things_eeg2", root, channels=["Q9"]); s.read_raw(s.find_recordings()[0])
    f.write_bytes(f.read_bytes()[:5000])
    with pytest.raises(SynapseError, match="raw_eeg_test.npy cannot be read.*fetch it again"): s = get_study("things_eeg2", root); s.read_raw(s.find_recordings()[3])
    (root / "image_metadata.npy").unlink()
    with pytest.raises(SynapseError, match="neither image_metadata.npy nor"): get_study("things_eeg2", root)


def test_eeg2_whitening_and_averages_stay_on_their_side(instance):
    from synapse_nb.data.augment import AveragedWindows
    from synapse_nb.data.splits import check_split, published_test
    from synapse_nb.data.windows import Windows, fit_whitener
    from synapse_nb.studies.things_eeg2 import session_whitener
    win = Windows([p.path for p in instance("things_eeg2")[2]], tmin=0, tmax=.18, labels="concept", picks="eeg17")
    split = published_test(win.events, val=0); w = session_whitener(win, split); means = AveragedWindows(win.subset(split.test), None)
    check_split(split, win.events, [w, means])
    assert sorted(w.matrices) == [f"01/{k:02d}" for k in (1, 2, 3, 4)] and means.events.n_averaged.tolist() == [80, 80] and win.n_chans == 17
    with pytest.raises(SynapseError, match="leak.*whitening"): check_split(split, win.events, [fit_whitener(win)])
    with pytest.raises(SynapseError, match="leak.*averages"): check_split(split, win.events, [{"kind": "averaged", "name": "all repeats", "made_from": ((split.train[0], split.test[0]),)}])
    test_only = Windows([p.path for p in instance("things_eeg2")[2] if "ses-01" not in p.key or "test" in p.key], tmin=0, tmax=.18, labels="concept")
    with pytest.raises(SynapseError, match="Session 01/01 has no training trial"): session_whitener(test_only, published_test(test_only.events, val=0))


# ---- films ---------------------------------------------------------------------------------------------------------------------------

def test_films_in_both_modes(instance, tmp_path):
    from synapse_nb.data.windows import Windows
    from synapse_nb.studies.films import film_frames
    root, truth, ready = instance("movie"); study = get_study("movie", root / "in"); recs = study.find_recordings()
    assert [r.key for r in recs] == ["sub-01_video-02_part-1_meg", "sub-01_video-02_part-2_meg", "sub-01_video-08_part-4_meg", "sub-01_video-10_part-1_meg"]
    ev = pd.concat([study.read_events(r) for r in recs]); n = {"v02p1": 14, "v10p1": 12}
    for ses, per in n.items(): assert np.diff(ev[ev.session == ses].frame).tolist() == [2 * per] * (40 // per - 1)
    alone = Windows([p.path for p in ready], tmin=-.1, tmax=.3, labels=None, picks=["MEG 001", "MEG 030"]); assert len(alone) > 100
    frames = film_frames(study, ev, tmp_path, (32, 96)); both = Windows([p.path for p in ready], events=ev, tmin=-.1, tmax=.3, labels=None, picks=["MEG 001", "MEG 030"], beside={"frame": frames})
    b = both.__getitems__(range(len(both))); assert read_bars(b["frame"].numpy()).tolist() == both.events.frame.tolist()
    said = np.round((b["x"][:, 0, 110:130].mean(1) / 1e-13).numpy()).astype(int) - 1                    # the window and the frame beside it say the same pulse
    for i, row in enumerate(both.events.itertuples()):
        t = truth[(truth.recording == row.trial_id.rsplit("_meg", 1)[0]) & (truth.number == said[i])]; assert t.frame.tolist() == [row.frame]
    assert list(tmp_path.glob("frames_*.npy")) and len(film_frames(study, ev, tmp_path, (32, 96))) == ev.image.nunique() and len(list(tmp_path.glob("frames_*.npy"))) == 1


def test_films_dead_sensors_trailer_and_photodiode(instance):
    root, _, ready = instance("movie"); s = {p.key.split("_meg")[0]: open_store(p.path) for p in ready}
    assert s["sub-01_video-08_part-4"].bads == [f"MEG {i:03d}" for i in range(13, 23)] and not s["sub-01_video-02_part-1"].bads
    assert s["sub-01_video-02_part-2"].events.trial_type.value_counts().to_dict() == {"trailer": 300, "drama": 40, "black": 10} and (s["sub-01_video-02_part-1"].events.trial_type == "trailer").sum() == 0
    assert set(s["sub-01_video-10_part-1"].events.onset_source) == {"photodiode"} and set(s["sub-01_video-02_part-1"].events.onset_source) == {"digital"}


def test_a_swapped_film_and_a_cut_recording_are_named(instance, tmp_path):
    import shutil
    root = tmp_path / "in"; (root / "sbj01").mkdir(parents=True); shutil.copy(instance("movie")[0] / "in" / "sbj01" / "sbj01_ID02_part1.con", root / "sbj01" / "sbj01_ID02_part3.con")
    study = get_study("movie", root)
    with pytest.raises(SynapseError, match="sbj01_ID02_part3.con: the id pulses say video 2 part 1, not video 2 part 3"): study.check()
    shutil.move(root / "sbj01" / "sbj01_ID02_part3.con", root / "sbj01" / "x.con"); (root / "exceptions.tsv").write_text("subject\tvideo\tpart\twhat\n01\t2\t1\tskip\n")
    assert get_study("movie", root).find_recordings() == []
    (root / "exceptions.tsv").write_text("subject\tvideo\tpart\twhat\n01\t2\t1\tbroken\n")
    with pytest.raises(SynapseError, match="exceptions.tsv, row 1: 'broken'"): get_study("movie", root)


# ---- stories and tones ---------------------------------------------------------------------------------------------------------------

def test_stories_are_cut_on_a_grid(instance):
    root, _, ready = instance("stories"); one, two = (open_store(p.path) for p in ready)
    assert len(one.events) == 30 and len(two.events) == 37 and set(one.events.trial_type) == {"foreign"} and not one.events.category.any()
    from synapse_nb.data.windows import Windows
    assert len(Windows([p.path for p in ready], tmin=0, tmax=1, labels=None)) == 67
    assert sum(get_study("stories", root / "in", every=2.).check().values()) == 15 + 18
    with pytest.raises(SynapseError, match="no row says what was heard"): s = get_study("stories", root / "in", every=None); s.read_events(s.find_recordings()[1])


def test_a_film_is_heard_on_the_recordings_clock(tmp_path):
    from synapse_nb.studies.films import film_sound, sound_events
    from synapse_nb.studies.instances import MOVIE_PARTS, write_movie
    truth = write_movie(tmp_path / "in", parts=MOVIE_PARTS[3:], drama=60); study = get_study("movie", tmp_path / "in"); rec, = study.find_recordings()
    first = truth.onset[0] - truth.frame[0] / 25 / (1 + 0)                                       # when frame 0 was seen
    ev = sound_events(study, rec); assert len(ev) >= 4 and np.abs(ev.onset - first - np.round(ev.onset - first)).max() < .055      # a tone begins with every second of the film
    heard = film_sound(study, study.read_events(rec), 0., .4)(study.read_events(rec)); assert heard.shape == (5, 1, 8) and np.isfinite(heard).all()
    with pytest.raises(SynapseError, match="has no column 'pitch'"): film_sound(study, study.read_events(rec), columns=["pitch"])


def test_f_arrays_are_read_by_blocks(tmp_path):
    "An array F of MATLAB v7.3, channels or samples first, stays in its file; of v5 it is the same recording."
    import h5py
    import scipy.io
    from synapse_nb.data.raw import H5Rows
    from synapse_nb.studies.god import f_array_raw
    x = np.random.default_rng(0).normal(size=(6, 900))
    for name, a in (("first", x.T), ("last", x)):
        with h5py.File(tmp_path / f"{name}.mat", "w") as f: f["F"] = a; f["other"] = np.zeros((1, 3))
    scipy.io.savemat(tmp_path / "five.mat", {"F": x.astype(np.float32), "note": "x"})
    for name in ("first", "last", "five"):
        raw = f_array_raw(tmp_path / f"{name}.mat", 4, unit=1e-15)
        assert np.allclose(raw.get_data(), x * np.r_[[1e-15] * 4, 1, 1][:, None], rtol=1e-6) and raw.get_channel_types() == ["mag"] * 4 + ["misc"] * 2
        assert np.allclose(raw.get_data([3, 5], 100, 130), x[[3, 5], 100:130] * [[1e-15], [1]], rtol=1e-6)
        assert name == "five" or isinstance(raw._raw_extras[0]["x"], H5Rows) and not raw.preload
    with pytest.raises(SynapseError, match="first.mat: no array F of at least 160 channels; its arrays: F .6, 900."): f_array_raw(tmp_path / "first.mat")
    (tmp_path / "cut.mat").write_bytes((tmp_path / "first.mat").read_bytes()[:3000])
    with pytest.raises(SynapseError, match="cut.mat cannot be read as MATLAB"): f_array_raw(tmp_path / "cut.mat")
