"""Recordings of every format: what the real files must give, and what damaged ones must say."""
import os
import resource
import subprocess
import sys
import time

import mne
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.raw import check_clock, format_of, inspect, read_raw, read_table
from synapse_nb.studies.study import find_lines, find_study_pulses, get_study, inspect_path, onset_unit


def counts(raw): return dict(pd.Series(raw.get_channel_types()).value_counts())


def events(i, channel): return {e["code"]: e["n"] for e in i.events if e["channel"] == channel}


FACTS = [  # file, rate, seconds, channels by type (DATA of the recordings' owners)
    ("kit/test.sqd", 1000, 2.0, {"mag": 157, "ref_meg": 3, "misc": 32}),
    ("kit/Example_RICOH160-1_10021-export_anonymyze.con", 2000, 1.0, {"mag": 160}),
    ("kit/ArtificalSignalData_Yokogawa_1khz.con", 1000, 5.0, {"mag": 160, "eeg": 45}),
    ("ctf_short/testdata_ctf_short_discontinuous.ds", 1200, 2.0, {"mag": 273, "ref_meg": 28, "eeg": 8, "misc": 44, "stim": 3}),
    ("brainvision/test.vhdr", 1000, 7.9, {"eeg": 26, "misc": 6}),
    ("bids_tiny", 5000, 2.0, {"eeg": 64, "eog": 2, "ecg": 1, "misc": 2}),
    ("neuromag_triggers/test_elekta_3ch_raw.fif", 1000, 80.0, {"grad": 2, "mag": 1, "stim": 1}),
    ("neuromag_raw5s/sample_audvis_trunc_raw_sss.fif", 300.307, 1.0, {"grad": 204, "mag": 102, "eeg": 60}),
    ("neuromag_raw5s/neuromag306_raw_v7.mat", 300.307, 5.0, {"eeg": 60}),
    ("xdf_bdf/test.bdf", 256, 60.0, {"eeg": 16, "stim": 1}),
    ("xdf_bdf/clock_resets.xdf", 92.67, 300.1, {"eeg": 8}),
    ("xdf_bdf/minimal.xdf", 10, 0.9, {"eeg": 3}),
    ("muse_n170/N170/subject1/session1/data_2017-09-13-15.30.01.csv", 256, 120.0, {"eeg": 4, "misc": 1, "stim": 1}),
]


@pytest.mark.parametrize("file,sfreq,seconds,types", FACTS, ids=[f[0].split("/")[-1] for f in FACTS])
def test_a_real_recording_opens_as_what_it_is(test_data, file, sfreq, seconds, types):
    raw = read_raw(test_data / file)
    assert raw.info["sfreq"] == pytest.approx(sfreq, abs=0.01) and raw.n_times / raw.info["sfreq"] == pytest.approx(seconds, abs=0.06)
    have = counts(raw)
    assert {k: have.get(k) for k in types} == types
    x = raw.get_data(picks=["eeg"]) if "eeg" in have else raw.get_data(picks=["mag"])
    assert np.isfinite(x).all()
    assert "STI 014" not in raw.ch_names or not file.startswith("kit/"), "a derived trigger channel of a KIT file shows falling edges"


def test_real_events_are_counted(test_data):
    i = inspect(test_data / "neuromag_triggers/test_elekta_3ch_raw.fif")
    assert events(i, "STI101") == {1: 26, 2: 25, 4: 18, 8: 16, 16: 19, 32: 22, 64: 17, 128: 19} and sum(e["n"] for e in i.events) == 162
    assert events(inspect(test_data / "xdf_bdf/test.bdf"), "Status") == {255: 40}
    assert events(inspect(test_data / "brainvision/test.vhdr"), "annotations") == {"Stimulus/S255": 5, "Stimulus/S253": 2, "Event/254": 3, "Response/R255": 1, "SyncStatus/Sync On": 1, "Optic/O  1": 1}
    i = inspect_path(test_data / "kit/test.sqd"); first = {e["channel"]: e["first"] for e in i.events}
    assert first["MISC 001"] == pytest.approx(0.269, abs=0.0015)
    assert {e["channel"]: e["n"] for e in i.events}["MISC 001"] == 2


def test_everything_is_answered(test_data):
    "Every file of the folder has an answer; those that hold no recording say so."
    for p in sorted(test_data.rglob("*")):
        if p.is_dir() and p.suffix != ".ds": continue
        if p.suffix in (".jpg", ".csv") and "1.jpg" not in p.name: continue
        if p.suffix == ".tsv" and "run-" in p.name and "run-01" not in p.name: continue
        i = inspect(p)
        assert i.format and len(str(i).splitlines()) >= 2, p
        if i.kind == "recording": assert i.sfreq > 0 and i.duration > 0 and i.n_channels, p
    assert inspect(test_data / "meg_evoked_av/test-ave.fif.gz").kind == "evoked"
    assert "Left visual" in str(inspect(test_data / "meg_evoked_av/test-ave.fif.gz"))
    assert inspect(test_data / "kit/test_mrk.sqd").kind == "head markers"
    assert inspect(test_data / "bids_tiny").format.startswith("BIDS")


def test_the_headband_files(test_data):
    n170 = test_data / "muse_n170/N170"
    first = pd.read_csv(n170 / "subject1/session1/data_2017-09-13-15.30.01.csv")
    c = check_clock(first.timestamps)
    assert (c.sfreq, c.backwards, c.gaps, c.lost) == (256.0, 47, 348, []) and c.measured == pytest.approx(256.0, abs=0.05)
    i = inspect(n170 / "subject1/session1/data_2017-09-13-15.30.01.csv")
    assert any("backwards 47 times" in w for w in i.warnings)
    i = inspect(n170 / "subject10/session1/recording_2018-06-06-14.34.14.csv.csv")
    assert any("one single marker" in w for w in i.warnings)
    aux = [w for p in (test_data / "muse_left_right").rglob("*.csv") for w in inspect(p).warnings if "Right AUX" in w]
    assert len(aux) == 5
    study = get_study("n170", n170)
    bad = next(r for r in study.find_recordings(10) if "14.34.14" in r.path.name)
    with pytest.raises(SynapseError, match="one single marker.*use another recording"): study.read_events(bad)


@pytest.mark.parametrize("name,folder,n", [("n170", "muse_n170", {"house": 585, "face": 589}), ("p300", "muse_p300", None), ("left_right", "muse_left_right", {"left": 665, "right": 627})])
def test_the_headband_studies(test_data, name, folder, n):
    study = get_study(name, test_data / folder)
    recs = study.find_recordings(1)
    assert len(recs) == {"n170": 6, "p300": 6, "left_right": 5}[name]
    ev = pd.concat([study.read_events(r) for r in recs])
    assert ev.trial_id.is_unique and (ev.onset >= 0).all()
    c = ev.category.value_counts().to_dict()
    assert sum(c.values()) == {"n170": 1174, "p300": 1161, "left_right": 1292}[name]
    if name == "p300": assert 4 < c["dog"] / c["cat"] < 6


@pytest.mark.slow
def test_faces_and_houses_kept_trials(test_data):
    study = get_study("n170", test_data / "muse_n170")
    kept = {}
    for aux in (False, True):
        study.keep_aux = aux; kept[aux] = 0
        for rec in study.find_recordings(1):
            raw = study.read_raw(rec); ev = study.read_events(rec)
            if aux: raw.set_channel_types({"Right AUX": "eeg"}, verbose="ERROR")
            raw.filter(1, 30, verbose="ERROR")
            e = np.c_[ev["sample"], 0 * ev["sample"], ev.category == "face"].astype(int)
            kept[aux] += len(mne.Epochs(raw, e, None, -0.1, 0.8, baseline=None, reject=dict(eeg=100e-6), preload=True, verbose="ERROR", picks="eeg"))
    assert kept[False] == 1133 and kept[True] == 318


# ---- bad input ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture()
def fif(tmp_path):
    r = np.random.default_rng(0)
    raw = mne.io.RawArray(r.normal(0, 1e-12, (4, 20000)), mne.create_info(["MEG 1", "MEG 2", "MEG 3", "STI"], 1000.0, ["mag"] * 3 + ["stim"]), verbose="ERROR")
    raw._data[3] = 0; raw._data[3, 2000:20000:1000] = 5
    raw.save(tmp_path / "a_raw.fif", buffer_size_sec=1, verbose="ERROR")
    return tmp_path / "a_raw.fif"


@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.8, 0.999])
def test_a_truncated_fif_is_an_error(fif, part):
    data = fif.read_bytes(); fif.write_bytes(data[:int(len(data) * part)])
    with pytest.raises(SynapseError, match="a_raw.fif.*(cut short|damaged)"): read_raw(fif)


@pytest.mark.parametrize("name,parts", [("kit/test.sqd", (0.001, 0.01, 0.5)), ("xdf_bdf/test.bdf", (0.001, 0.5, 0.9)), ("xdf_bdf/clock_resets.xdf", (0.001, 0.5)),
                                        ("neuromag_raw5s/neuromag306_raw_v7.mat", (0.5,)), ("neuromag_triggers/test_elekta_3ch_raw.fif", (0.01, 0.5, 0.99))])
def test_truncated_real_files_are_errors(test_data, tmp_path, name, parts):
    data = (test_data / name).read_bytes(); p = tmp_path / name.split("/")[-1]
    for part in parts:
        p.write_bytes(data[:int(len(data) * part)])
        with pytest.raises(SynapseError, match="cut short|damaged"): read_raw(p)


def test_a_truncated_brainvision_is_an_error(test_data, tmp_path):
    for s in (".vhdr", ".vmrk", ".eeg"): (tmp_path / f"test{s}").write_bytes((test_data / f"brainvision/test{s}").read_bytes())
    (tmp_path / "test.eeg").write_bytes((tmp_path / "test.eeg").read_bytes()[:200000])
    with pytest.raises(SynapseError, match="cut short"): read_raw(tmp_path / "test.vhdr")
    assert read_raw(tmp_path / "test.vhdr", cut_ok=True).n_times == 3125
    (tmp_path / "test.vhdr").unlink()
    with pytest.raises(SynapseError, match="needs its header"): read_raw(tmp_path / "test.eeg")


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(SynapseError, match="does not exist"): read_raw(tmp_path / "no.con")
    (tmp_path / "e.fif").write_bytes(b"")
    with pytest.raises(SynapseError, match="empty"): read_raw(tmp_path / "e.fif")
    (tmp_path / "notes.docx").write_bytes(b"PK hello")
    with pytest.raises(SynapseError, match="no recording"): read_raw(tmp_path / "notes.docx")
    for name in ("a.con", "b.fif", "c.vhdr", "d.bdf", "f.xdf", "g.mat", "h.csv"):
        (tmp_path / name).write_bytes(b"this is not what the name says\n" * 30)
        with pytest.raises(SynapseError, match=name[:1]): read_raw(tmp_path / name)
        try: inspect(tmp_path / name)
        except SynapseError as e: assert name in str(e)


def muse(path, n=2560, marks=(256, 512), extra=None, **kw):
    r = np.random.default_rng(0); df = pd.DataFrame(r.normal(20, 10, (n, 4)).round(3), columns=["TP9", "AF7", "AF8", "TP10"])
    df.insert(0, "timestamps", (1000 + np.arange(n) / 256).round(4)); df["Marker0"] = 0; df.loc[list(marks), "Marker0"] = 1
    if extra: extra(df)
    df.to_csv(path, index=False, **kw)
    return path


def test_a_csv_without_markers(tmp_path):
    i = inspect(muse(tmp_path / "a.csv", extra=lambda d: d.pop("Marker0")))
    assert any("no column of markers" in w for w in i.warnings)
    study = get_study("folder", tmp_path)
    with pytest.raises(SynapseError, match="a.csv has no markers"): study.read_events(study.find_recordings()[0])


def test_a_csv_whose_clock_runs_backwards_or_stops(tmp_path):
    def back(d): d.loc[500:520, "timestamps"] -= 0.2
    assert any("backwards" in w for w in inspect(muse(tmp_path / "a.csv", extra=back)).warnings)
    def stop(d): d.loc[1500:, "timestamps"] += 3.0
    p = muse(tmp_path / "b.csv", extra=stop); raw = read_raw(p)
    assert raw.info["sfreq"] == 256 and "BAD_gap" in list(raw.annotations.description) and any("3.00 s were lost" in w for w in inspect(p).warnings)
    def none(d): d.timestamps = np.nan
    with pytest.raises(SynapseError, match="time stamps"): read_raw(muse(tmp_path / "c.csv", extra=none))


def test_nan_and_flat_channels_are_named(tmp_path):
    def spoil(d): d.loc[100:110, "AF7"] = np.nan; d["AF8"] = 3.0
    w = inspect(muse(tmp_path / "a.csv", extra=spoil)).warnings
    assert any("NaN" in x and "AF7" in x for x in w) and any("flat" in x and "AF8" in x for x in w)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("sep", ["\t", ",", ";"])
def test_tables_of_any_encoding(tmp_path, encoding, end, sep):
    rows = [["onset", "stim_file", "note"], ["1.5", "gâteau/g1.png", "n/a"], ["2.5", "null/n1.png", ""]]
    (tmp_path / "e.tsv").write_bytes((end.join(sep.join(r) for r in rows) + end).encode(encoding))
    t = read_table(tmp_path / "e.tsv")
    assert t.columns.tolist() == rows[0] and t.onset.tolist() == [1.5, 2.5] and t.stim_file.tolist() == ["gâteau/g1.png", "null/n1.png"] and t.note.isna().all()


def test_a_ragged_table_is_named(tmp_path):
    (tmp_path / "e.tsv").write_text("onset\tstim_file\n1.0\ta.png\n2.0\tb.png\tcat\n")
    with pytest.raises(SynapseError, match="line 3, saw 3"): read_table(tmp_path / "e.tsv")


def test_one_line_a_code_is_one_stream_of_pulses():
    r = np.random.default_rng(0); x = r.normal(0, 0.001, (5, 20000)); at = 1000 + np.arange(30) * 600
    for i, s in enumerate(at): x[i % 3 + 1, s:s + 50] += 1
    raw = mne.io.RawArray(x, mne.create_info(["MEG 1", "TRIGGER 001", "TRIGGER 002", "TRIGGER 003", "TRIGGER 004"], 1000.0, ["mag"] + ["misc"] * 4), verbose="ERROR")
    p = find_study_pulses(raw, find_lines(raw), n_expected=30)["digital"]
    assert np.abs(p.onset - at / 1000).max() < 0.0015 and p.value[:4].tolist() == [1, 2, 4, 1]
    assert len(find_study_pulses(raw, find_lines(raw), n_expected=10)["digital"].onset) == 10


def test_onset_units_by_content():
    k = np.arange(100)
    for sf in (128.0, 256.0, 500.0, 1000.0, 1200.0, 5000.0):
        t = 2 + 1.4 * k; length = 150.0
        assert onset_unit(t, length, sf) == 1 and onset_unit(t * 1000, length, sf) == 1e-3
        assert onset_unit(np.round(t * sf), length, sf) == (1e-3 if sf == 1000 else pytest.approx(1 / sf))
        assert onset_unit(t + 5e4, length, sf) == 1                                         # another clock: the span decides
    assert onset_unit(0.5 + 0.1 * k, 12.0, 1000.0) == 1 and onset_unit(500 + 100 * k, 12.0, 1000.0) == 1e-3


def test_formats_by_content(tmp_path):
    (tmp_path / "x").write_bytes(b"XDF:" + b"\0" * 20); (tmp_path / "y").write_bytes(b"\xffBIOSEMI" + b" " * 300)
    assert format_of(tmp_path / "x") == "XDF" and format_of(tmp_path / "y") == "BDF"


def test_inspect_is_quick_and_light(fif):
    "A FIF within 3 s of a bare interpreter, and no torch."
    code = f"import sys; from synapse_nb.studies.study import inspect_path; print(inspect_path({str(fif)!r})); print('torch' in sys.modules, 'sklearn' in sys.modules)"
    cpu = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])          # the machine may be busy with other tests: its time is ours
    before, t = cpu(), time.time()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    spent = min(time.time() - t, cpu() - before)
    assert "3 mag" in out and out.strip().endswith("False False")
    assert spent < 3, f"{spent:.1f} s"


# ---- other devices: light, a consumer headset, optically pumped magnetometers --------------------------------------------------------

@pytest.fixture()
def devices(tmp_path):
    from synapse_nb.studies.formats import write_headset_edf, write_opm, write_snirf
    r = np.random.default_rng(0); x = {"light": r.normal(1, .01, (8, 600)), "epoc": np.vstack([np.arange(1290) % 128, r.normal(4200, 8, (14, 1290)), np.zeros(1290)]), "opm": np.vstack([r.normal(0, 1e-12, (10, 5000)), .01 * r.normal(size=(1, 5000))])}
    names = ["COUNTER", *"AF3 F7 F3 FC5 T7 P7 O1 O2 P8 T8 FC6 F4 F8 AF4".split(), "MARKER"]; x["epoc"][15, [300, 700, 1100]] = [1, 2, 1]
    for s in (500, 1700, 3100, 4200): x["opm"][10, s:s + 80] += 3.3
    write_snirf(tmp_path / "nirs" / "S01_run1.snirf", x["light"], 10., [(1, 1), (1, 2), (2, 1), (2, 2)], stims={"face": [5., 20.], "house": [12.]})
    write_headset_edf(tmp_path / "edf" / "S01_run1.edf", x["epoc"], 128, names, ["", *["uV"] * 14, ""])
    (tmp_path / "opm").mkdir(); write_opm(tmp_path / "opm" / "S01_run1_raw.fif", x["opm"], 1000., ["NI-TRIG-1"])
    return tmp_path, x, names


def test_devices_open_as_what_they_are(devices):
    root, x, names = devices; light, epoc, opm = (read_raw(root / p) for p in ("nirs/S01_run1.snirf", "edf/S01_run1.edf", "opm/S01_run1_raw.fif"))
    assert counts(light) == {"fnirs_cw_amplitude": 8} and np.abs(light.get_data(["S2_D1 760"])[0] - x["light"][2]).max() < 1e-12 and list(light.annotations.description).count("face") == 2
    assert counts(epoc) == {"eeg": 14, "misc": 1, "stim": 1} and epoc.info["sfreq"] == 128 and np.abs(epoc.get_data(["AF4"])[0, :1290] * 1e6 - x["epoc"][14]).max() < .2
    assert counts(opm) == {"mag": 10, "misc": 1} and {int(c["coil_type"]) for c in opm.info["chs"][:10]} == {8002} and np.abs(opm.get_data()[:10] - x["opm"][:10]).max() < 1e-18
    assert events(inspect(root / "nirs/S01_run1.snirf"), "annotations") == {"face": 2, "house": 1} and events(inspect(root / "edf/S01_run1.edf"), "MARKER") == {1: 2, 2: 1}
    assert {e["channel"]: e["n"] for e in inspect_path(root / "opm/S01_run1_raw.fif").events} == {"NI-TRIG-1": 4}


def test_devices_go_into_the_store(devices, tmp_path):
    from synapse_nb.data.store import open_store
    from synapse_nb.studies.prepare import prepare
    root, x, _ = devices
    for folder, kw, kind, n in (("edf", {"codes": {"1": "left", "2": "right"}}, "eeg", 3), ("opm", {"trigger": "NI-TRIG-1"}, "mag", 4), ("nirs", {"codes": {"face": "face", "house": "house"}}, "fnirs_cw_amplitude", 3)):
        study = get_study("folder", root / folder, **kw); assert study.check() == {study.find_recordings()[0].key: n}
        p, = prepare(study, tmp_path / "store", f"pick({kind})", progress=False); s = open_store(p.path)
        assert set(s.ch_types) == {kind} and p.n_trials == n and p.modality == {"edf": "eeg", "opm": "meg", "nirs": "nirs"}[folder]
        want = read_raw(study.find_recordings()[0].path).get_data(picks=[s.ch_names[2]])[0]; assert np.abs(s.data[:, 2] - want).max() <= 1e-6 * np.abs(want).max()
        if folder == "opm": assert np.abs(s.events["sample"] - [500, 1700, 3100, 4200]).max() <= 1


@pytest.mark.parametrize("name,part", [("nirs/S01_run1.snirf", .6), ("edf/S01_run1.edf", .5), ("opm/S01_run1_raw.fif", .7)])
def test_truncated_devices_are_errors(devices, name, part):
    p = devices[0] / name; p.write_bytes(p.read_bytes()[:int(p.stat().st_size * part)])
    with pytest.raises(SynapseError, match=p.name): read_raw(p)


def test_headset_tables_of_other_programs(tmp_path):
    "Stamps in ms or as dates, packed, markers as words or on two lines, a column called stim, people named sub-07: the same trials. A word among the numbers is named."
    def trials(name, extra=None, file="subject1/session1/a.csv", **kw):
        p = tmp_path / name / file; p.parent.mkdir(parents=True); muse(p, extra=extra, **kw)
        s = get_study("n170", tmp_path / name); r, = s.find_recordings(); ev = s.read_events(r)
        return r, ev
    def stamps(f): return lambda d: d.__setitem__("timestamps", f(d["timestamps"]))
    _, want = trials("plain")
    assert want["sample"].tolist() == [256, 512] and set(want.category) == {"house"}
    same = lambda got: got[1]["sample"].tolist() == [256, 512] and set(got[1].category) == {"house"}
    assert same(trials("ms", stamps(lambda t: t * 1000))) and same(trials("us", stamps(lambda t: t * 1e6))) and same(trials("dates", stamps(lambda t: pd.to_datetime(t, unit="s").astype(str))))
    assert same(trials("packed", file="subject1/session1/a.csv.gz", compression="gzip")) and same(trials("stim", lambda d: d.insert(5, "stim", d.pop("Marker0"))))
    assert same(trials("words", lambda d: d.__setitem__("Marker0", d["Marker0"].map({0: "", 1: "House"})))) and same(trials("two lines", lambda d: d.__setitem__("Marker1", d["Marker0"])))
    r, ev = trials("named", file="sub-07/ses-02/a.csv"); assert (r.subject, r.session) == ("07", "02")
    def word(d): d["TP9"] = d["TP9"].astype(object); d.loc[700, "TP9"] = "oops"
    with pytest.raises(SynapseError, match="a.csv, row 702, column 'TP9': 'oops' is no number"): trials("word", word)
    def hole(d): d.loc[700, "TP9"] = np.nan
    from synapse_nb.data.preprocess import Pipeline
    p = tmp_path / "hole.csv"; muse(p, extra=hole)
    with pytest.raises(SynapseError, match=r"2\.734 s on: NaN"): Pipeline.parse("clamp(1)").apply(read_raw(p))


def test_renamed_folders_and_forgotten_files_are_named(tmp_path, test_data):
    import shutil
    shutil.copytree(test_data / "ctf_short/testdata_ctf_short_discontinuous.ds", tmp_path / "S01.v2.ds")
    with pytest.raises(SynapseError, match="was renamed: the files in it are called testdata_ctf_short_discontinuous"): read_raw(tmp_path / "S01.v2.ds")
    for f in (tmp_path / "S01.v2.ds").iterdir(): f.rename(f.with_name(f.name.replace("testdata_ctf_short_discontinuous", "S01.v2")))
    assert read_raw(tmp_path / "S01.v2.ds").n_times == 2402
    for s in (".vhdr", ".vmrk", ".eeg"): shutil.copy(test_data / f"brainvision/test{s}", tmp_path / f"b.2{s}")
    with pytest.raises(SynapseError, match="names 'test.eeg' as its DataFile, which is not beside it"): read_raw(tmp_path / "b.2.vhdr")


def write_edf(path, labels, x, sfreq=128, unit="uV"):
    "EDF by the book; `x` (n, seconds*sfreq) in `unit`."
    n, h = len(labels), lambda s, k: str(s).ljust(k)[:k].encode()
    b = h("0", 8) + h("X X X X", 80) + h("Startdate 01-JAN-2020 X X X", 80) + b"01.01.2000.00.00" + h(256 * (n + 1), 8) + h("", 44) + h(x.shape[1] // sfreq, 8) + h(1, 8) + h(n, 4)
    for v, k in ((labels, 16), ([""] * n, 80), ([unit] * n, 8), ([-1000] * n, 8), ([1000] * n, 8), ([-32768] * n, 8), ([32767] * n, 8), ([""] * n, 80), ([sfreq] * n, 8), ([""] * n, 32)): b += b"".join(h(w, k) for w in v)
    d = np.round((x + 1000) / 2000 * 65535 - 32768).astype("<i2")
    path.write_bytes(b + b"".join(d[:, i:i + sfreq].tobytes() for i in range(0, x.shape[1], sfreq)))


@pytest.mark.parametrize("unit", ["uV", ""])
def test_an_edf_whose_trigger_line_is_in_microvolts(tmp_path, unit):
    x = np.random.default_rng(0).normal(0, 20, (3, 1280)); x[2] = 0; x[2, [300, 700, 1100]] = 1, 2, 1
    write_edf(tmp_path / "S1.EDF", ["Fp1", "Oz", "Trigger"], x, unit=unit)
    s = get_study("folder", tmp_path); ev = s.read_events(s.find_recordings()[0])
    assert ev["sample"].tolist() == [300, 700, 1100] and ev.value.tolist() == ["1", "2", "1"]
    if unit: assert np.abs(read_raw(tmp_path / "S1.EDF", preload=True).get_data("Oz") - x[1] * 1e-6).max() < 1e-7


def test_parts_of_a_split_fif_and_notes_are_no_recordings(tmp_path):
    x = np.zeros((3, 300_000)); x[2, [1000, 2500]] = 1
    raw = mne.io.RawArray(x, mne.create_info(["MEG001", "MEG002", "STI101"], 1000., ["mag", "mag", "stim"]), verbose="error")
    raw.save(tmp_path / "S01_raw.fif", split_size="2MB", verbose="error"); (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert len(list(tmp_path.glob("*.fif"))) > 1
    s = get_study("folder", tmp_path); r, = s.find_recordings(); assert r.path.name == "S01_raw.fif" and s.read_events(r)["sample"].tolist() == [1000, 2500]
