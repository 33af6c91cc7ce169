"""From raw recordings to the store: labels stay with their trials, planted delays come back, nothing half-made is left, errors name the recording."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.store import open_store
from synapse_nb.studies.prepare import prepare, prepared_table
from synapse_nb.studies.study import get_study


def write_run(folder: Path, run: int, n=30, lag=0.037, drift=12e-6, sfreq=500.0, catch=True):
    "A run whose first channel spells each trial's number (10 µV a number); the screen is `lag` late; every fifth trial is a catch trial without a pulse."
    r = np.random.default_rng(run); sched = 1 + np.cumsum(r.uniform(0.5, 0.8, n)); true = lag + sched * (1 + drift)
    x = r.normal(0, 1e-6, (4, int(sfreq * (true[-1] + 2)))); x[3] = r.normal(0, 0.01, x.shape[1])
    kind = np.array(["catch" if catch and i % 5 == 4 else "exp" for i in range(n)])
    for i, t in enumerate(true):
        k = int(np.ceil(t * sfreq)); x[0, k:k + 100] += (i + 1) * 1e-5
        if kind[i] == "exp": x[3, k:k + 60] += 1.0
    folder.mkdir(parents=True, exist_ok=True)
    mne.io.RawArray(x, mne.create_info(["Oz", "O1", "O2", "Photodiode"], sfreq, ["eeg"] * 3 + ["misc"]), verbose="ERROR").save(folder / f"sub-01_task-see_run-{run:02d}_eeg.fif", verbose="ERROR")
    pd.DataFrame({"onset": sched, "duration": np.where(kind == "catch", 0, 0.3), "trial_type": kind, "stim_file": [f"p{i}.png" if k == "exp" else "n/a" for i, k in enumerate(kind)]}).to_csv(folder / f"sub-01_task-see_run-{run:02d}_events.tsv", sep="\t", index=False)


@pytest.fixture()
def study_root(tmp_path):
    for k in (1, 2): write_run(tmp_path / "study" / "sub-01" / "eeg", k)
    (tmp_path / "study" / "dataset_description.json").write_text("{}")
    return tmp_path / "study"


def spelled(store):
    x = store.data[:, 0]; sf = store.sfreq
    return np.array([round(float(x[i + int(.04*sf):i + int(.15*sf)].mean() - x[i - int(.1*sf):i - int(.02*sf)].mean()) / 1e-5) - 1 for i in store.events["sample"]])


def test_every_trial_keeps_its_label(study_root, tmp_path):
    ready = prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)
    assert len(ready) == 2
    for p in ready:
        s = open_store(p.path); ev = s.events
        assert len(ev) == 30 and (spelled(s) == np.arange(30)).all()                       # the signal says which trial it is
        assert [f"p{i}.png" if i % 5 != 4 else "" for i in spelled(s)] == ev.image.tolist()
        assert ev.trial_id.str[-4:].astype(int).tolist() == list(range(30)) and ev.trial_id.is_unique
        assert p.alignment["source"] == "photodiode" and p.alignment["lag"] == pytest.approx(0.037, abs=2e-3)
        moved = ev.onset - ev.onset_scheduled - 12e-6 * ev.onset_scheduled
        assert moved.median() == pytest.approx(0.038, abs=1.5e-3)                        # written at the first sample after: 0-2 ms later
    t = prepared_table(ready)
    assert (tmp_path / "store" / "prepared.tsv").exists() and t.trials.tolist() == [30, 30]


def test_resume_and_change(study_root, tmp_path):
    out = tmp_path / "store"; a = prepare(get_study("bids", study_root), out, "resample(250)", progress=False)
    stamp = {p.path: os.stat(p.path).st_mtime_ns for p in a}
    b = prepare(get_study("bids", study_root), out, "resample(250)", progress=False)
    assert [p.made for p in a] == [True, True] and [p.made for p in b] == [False, False] and {p.path: os.stat(p.path).st_mtime_ns for p in b} == stamp
    assert b[0].alignment["lag"] == pytest.approx(a[0].alignment["lag"]) and b[0].n_trials == a[0].n_trials
    c = prepare(get_study("bids", study_root), out, "highpass(1)|resample(250)", progress=False)
    assert not {p.path for p in c} & set(stamp)
    e = next((study_root / "sub-01" / "eeg").glob("*run-01_events.tsv")); e.write_text(e.read_text().replace("p0.png", "q0.png"))
    d = prepare(get_study("bids", study_root), out, "resample(250)", progress=False)
    assert [p.made for p in d] == [True, False] and open_store(d[0].path).events.image[0] == "q0.png"    # another table is another store


def test_several_at_a_time_is_the_same(study_root, tmp_path):
    a = prepare(get_study("bids", study_root), tmp_path / "a", "resample(250)", progress=False)
    b = prepare(get_study("bids", study_root), tmp_path / "b", "resample(250)", jobs=2, progress=False)
    for p, q in zip(a, b): assert p.key == q.key and (np.asarray(open_store(p.path).data) == np.asarray(open_store(q.path).data)).all() and open_store(p.path).events.equals(open_store(q.path).events)


def test_refused_alignment(study_root, tmp_path):
    e = next((study_root / "sub-01" / "eeg").glob("*run-02_events.tsv")); t = pd.read_csv(e, sep="\t")
    t["onset"] = 1 + np.cumsum(np.random.default_rng(7).uniform(0.15, 1.1, len(t))); t[t.onset < 20].to_csv(e, sep="\t", index=False)
    with pytest.raises(SynapseError, match="run-02.*do not fit"): prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)
    assert len(prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False, skip_errors=True)) == 1
    kept = prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False, allow_refused=True)
    assert kept[1].alignment["verdict"] == "refused" and any("refused" in w for w in kept[1].warnings)


def test_a_missing_picture_is_named(study_root, tmp_path):
    from PIL import Image
    (study_root / "stimuli").mkdir()
    for i in range(29): Image.new("RGB", (8, 8)).save(study_root / "stimuli" / f"p{i}.png")
    get_study("bids", study_root).check()
    (study_root / "stimuli" / "p7.png").unlink()
    with pytest.raises(SynapseError, match=r"run-01_events.tsv, row 8 .*'p7.png'"): get_study("bids", study_root).check()
    with pytest.raises(SynapseError, match=r"run-01_events.tsv, row 8 .*'p7.png'"): prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)


def test_a_table_with_other_columns(study_root, tmp_path):
    e = next((study_root / "sub-01" / "eeg").glob("*run-02_events.tsv")); e.write_text("begin\tpicture\n1.0\tp0.png\n")
    with pytest.raises(SynapseError, match="run-02_events.tsv has no column 'onset'.*begin, picture"): prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)
    with pytest.raises(SynapseError, match="row 2: onset"):
        e.write_text("onset\tstim_file\n1.0\tp0.png\nsoon\tp1.png\n"); prepare(get_study("bids", study_root), tmp_path / "store2", "resample(250)", progress=False)


def test_odd_encodings_of_the_table(study_root, tmp_path):
    study = get_study("bids", study_root); rec = study.find_recordings()[0]; want = study.read_events(rec)
    text = rec.events_path.read_text()
    for enc, end in (("utf-8-sig", "\r\n"), ("utf-16", "\r\n"), ("utf-8", "\r")):
        rec.events_path.write_bytes(text.replace("\n", end).encode(enc))
        assert get_study("bids", study_root).read_events(rec).equals(want)


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_an_output_that_cannot_be_written(study_root, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SynapseError, match="may write to"): prepare(get_study("bids", study_root), tmp_path / "locked", "resample(250)", progress=False)


def test_an_output_that_is_a_file(study_root, tmp_path):
    (tmp_path / "store").write_text("I am a file")
    with pytest.raises(SynapseError, match="store"): prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)


PLAIN = "clamp(1)"              # a pipeline that changes nothing


PROGRAM = """
import sys; from synapse_nb.studies.study import get_study; from synapse_nb.studies.prepare import prepare
print("begin", flush=True); prepare(get_study("bids", sys.argv[1]), sys.argv[2], "bandpass(1,40)|resample(250)", progress=False); print("end", flush=True)
"""


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued(tmp_path, times):
    for k in range(1, 5): write_run(tmp_path / "study" / "sub-01" / "eeg", k, n=150, sfreq=1000.0)
    (tmp_path / "study" / "dataset_description.json").write_text("{}"); out = tmp_path / "store"; r = np.random.default_rng(0)
    for k in range(times):
        p = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "study"), str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        p.stdout.readline(); time.sleep(r.uniform(0, 1.5)); p.send_signal(signal.SIGKILL if k % 2 else signal.SIGINT); p.wait()
        for f in out.glob("[!.]*.h5"): open_store(f)                                        # what has its name is whole
    ready = prepare(get_study("bids", tmp_path / "study"), out, "bandpass(1,40)|resample(250)", progress=False)
    clean = prepare(get_study("bids", tmp_path / "study"), tmp_path / "clean", "bandpass(1,40)|resample(250)", progress=False)
    for a, b in zip(ready, clean): assert Path(a.path).name == Path(b.path).name and (np.asarray(open_store(a.path).data) == np.asarray(open_store(b.path).data)).all()


# ---- one session a task --------------------------------------------------------------------------------------------------------------

def slurm(repo, *args, task=None, **env):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"PYTHON": sys.executable, "PYTHONPATH": str(repo), **({} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}), **env}
    return subprocess.run(["bash", str(repo / "scripts" / "prepare.slurm"), *map(str, args)], capture_output=True, text=True, env=env, timeout=300)


def test_an_array_job_prepares_one_session_a_task(repo, tmp_path):
    for who, ses in (("01", "01"), ("01", "02"), ("02", "01")):
        write_run(tmp_path / "study" / f"sub-{who}" / f"ses-{ses}" / "eeg", 1, n=12)
        for p in (tmp_path / "study" / f"sub-{who}" / f"ses-{ses}" / "eeg").iterdir(): p.rename(p.with_name(p.name.replace("sub-01_", f"sub-{who}_ses-{ses}_")))
    (tmp_path / "study" / "dataset_description.json").write_text("{}"); args = ("bids", tmp_path / "study", tmp_path / "store", "bandpass(1,40)|resample(250)")
    said = slurm(repo, *args); assert said.returncode == 0 and "3 sessions: sbatch --array=0-2 scripts/prepare.slurm bids" in said.stdout and "'bandpass(1,40)|resample(250)'" in said.stdout, said.stderr
    for task in (2, 0, 1):
        p = slurm(repo, *args, task=task); assert p.returncode == 0, p.stderr
    whole = prepare(get_study("bids", tmp_path / "study"), tmp_path / "clean", args[3], progress=False)
    assert sorted(p.name for p in (tmp_path / "store").glob("*.h5")) == sorted(Path(p.path).name for p in whole) and len(list((tmp_path / "store").glob("*.png"))) == 3
    t = pd.read_csv(tmp_path / "store" / "prepared.tsv", sep="\t"); assert t.recording.tolist() == [p.key for p in whole] and t.trials.tolist() == [12] * 3
    again = slurm(repo, *args, task=1); assert again.returncode == 0
    p = slurm(repo, *args, task=3); assert p.returncode == 1 and "no task 3; 3 sessions make tasks 0 to 2" in p.stderr
    p = slurm(repo, *args[:3]); assert p.returncode == 1 and "STUDY ROOT OUT PIPELINE are needed" in p.stderr
    p = slurm(repo, *args[:3], "bandpas(1,40)"); assert p.returncode == 1 and "bandpass" in p.stderr


# ---- real recordings go through -----------------------------------------------------------------------------------------------------

def copy(src: Path, dst: Path) -> Path:
    dst.parent.mkdir(parents=True, exist_ok=True); dst.write_bytes(src.read_bytes())
    return dst


def test_real_kit(test_data, tmp_path):
    copy(test_data / "kit/test.sqd", tmp_path / "in/S01_run1.sqd")
    p, = prepare(get_study("folder", tmp_path / "in", trigger="MISC 001"), tmp_path / "store", PLAIN, progress=False)
    s = open_store(p.path)
    assert s.ch_types.count("mag") == 157 and s.sfreq == 1000 and np.abs(s.events["sample"].to_numpy() - [269, 1553]).max() <= 1 and p.modality == "meg"
    copy(test_data / "kit/test.sqd", tmp_path / "seen/S01_run1.sqd")
    p, = prepare(get_study("folder", tmp_path / "seen", trigger="MISC 032"), tmp_path / "store", PLAIN, progress=False)
    assert np.abs(open_store(p.path).events["sample"].to_numpy()[:2] - [274, 1557]).max() <= 2


def test_real_kit_and_ctf_without_a_word(test_data, tmp_path):
    "No table, no option: pulses of a KIT's analogue lines are the events, each by its line's name; a CTF of two seconds without a trigger has no trial, and that is said; options of the reader come with --set."
    from synapse_nb.apps.cli import main
    copy(test_data / "kit/test.sqd", tmp_path / "kit/test.sqd")
    assert main(["prepare", "folder", str(tmp_path / "kit"), "--out", str(tmp_path / "a"), "--preset", PLAIN]) == 0
    ev = open_store(next((tmp_path / "a").glob("*.h5"))).events
    assert ev.value.tolist() == ["MISC 001", "MISC 032"] * 2 and np.abs(ev["sample"].to_numpy() - [269, 274, 1553, 1557]).max() <= 2
    assert main(["prepare", "folder", str(tmp_path / "kit"), "--out", str(tmp_path / "b"), "--preset", PLAIN, "--set", "trigger=MISC 032"]) == 0
    assert np.abs(open_store(next((tmp_path / "b").glob("*.h5"))).events["sample"].to_numpy()[:2] - [274, 1557]).max() <= 2
    assert main(["prepare", "folder", str(tmp_path / "kit"), "--set", "triger=x"]) == 1
    import shutil
    shutil.copytree(test_data / "ctf_short/testdata_ctf_short_discontinuous.ds", tmp_path / "ctf/testdata_ctf_short_discontinuous.ds")
    p, = prepare(get_study("folder", tmp_path / "ctf"), tmp_path / "store", PLAIN, progress=False)
    assert p.n_trials == 0 and len(open_store(p.path).events) == 0 and open_store(p.path).ch_types.count("mag") == 273 and "stored without trials" in p.warnings[0]


def test_real_ctf_and_brainvision_and_bids(test_data, tmp_path):
    import shutil
    shutil.copytree(test_data / "ctf_short/testdata_ctf_short_discontinuous.ds", tmp_path / "ctf/testdata_ctf_short_discontinuous.ds")
    (tmp_path / "ctf/testdata_ctf_short_discontinuous_events.csv").write_text("onset,stim\n0.5,a.png\n1.0,b.png\n")
    p, = prepare(get_study("folder", tmp_path / "ctf"), tmp_path / "store", PLAIN, progress=False, allow_refused=True)
    assert open_store(p.path).ch_types.count("mag") == 273 and open_store(p.path).events["sample"].tolist() == [600, 1200]
    for s in (".vhdr", ".vmrk", ".eeg"): copy(test_data / f"brainvision/test{s}", tmp_path / f"bv/test{s}")
    p, = prepare(get_study("folder", tmp_path / "bv", codes={"Stimulus/S255": "a", "Stimulus/S253": "b"}), tmp_path / "store", PLAIN, progress=False)
    assert open_store(p.path).events.category.value_counts().to_dict() == {"a": 5, "b": 2} and open_store(p.path).ch_types.count("eeg") == 26
    p, = prepare(get_study("bids", test_data / "bids_tiny"), tmp_path / "store", "resample(500)", progress=False, allow_refused=True)
    assert open_store(p.path).events["sample"].tolist() == [0, 100] and p.n_trials == 2


def test_real_headband(test_data, tmp_path):
    ready = prepare(get_study("left_right", test_data / "muse_left_right"), tmp_path / "store", "highpass(1)", progress=False)
    assert sum(p.n_trials for p in ready) == 1292 and all(p.n_channels == 4 and p.sfreq == 256 for p in ready)
    with pytest.raises(SynapseError, match="one single marker"): prepare(get_study("n170", test_data / "muse_n170"), tmp_path / "store", "highpass(1)", subjects=10, progress=False)


def test_the_simulated_study_gives_back_its_clocks(tmp_path):
    from synapse_nb.studies.simulate import simulate_study
    simulate_study(tmp_path / "sim", n_subjects=1, quick=True, progress=False); study = get_study("simulated", tmp_path / "sim"); study.check()
    for p in prepare(study, tmp_path / "store", "resample(100)", progress=False):
        sub, ses, run, kind = p.key.split("_"); z = np.load(tmp_path / "sim" / "truth" / f"{sub}_{ses}_task-pictures_{run}_{kind}.npz")
        ev = open_store(p.path).events; row = ev.trial_id.str[-4:].astype(int).to_numpy()
        assert (ev.image.to_numpy() == z["image"][row]).all() and len(ev) == len(z["image"])
        err = ev.onset.to_numpy() - z["onset"][row]
        assert abs(np.median(err)) < 5e-4 and np.abs(err).max() < 2e-3
        assert p.alignment["delay"] == pytest.approx(float(z["delay"]), abs=5e-4)
        assert json.loads(Path(p.path).with_suffix(".json").read_text())["n_trials"] == len(ev)


def test_the_command_takes_subjects_and_sessions(tmp_path, capsys):
    from synapse_nb.apps.cli import main
    for who, ses in (("01", "01"), ("01", "02"), ("02", "01")):
        write_run(tmp_path / "study" / f"sub-{who}" / f"ses-{ses}" / "eeg", 1, n=12)
        for p in (tmp_path / "study" / f"sub-{who}" / f"ses-{ses}" / "eeg").iterdir(): p.rename(p.with_name(p.name.replace("sub-01_", f"sub-{who}_ses-{ses}_")))
    (tmp_path / "study" / "dataset_description.json").write_text("{}"); root, out = str(tmp_path / "study"), str(tmp_path / "store")
    made = lambda: sorted("_".join(p.name.split("_")[:2]) for p in Path(out).glob("*.h5"))
    assert main(["prepare", "bids", root, "--out", out, "--preset", "resample(250)", "--subjects", "01", "--sessions", "ses-2"]) == 0 and made() == ["sub-01_ses-02"]
    assert main(["prepare", "bids", root, "--out", out, "--preset", "resample(250)", "--sessions", "01"]) == 0 and made() == ["sub-01_ses-01", "sub-01_ses-02", "sub-02_ses-01"]
    assert main(["prepare", "bids", root, "--out", out, "--subjects", "02", "--sessions", "02"]) == 1 and "no session '02'; there are 01" in capsys.readouterr().err


def test_bids_folders_of_other_hands(tmp_path):
    "run-1 for run-01, tables packed or above the recordings, even trains, few rows, a rest without events; what was renamed or forgotten is named."
    import gzip
    import pybv
    table = "onset\tduration\ttrial_type\n1.0\t0.1\tgo\n3.0\t0.1\tstop\n5.0\t0.1\tgo\n"

    def folder(name, base="sub-01_task-x_run-01", at=(500, 1500, 2500), **tables):
        f = tmp_path / name / "sub-01" / "eeg"; f.mkdir(parents=True)
        pybv.write_brainvision(data=np.random.default_rng(0).normal(0, 1e-5, (3, 4000)), sfreq=500, ch_names=["Fz", "Cz", "Oz"], fname_base=f"{base}_eeg", folder_out=str(f), unit="µV", events=[dict(onset=s, duration=1, type="Stimulus", description=1) for s in at])
        return f, lambda: prepare(get_study("bids", tmp_path / name), tmp_path / f"store of {name}", PLAIN, progress=False)[0]

    f, go = folder("padding"); (f / "sub-01_task-x_run-1_events.tsv").write_text(table)
    p = go(); assert open_store(p.path).events["sample"].tolist() == [500, 1500, 2500]
    f, go = folder("packed"); (f / "sub-01_task-x_run-01_events.tsv.gz").write_bytes(gzip.compress(table.encode())); assert go().n_trials == 3
    f, go = folder("above"); (f.parent.parent / "task-x_events.tsv").write_text(table); assert go().n_trials == 3
    f, go = folder("one row"); (f / "sub-01_task-x_run-01_events.tsv").write_text(table[:table.index("3.0")]); p = go(); assert p.n_trials == 1 and p.alignment["verdict"] == "ok" and "recording's clock" in p.alignment["reason"]
    f, go = folder("elsewhere"); (f / "sub-01_task-x_run-01_events.tsv").write_text(table.replace("3.0", "3.4"))
    with pytest.raises(SynapseError, match="do not fit"): go()
    f, go = folder("rest"); p = go(); assert p.n_trials == 0 and "stored without trials" in p.warnings[0]
    f, go = folder("misnamed"); (f / "sub-01_task-y_run-01_events.tsv").write_text(table)
    with pytest.raises(SynapseError, match="sub-01_task-y_run-01_events.tsv lies beside it and belongs to no recording"): go()
    f, go = folder("no markers"); (f / "sub-01_task-x_run-01_eeg.vmrk").unlink()
    with pytest.raises(SynapseError, match="names 'sub-01_task-x_run-01_eeg.vmrk' as its MarkerFile"): go()


def test_a_copy_under_another_name_is_known_by_its_samples(study_root, tmp_path):
    "Two people, one of them the other's files renamed, headers corrected: the split says so. Blocks of one file are no copies."
    from synapse_nb.data.splits import check_split, make_split
    from synapse_nb.studies.instances import write_instance
    f = study_root / "sub-01" / "eeg"; g = study_root / "sub-02" / "eeg"; g.mkdir(parents=True)
    for p in f.iterdir():
        q = g / p.name.replace("sub-01", "sub-02"); q.write_bytes(p.read_bytes())
        if q.suffix in (".vhdr", ".vmrk"): q.write_text(q.read_text().replace("sub-01", "sub-02"))
    ready = prepare(get_study("bids", study_root), tmp_path / "store", "resample(250)", progress=False)
    stores = [open_store(p.path) for p in ready]; ev = pd.concat([s.events for s in stores], ignore_index=True)
    assert stores[0].provenance["versions"]["mne"] and stores[0].provenance["pipeline"] == "resample(250)"
    with pytest.raises(SynapseError, match="same file under two names"): check_split(make_split(ev, "subject", test=["02"], val=0), ev, stores=stores)
    write_instance("things_eeg2", tmp_path / "eeg2")
    blocks = [open_store(p.path) for p in prepare(get_study("things_eeg2_epochs", tmp_path / "eeg2", block=2), tmp_path / "blocks", PLAIN, progress=False)]
    ev = pd.concat([s.events for s in blocks], ignore_index=True); check_split(make_split(ev, "image", test=.4, val=0), ev, stores=blocks)


def test_no_filter_runs_over_the_seams_of_ready_epochs(tmp_path):
    from synapse_nb.apps.cli import main
    from synapse_nb.studies.instances import write_instance
    for name in ("things_eeg2_epochs", "things_meg_epochs"):
        write_instance(name.replace("eeg2_epochs", "eeg2"), tmp_path / name)
        with pytest.raises(SynapseError, match=r"'bandpass\(1,40\)' would run over their seams"): prepare(get_study(name, tmp_path / name), tmp_path / "store", "bandpass(1,40)", progress=False)
        assert main(["prepare", name, str(tmp_path / name), "--out", str(tmp_path / f"{name} store")]) == 0 and list((tmp_path / f"{name} store").glob("*.h5"))
