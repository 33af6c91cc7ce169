"""Timing facts of real recordings and tables, exact. Skipped where the recordings are absent."""
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.align import align, align_files, align_table
from synapse_nb.data.raw import read_raw, read_table
from synapse_nb.data.triggers import find_pulses_raw, find_trigger_lines

KIT = "kit/test.sqd"
RICOH = "kit/Example_RICOH160-1_10021-export_anonymyze.con"
SINE = "kit/ArtificalSignalData_Yokogawa_1khz.con"


@pytest.fixture(scope="module")
def kit(test_data): return read_raw(test_data / KIT)


def test_kit_trigger_and_what_the_person_saw(kit):
    trigger, screen = find_pulses_raw(kit, "MISC 001"), find_pulses_raw(kit, "MISC 032")
    assert trigger.sample.tolist() == [269, 1553] and screen.sample.tolist() == [274, 1557]
    assert (screen.sample - trigger.sample).tolist() == [5, 4] and np.allclose(trigger.width, .012, atol=1.2e-3)
    assert screen.polarity == "both" and screen.value.tolist() == [1, -1]


def test_kit_line_is_found_and_idle_lines_are_not_pulses(kit):
    table = find_trigger_lines(kit)
    assert table.channel[0] == "MISC 001" and find_pulses_raw(kit).sample.tolist() == [269, 1553]
    assert set(table.channel[table.n_pulses > 0]) == {"MISC 001", "MISC 032"} and "STI 014" not in set(table.channel)


def test_ricoh(test_data):
    raw = read_raw(test_data / RICOH)
    assert find_pulses_raw(raw, "TRIGGER 002").sample.tolist() == [446, 1079, 1579] and find_pulses_raw(raw, "TRIGGER 003").sample.tolist() == [1078]
    assert find_pulses_raw(raw).channel == "TRIGGER 002"
    both = find_pulses_raw(raw, ["TRIGGER 002", "TRIGGER 003"])
    assert both.value.tolist() == [1, 3, 1]


def test_yokogawa_sine(test_data):
    raw = read_raw(test_data / SINE)
    p, half = find_pulses_raw(raw, "TRIGGER 001"), find_pulses_raw(raw, "TRIGGER 001", level=.5)
    assert len(p) == 24 and np.allclose(p.onset * 1000, 199.5 + 200 * np.arange(24), atol=1e-6)         # the first rise lies before the recording
    assert len(half) == 25 and np.allclose(np.diff(half.onset), .2, atol=1e-9)
    with pytest.raises(SynapseError, match="outside"): find_pulses_raw(raw, "TRIGGER 001", level=1.5)


def test_neuromag(test_data):
    p = find_pulses_raw(read_raw(test_data / "neuromag_triggers" / "test_elekta_3ch_raw.fif"))
    assert len(p) == 162 and p.channel == "STI101" and np.diff(p.sample).min() >= 401
    assert [int((p.value == 2**k).sum()) for k in range(8)] == [26, 25, 18, 16, 19, 22, 17, 19]


def test_biosemi(test_data):
    p = find_pulses_raw(read_raw(test_data / "xdf_bdf" / "test.bdf"))
    assert len(p) == 40 and set(p.value.tolist()) == {255} and "already on" in p.rejected[0][1]


def test_brainvision_markers(test_data):
    p = find_pulses_raw(read_raw(test_data / "brainvision" / "test.vhdr"), "annotations")
    assert (p.value == 255).sum() == 5 and (p.value == 253).sum() == 2 and len(p) == 7 and len(p.rejected) == 6


def photodiode(test_data):
    beh, pd_ = (read_table(test_data / "photodiode_tables" / n) for n in ("pd_beh.tsv", "pd_events.tsv"))
    return beh, pd.to_numeric(pd_.pd_parser_sample, errors="coerce")


def test_photodiode_tables(test_data):
    beh, sample = photodiode(test_data)
    a = align(sample.dropna().to_numpy() / 1000, beh.fix_onset_time)
    assert a.verdict == "repaired" and a.lost.tolist() == np.flatnonzero(sample.isna()).tolist() and len(a.lost) == 12 and len(a.extra) == 0
    assert abs(1000 * (1 + a.drift_ppm * 1e-6) - 1000.004) < 5e-4 and abs(a.residuals.std(ddof=1) - 5.8e-3) < 5e-5 and abs(np.abs(a.residuals).max() - .0163) < 5e-4
    fixed, b = align_table(sample.dropna().to_numpy() / 1000, beh)
    assert (fixed.onset_source == "map").sum() == 12 and np.array_equal(b.lost, a.lost)


def things_meg(test_data):
    root = test_data / "things_meg_events"
    for p in sorted((root / "v1.0.3").rglob("*_events.tsv")):
        yield p.name[12:37], read_table(p), read_table(root / "v3.0.0" / p.relative_to(root / "v1.0.3"))


def test_things_meg_scheduled_against_optical(test_data):
    from synapse_nb.studies.things import compare_onsets
    runs = {name: (a.onset.to_numpy(float), b.onset.to_numpy(float)) for name, a, b in things_meg(test_data)}
    t = compare_onsets({k: v[0] for k, v in runs.items()}, {k: v[1] for k, v in runs.items()}).set_index("run")
    ok = t[~t.shifted]
    assert len(t) == 22 and .093 < ok.sd.min() and ok.sd.max() < .099
    d = np.concatenate([b - a for k, (a, b) in runs.items() if not t.shifted[k]])
    assert abs(d.std() - .0955) < .002 and abs(d.mean() + .032) < .005
    # ses-08 run-09 lies wholly apart (-499..-217 ms); ses-02 run-03 carries a constant offset too (about -250 ms), less than its trials scatter
    assert [i.removesuffix("_e") for i in t.index[t.odd]] == ["ses-08_task-main_run-09"] and [i.removesuffix("_e") for i in t.index[t.shifted]] == ["ses-02_task-main_run-03", "ses-08_task-main_run-09"]
    apart = t[(t["max"] < ok["min"].min())]
    assert [i.removesuffix("_e") for i in apart.index] == ["ses-08_task-main_run-09"] and abs(apart["min"].iloc[0] + .499) < 1e-3 and abs(apart["max"].iloc[0] + .217) < 1e-3


def test_things_meg_runs_line_up(test_data):
    "In each run the log's jitter stands one trial too early, so that its intervals alone would fit better one picture later: the count must win."
    jitter = []
    for name, a, b in things_meg(test_data):
        r = align(b.onset.to_numpy(float), a.onset.to_numpy(float))
        assert r.verdict == "ok" and len(r.pairs) == len(a) and (r.pairs[:, 0] == r.pairs[:, 1]).all() and abs(r.jitter - .0945) < .003, name
        jitter.append(r.jitter)
    assert len(jitter) == 22 and abs(np.median(jitter) - .0945) < .0015


def test_things_meg_with_lost_pulses_is_refused_or_right(test_data):
    "Without the count nothing tells the log's misplaced jitter from a lost first picture: no run may come back moved by one."
    r = np.random.default_rng(0)
    for name, a, b in list(things_meg(test_data))[::5]:
        keep = np.sort(r.permutation(len(b))[:-2])
        x = align(b.onset.to_numpy(float)[keep], a.onset.to_numpy(float))
        assert x.verdict == "refused" or (x.pairs[:, 0] == keep[x.pairs[:, 1]]).all(), name


@pytest.mark.parametrize("version, unit", [("v1.0.0", 1000.), ("v1.2.0", 1.)])
def test_things_eeg_clock(test_data, version, unit):
    t = read_table(test_data / "things_eeg_events" / version / "sub-02_task-rsvp_events.tsv")
    a = align(t.onset.to_numpy(float) / unit, t.time_stimon.to_numpy(float))
    assert a.verdict == "ok" and len(a.pairs) == 24_648 and abs(a.jitter - .29e-3) < 1e-5 and abs(a.drift_ppm + 1.5) < .1


def test_xdf_clock_resets(test_data):
    pyxdf = pytest.importorskip("pyxdf")
    load = lambda **kw: {s["info"]["type"][0]: s for s in pyxdf.load_xdf(str(test_data / "xdf_bdf" / "clock_resets.xdf"), **kw)[0]}
    raw, mended = load(synchronize_clocks=False, dejitter_timestamps=False)["Markers"]["time_stamps"], load()["Markers"]["time_stamps"]
    a = align(raw, mended)                               # the recorder's clock was set back once, the true times jump by five minutes
    assert a.verdict == "repaired" and any("1 clock reset" in r for r in a.repaired) and len(a.pairs) == 175 and (a.pairs[:, 0] == a.pairs[:, 1]).all()
    assert np.abs(a.corrected_onsets()[0] - raw).max() < 1e-6


def test_files(test_data, tmp_path):
    (tmp_path / "log.tsv").write_bytes("﻿onset\timage\n0.3\ta.jpg\n1.584\tb.jpg\n".encode("utf-16"))
    fixed, a = align_files(test_data / KIT, tmp_path / "log.tsv", channel="MISC 032", report=tmp_path / "r.html", out=tmp_path / "o.tsv")
    text = (tmp_path / "r.html").read_text()
    assert ("http" not in text.replace("http://www.w3.org", "")) and a.verdict.upper()[:3] in text.upper()
    if fixed is not None: assert fixed["sample"].tolist() == [274, 1557] and read_table(tmp_path / "o.tsv").image.tolist() == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("file, channel, samples", [(KIT, "MISC 001", [269, 1553]), (KIT, "MISC 032", [274, 1557]), (RICOH, "TRIGGER 002", [446, 1079, 1579]), (RICOH, "TRIGGER 003", [1078])])
def test_real_lines_in_other_shapes(test_data, file, channel, samples):
    "The same lines upside down, in other units, on an offset, with coarse steps, cropped: the same instants."
    from synapse_nb.data.triggers import find_pulses
    raw = read_raw(test_data / file); x, fs = raw.get_data(picks=[channel])[0], raw.info["sfreq"]
    for y in (-x, 5 - x, 1e-3 * x, 1e3 * x, x - 10, np.round(x * 1000), x + .02 * np.random.default_rng(0).normal(size=len(x))):
        assert np.abs(find_pulses(y, fs).sample - samples).max() <= 1
    crop = samples[0] - 40
    assert np.abs(find_pulses(x[crop:], fs).sample + crop - samples).max() <= 1
    if channel != "MISC 032": assert find_pulses(np.round(x * 4) / 4, fs).sample.tolist() == samples


def test_neuromag_codes_in_other_shapes(test_data):
    from synapse_nb.data.triggers import find_pulses
    x = read_raw(test_data / "neuromag_triggers" / "test_elekta_3ch_raw.fif").get_data(picks=["STI101"])[0]; p = find_pulses(x, 1000.)
    same = lambda q, v=p.value, t=p.sample: q.sample.tolist() == list(t) and q.value.tolist() == list(v)
    assert same(find_pulses(x + 4096, 1000.), p.value + 4096)                                # a line that is held
    y = x.copy(); y[p.sample] = 1
    assert same(find_pulses(y, 1000.))                                                       # the code settles one sample late
    k = p.sample[10] + 3
    assert same(find_pulses(x[k:], 1000.), p.value[11:], p.sample[11:] - k)                  # starts inside a pulse
    y = x.copy()
    for t in p.sample[:-1]: y[t + 5:t + 60] += 256                                           # a button while the code is up
    q = find_pulses(y, 1000.)
    assert q.sample[q.value < 256].tolist() == p.sample.tolist() and sum("let go" in why for _, why in q.rejected) == 161


@pytest.mark.parametrize("n", [1, 20, 60])
def test_photodiode_tables_with_other_numbers_missing(test_data, n):
    beh, sample = photodiode(test_data); seen = np.flatnonzero(sample.notna())
    keep = np.sort(np.random.default_rng(n).permutation(seen)[:-n])
    a = align(sample[keep].to_numpy() / 1000, beh.fix_onset_time)
    assert a.lost.tolist() == np.setdiff1d(np.arange(300), keep).tolist() and len(a.extra) == 0
    b = align(sample[keep].to_numpy() / 500 * 500 / 1024, beh.fix_onset_time)                # a rate of 1000 declared as 1024
    assert b.verdict == "repaired" and "declared" in b.repaired[0] and b.lost.tolist() == a.lost.tolist()


@pytest.mark.parametrize("at", [20, 90, 150])
def test_xdf_markers_with_resets_elsewhere(test_data, at):
    pyxdf = pytest.importorskip("pyxdf")
    t = {s["info"]["type"][0]: s for s in pyxdf.load_xdf(str(test_data / "xdf_bdf" / "clock_resets.xdf"))[0]}["Markers"]["time_stamps"]
    for jump, again in ((33.3, 0), (-(t[at] - t[at - 1]) - 50, 0), (33.3, -77)):
        y = t.copy(); y[at:] += jump; y[min(at + 15, 170):] += again
        a = align(y, t)
        assert a.verdict == "repaired" and len(a.pairs) == 175 and (a.pairs[:, 0] == a.pairs[:, 1]).all()
