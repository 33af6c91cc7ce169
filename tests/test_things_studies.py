"""THINGS-EEG and THINGS-MEG end to end: folders in their owners' shape, written here, into the store; each signal spells its own trial."""
import pickle
import shutil
import subprocess
import sys

import mne
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.raw import read_raw
from synapse_nb.data.store import open_store
from synapse_nb.studies.prepare import prepare
from synapse_nb.studies.study import get_study

CONCEPTS = ["aardvark", "bat1", "bat2", "camera_lens", "ice-cream_cone", "ice_cream", "ice_cube", "zebra"]


def write_things_eeg(root, subject, unit, n=60, test=True, n_test=8, drop=()):
    "A THINGS-EEG person: BrainVision, backslash paths, targets, object -1 in the test part; the signal at Oz is the row's number in µV."
    import pybv
    r = np.random.default_rng(int(subject)); folder = root / f"sub-{subject}" / "eeg"; folder.mkdir(parents=True)
    concept = r.choice(CONCEPTS, n); is_test = np.zeros(n, int)
    if test: is_test[-n_test:] = 1
    sample = 500 + np.arange(n) * 100; x = r.normal(0, 1e-7, (3, sample[-1] + 3000))
    for i, s in enumerate(sample): x[0, s:s + 50] += (i + 1) * 1e-6
    pybv.write_brainvision(data=x, sfreq=1000, ch_names=["Oz", "O1", "O2"], fname_base=f"sub-{subject}_task-rsvp_eeg", folder_out=str(folder), unit="µV",
                           events=[dict(onset=int(s), duration=1, type="Stimulus", description=1) for s in sample], overwrite=True)
    names = [f"{c}_{k:02d}s.jpg" for c, k in zip(concept, r.integers(1, 12, n))]
    t = pd.DataFrame({"onset": sample if unit == "ms" else sample / 1000, "duration": 50, "eventnumber": range(n), "isteststim": is_test, "object": np.where(is_test == 1, "-1", concept),
                      "objectnumber": np.where(is_test == 1, -1, r.integers(0, 1854, n)), "stim": [rf"stimuli\{c}\{f}" for c, f in zip(concept, names)], "istarget": (r.uniform(size=n) < 0.1).astype(int), "stimname": names})
    if unit == "s": t["sample"] = sample
    t.drop(columns=list(drop)).to_csv(folder / f"sub-{subject}_task-rsvp_events.tsv", sep="\t", index=False)
    return t, concept


@pytest.fixture()
def eeg_root(tmp_path):
    root = tmp_path / "ds003825"; root.mkdir(); (root / "dataset_description.json").write_text("{}")
    truth = {"01": write_things_eeg(root, "01", "ms", test=False), "02": write_things_eeg(root, "02", "ms"), "03": write_things_eeg(root, "03", "s"), "06": write_things_eeg(root, "06", "s", drop=("istarget", "stimname"))}
    pd.DataFrame({"participant_id": ["sub-01", "sub-02", "sub-03", "sub-06"], "exclude": [1, 0, 0, 0]}).to_csv(root / "participants.tsv", sep="\t", index=False)
    pd.DataFrame({"uniqueID": CONCEPTS}).to_csv(root / "things_concepts.tsv", sep="\t", index=False)
    m = pd.DataFrame(0, index=range(8), columns=["animal", "bird", "dessert", "food"]); m.loc[[0, 1, 7], "animal"] = 1; m.loc[1, "bird"] = 1; m.loc[[4, 5], "dessert"] = 1
    m.to_csv(root / "category_mat_manual.tsv", sep="\t", index=False)
    return root, truth


def test_things_eeg_from_folder_to_store(eeg_root, tmp_path):
    root, truth = eeg_root; study = get_study("things_eeg", root)
    assert [r.subject for r in study.find_recordings()] == ["02", "03", "06"] and [r.subject for r in study.find_recordings("01")] == ["01"]     # excluded by its owners, unless asked for
    ready = prepare(study, tmp_path / "store", "clamp(1)", progress=False)
    for p in ready:
        s = open_store(p.path); t, concept = truth[p.subject]; ev = s.events; x = s.data[:, s.ch_names.index("Oz")]
        spelled = np.array([round(float(x[i:i + 50].mean()) / 1e-6) - 1 for i in ev["sample"]])
        rows = ev.trial_id.str.extract(r"_t(\d+)$")[0].astype(int).to_numpy()
        assert (spelled == rows).all() and ev.concept.tolist() == list(concept[rows])                                 # 100 % of the trials carry their own label
        if p.subject != "06": assert not t.istarget.to_numpy()[rows].any() and len(ev) == (t.istarget == 0).sum()
        assert ((ev.trial_type == "test") == (t.isteststim.to_numpy()[rows] == 1)).all() and np.allclose(ev.duration, 0.05)
        want = {"aardvark": "animal", "bat1": "", "zebra": "animal", "ice_cream": "dessert", "ice-cream_cone": "dessert"}        # bat1 has two categories: none of them by default
        assert ev.category.tolist() == [want.get(c, "") for c in ev.concept]
        assert set(ev.image) == {i.replace("stimuli\\", "").replace("\\", "/") for i in t.stim.to_numpy()[rows]}


def test_other_labels_are_another_store_and_a_moved_study_is_the_same(eeg_root, tmp_path):
    root, _ = eeg_root; name = lambda **kw: prepare(get_study("things_eeg", kw.pop("root", root), **kw), tmp_path / "store", "clamp(1)", subjects="02", progress=False)[0]
    a, b = name(), name(several="first")
    assert a.path != b.path
    moved = tmp_path / "elsewhere"; shutil.copytree(root, moved); c = name(root=moved)
    assert c.path == a.path and not c.made
    text = (moved / "category_mat_manual.tsv").read_text().splitlines(); text[-1] = "0\t0\t0\t1"; (moved / "category_mat_manual.tsv").write_text("\n".join(text) + "\n")
    d = name(root=moved); assert d.path != a.path and "food" in set(open_store(d.path).events.category)


def test_things_eeg_label_policy_and_errors(eeg_root):
    root, truth = eeg_root; rec = get_study("things_eeg", root).find_recordings("02")[0]
    first = get_study("things_eeg", root, several="first").read_events(rec)
    assert set(first.category[first.concept == "bat1"]) <= {"animal"}
    bird = get_study("things_eeg", root, wanted=["bird", "dessert"]).read_events(rec)
    assert set(bird.category) <= {"bird", "dessert", ""} and set(bird.category[bird.concept == "bat1"]) <= {"bird"}
    with pytest.raises(SynapseError, match="no category 'birds'.*bird"): get_study("things_eeg", root, wanted=["birds"])
    (root / "things_concepts.tsv").write_text("uniqueID\n" + "\n".join(CONCEPTS[:-1] + ["zebu"]) + "\n")
    with pytest.raises(SynapseError, match="'zebra' is no THINGS concept"): get_study("things_eeg", root).read_events(rec)


def rename_ctf(src, dst):
    dst.mkdir(parents=True)
    for p in src.iterdir(): shutil.copy(p, dst / p.name.replace(src.stem, dst.stem))


@pytest.mark.parametrize("kind", ["scheduled", "optical"])
def test_things_meg_on_a_real_ctf_folder(test_data, tmp_path, kind):
    "The reader's path on a real CTF recording under THINGS-MEG's names (2 s of it, with a table of that length)."
    root = tmp_path / "ds004212"; folder = root / "sub-BIGMEG1" / "ses-01" / "meg"; stem = "sub-BIGMEG1_ses-01_task-main_run-01"
    rename_ctf(test_data / "ctf_short/testdata_ctf_short_discontinuous.ds", folder / f"{stem}_meg.ds")
    (root / "dataset_description.json").write_text("{}"); (root / "things_concepts.tsv").write_text("uniqueID\n" + "\n".join(CONCEPTS) + "\n")
    onset = np.array([0.3, 0.6, 0.9, 1.2, 1.5]); number = [3, np.nan, 1, 8, 6]
    if kind == "scheduled":
        t = pd.DataFrame({"onset": onset, "duration": 500, "trial_type": ["exp", "catch", "test", "exp", "exp"], "things_category_nr": number, "things_image_nr": number,
                          "file_path": ["images_meg/bat2/bat2_01b.jpg", "images_catch_meg/catch001.jpg", "images_test_meg/aardvark_07s.jpg", "images_meg/zebra/zebra_02s.jpg", "images_meg/ice_cream/ice_cream_02s.jpg"]})
    else: t = pd.DataFrame({"onset": onset, "duration": 0.5, "trial_type": ["exp", "catch", "test", "exp", "exp"], "things_category_nr": number, "value": number, "sample": (onset * 1200).astype(int)})
    t.to_csv(folder / f"{stem}_events.tsv", sep="\t", index=False, na_rep="N/A")
    study = get_study("things_meg", root); rec, = study.find_recordings()
    assert rec.subject == "BIGMEG1" and rec.modality == "meg"
    raw = study.read_raw(rec); assert not [c for c in raw.ch_names if c.startswith("MRO11")] and raw.info["sfreq"] == 1200
    ev = study.read_events(rec)
    assert ev.trial_id.str[-4:].tolist() == ["0000", "0002", "0003", "0004"] and ev.concept.tolist() == ["bat2", "aardvark", "zebra", "ice_cream"] and ev.trial_type.tolist() == ["exp", "test", "exp", "exp"]
    assert (ev.onset_source == {"scheduled": "scheduled", "optical": "photodiode"}[kind]).all()
    p, = prepare(study, tmp_path / "store", "pick(mag)", progress=False); s = open_store(p.path)
    assert s.events["sample"].tolist() == [360, 1080, 1440, 1800] and set(s.ch_types) == {"mag"}
    want = raw.get_data(picks=[s.ch_names[5]])[0]
    assert np.abs(s.data[:, 5] - want).max() <= 1e-6 * np.abs(want).max()


def test_known_dropouts_are_marked(tmp_path):
    from synapse_nb.studies.things import DROPOUTS
    assert DROPOUTS[["subject", "session", "run", "start"]].values.tolist() == [["BIGMEG1", 11, 5, 13.4], ["BIGMEG2", 10, 3, 59.8]]


def test_an_unknown_file_is_not_a_recording(tmp_path):
    (tmp_path / "sub-01_task-rsvp_eeg.vhdr").write_text("Brain Vision Data Exchange Header File Version 1.0\n")
    with pytest.raises(SynapseError): read_raw(tmp_path / "sub-01_task-rsvp_eeg.vhdr")
    assert mne.__version__


# ---- long arrays stay on the disk ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["np.save", 2, 3, 4, 5])
def test_pickled_arrays_are_not_read_whole(tmp_path, form):
    "Whatever wrote the dictionary: the same numbers, mapped instead of read, in both orders of memory; cut short is said."
    from synapse_nb.studies.things_eeg2 import read_pickled
    r = np.random.default_rng(0)
    d = {"a": r.normal(size=(20, 5000)), "b": np.asfortranarray(r.normal(size=(300, 200))), "names": ["Oz", "Pz"], "arr": np.array(["x", "yy"]), "few": np.arange(4), "n": np.float64(2.5), "o": np.array(["a", None], dtype=object)}
    path = tmp_path / "x.npy"
    if form == "np.save": np.save(path, d, allow_pickle=True)
    else: path.write_bytes(pickle.dumps(d, protocol=form))
    got = read_pickled(path, ("a",))
    assert all(np.array_equal(got[k], d[k]) for k in d)
    assert form == 2 or isinstance(got["a"], np.memmap) and isinstance(got["b"], np.memmap)
    path.write_bytes(path.read_bytes()[:-300_000])
    with pytest.raises(SynapseError, match="x.npy cannot be read"): read_pickled(path)


def test_a_long_session_is_read_in_blocks(tmp_path):
    "THINGS-EEG2: 170 MB in the file, about half of that in memory to prepare it (blocks, and what is imported on the way); as ready arrays alike."
    code = """
import sys, threading, time; from synapse_nb.studies.study import get_study; from synapse_nb.studies.prepare import prepare
rss = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))/1024
study = get_study(sys.argv[1], sys.argv[2]); rec = study.find_recordings()[0]
from synapse_nb.data.preprocess import Pipeline; import mne, scipy.signal, pandas
before, most, on = rss(), 0, True
def watch():
    global most
    while on: most = max(most, rss() - before); time.sleep(.002)
t = threading.Thread(target=watch); t.start(); ready = prepare(study, sys.argv[3], "clamp(1)", progress=False); on = False; t.join(); print(len(ready), ready[0].n_trials, int(most))
"""
    from synapse_nb.studies.instances import write_instance
    write_instance("things_eeg2", tmp_path / "study")
    for p in (tmp_path / "study").glob("sub-01/ses-0[234]/*.npy"): p.unlink()
    big = tmp_path / "study/sub-01/ses-01/raw_eeg_training.npy"; d = np.load(big, allow_pickle=True).item(); n = len(d["raw_eeg_data"])
    d["raw_eeg_data"] = np.concatenate([d["raw_eeg_data"], np.zeros((n, 21_000_000 // n - d["raw_eeg_data"].shape[1]))], 1); np.save(big, d, allow_pickle=True); del d
    assert big.stat().st_size > 160e6
    for name in ("things_eeg2", "things_eeg2_epochs"):
        out = subprocess.run([sys.executable, "-c", code, name, str(tmp_path / "study"), str(tmp_path / name)], capture_output=True, text=True, check=True).stdout.split()
        assert int(out[0]) == 2 and int(out[2]) < 90, out
