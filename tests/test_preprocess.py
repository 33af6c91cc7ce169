"Preprocessing equals MNE's whole-array result, does not alias, and finds what was planted."
import mne
import numpy as np
import pytest

from synapse_nb.core import SynapseError, find_test_data
from synapse_nb.data import preprocess as pp
from synapse_nb.data.preprocess import PRESETS, Pipeline, WindowPipeline

mne.set_log_level("error")


def raw_of(n_times=20000, sfreq=1000.0, n=4, seed=0, types="eeg", level=0.0, scale=1e-6):
    g = np.random.default_rng(seed)
    x = np.cumsum(g.normal(size=(n, n_times)), 1) * scale * .05 + g.normal(size=(n, n_times)) * scale + level
    return mne.io.RawArray(x, mne.create_info([f"C{i}" for i in range(n)], sfreq, types))


def worst(ours, theirs):
    "Largest difference, of each channel's maximum."
    assert ours.shape == theirs.T.shape
    return (np.abs(ours.T - theirs).max(1) / np.abs(theirs).max(1)).max()


CASES = [
    ("bandpass(0.1,40)", lambda r: r.filter(.1, 40)), ("highpass(1)", lambda r: r.filter(1, None)), ("lowpass(30)", lambda r: r.filter(None, 30)), ("notch(50)", lambda r: r.notch_filter(50)),
    ("notch(50,100,150)", lambda r: r.notch_filter([50, 100, 150])), ("average_reference", lambda r: r.set_eeg_reference()), ("reference(C0,C1)", lambda r: r.set_eeg_reference(["C0", "C1"])),
    ("bandpass(1,40)|resample(200)", lambda r: r.filter(1, 40).resample(200, method="polyphase")), ("resample(120)", lambda r: r.resample(120, method="polyphase")),
    ("resample(256)", lambda r: r.resample(256, method="polyphase")), ("notch(50)|car|bandpass(0.1,100)|resample(250)", lambda r: r.notch_filter(50).set_eeg_reference().filter(.1, 100).resample(250, method="polyphase")),
    ("resample(500)|bandpass(2,120)", lambda r: r.resample(500, method="polyphase").filter(2, 120)),
]


@pytest.mark.parametrize("text, way", CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("level", [0.0, 0.02])
def test_equals_mne(text, way, level):
    raw = raw_of(40000, level=level)
    out, fs, info = Pipeline.parse(text).apply(raw)
    ref = way(raw.copy())
    assert fs == ref.info["sfreq"] == info["sfreq"] and out.dtype == np.float32
    assert worst(out, ref.get_data()) <= 1e-5


@pytest.mark.parametrize("text, n", [("bandpass(0.1,100)|decimate(4)", 4), ("bandpass(0.1,100)|decimate_to(250)", 4), ("lowpass(40)|notch(20)|decimate(5)", 5), ("bandpass(0.1,40)|average_reference|decimate(8)", 8)])
def test_decimation(text, n):
    raw = raw_of(40001)
    r = raw.copy()
    for s in Pipeline.parse(text).steps:
        if s.name == "bandpass": r.filter(*s.args)
        if s.name == "lowpass": r.filter(None, s.args[0])
        if s.name == "notch": r.notch_filter(s.args)
        if s.name == "average_reference": r.set_eeg_reference()
    out, fs, _ = Pipeline.parse(text).apply(raw)
    assert fs == 1000 / n and worst(out, r.get_data()[:, ::n]) <= 1e-5


@pytest.mark.parametrize("values", [3000, 8000, 400_000])
def test_block_borders_cannot_be_seen(monkeypatch, values):
    "However the recording is read, and with frames that are shorter than the recording."
    raw = raw_of(60000, n=3)
    text = "notch(50)|average_reference|bandpass(1,40)|resample(160)"
    ref = raw.copy().notch_filter(50).set_eeg_reference().filter(1, 40).resample(160, method="polyphase").get_data()
    read = pp._read_blocks
    monkeypatch.setattr(pp, "_read_blocks", lambda raw, picks: read(raw, picks, values))
    monkeypatch.setattr(pp, "_fft_plan", lambda taps, n, down, c: (16384 * down, (16384 * down - taps + 1) // down * down))
    assert worst(Pipeline.parse(text).apply(raw)[0], ref) <= 1e-5


@pytest.mark.parametrize("n_times", [1, 2, 7, 100, 999, 3300, 3301, 6601])
def test_short_recordings(n_times):
    raw = raw_of(n_times, level=1e-4)
    out = Pipeline.parse("bandpass(1,40)").apply(raw)[0]
    if n_times > 7: assert worst(out, raw.copy().filter(1, 40).get_data()) <= 1e-5
    if n_times == 100: assert worst(Pipeline.parse('resample(30)').apply(raw)[0], raw.copy().resample(30, method='polyphase').get_data()) <= 1e-5
    assert out.shape == (n_times, 4) and np.isfinite(out).all()
    assert Pipeline.parse("lowpass(40)|decimate(5)").apply(raw)[0].shape[0] == -(-n_times // 5)


def test_aliasing_is_an_error():
    raw = raw_of(5000)
    for text in ["decimate(2)", "bandpass(0.1,100)|decimate(5)", "highpass(1)|decimate(2)", "bandpass(0.5,120)|decimate_to(125)", "resample(500)|decimate(2)"]:
        with pytest.raises(SynapseError, match="alias"): Pipeline.parse(text).apply(raw)
    tone = raw.copy(); tone._data[:] = np.sin(2 * np.pi * 180 * raw.times)                 # 180 Hz would come back as 20 Hz at 200 Hz
    for text in ["resample(200)", "lowpass(50)|decimate(5)"]:
        assert np.abs(Pipeline.parse(text).apply(tone)[0][200:-200]).max() < .01


def test_text_is_identity():
    assert Pipeline.parse(" notch( 50 ) |car| bandpass(0.10,40)").text == "notch(50)|average_reference|bandpass(0.1,40)"
    for name, p in PRESETS.items():
        assert Pipeline.parse(name).text == Pipeline.parse(p.offline).text and WindowPipeline.parse(Pipeline.parse("").text or p.window).text == p.window
    a, b = Pipeline.parse("bandpass(0.1,40)"), Pipeline.parse("bandpass(0.1,41)")
    assert a.key != b.key and a != b


@pytest.mark.parametrize("text, word", [("bandpas(1,40)", "bandpass"), ("bandpass(1)", "2 argument"), ("bandpass(a,2)", "number"), ("|", "read the step"), ("resample(0)", "above 0"), ("notch(600)", "half of the rate"),
                                        ("bandpass(40,1)", "low edge"), ("pick(C9)", "C9"), ("decimate(1.5)", "whole"), ("bads(X)", "X")])
def test_mistakes_are_named(text, word):
    with pytest.raises(SynapseError, match=word): Pipeline.parse(text).apply(raw_of(3000))


def test_picks():
    raw = raw_of(3000)
    assert Pipeline.parse("bandpass(1,40)").apply(raw, picks="eeg")[0].shape == (3000, 4) and Pipeline.parse("").apply(raw, picks=["C3", "C1"])[2]["ch_names"] == ["C3", "C1"]
    with pytest.raises(SynapseError, match="mag"): Pipeline.parse("").apply(raw, picks="mag")


def test_nan_is_named():
    raw = raw_of(3000); raw._data[2, 1500] = np.nan
    with pytest.raises(SynapseError, match="C2"): Pipeline.parse("bandpass(1,40)").apply(raw)


def test_window_presets():
    "Length, start and rate of each window of the original, and its order: z-score, then baseline, then the last part."
    want = {"base": (48, .2), "base_1000": (200, .2), "base_512": (120, 0.), "fs1000_dura200": (208, .2), "fs1000_dura500": (500, 0.), "fs1000_dura512": (512, 0.), "dream_diffusion": (512, 0.),
            "fs120_dura200": (24, .2), "fs240_dura400_eegnet": (96, .1), "fs120_dura1500_eegnet": (180, -.5), "things-eeg": (275, -.1), "things-meg": (281, -.1)}
    rates = {n: next((s.args[0] for s in Pipeline.parse(n).steps if s.name in ("resample", "decimate_to"))) for n in PRESETS}
    for name, (n, t) in want.items():
        p = PRESETS[name]; raw_n = round((p.tmax - p.tmin) * rates[name])
        assert WindowPipeline.parse(name).span(raw_n, rates[name], p.tmin) == (n, pytest.approx(t)), name
    x = np.random.default_rng(0).normal(size=(2, 3, 508)) * 1e-13 + 5e-12
    z = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(WindowPipeline.parse("fs1000_dura200").apply(x, 1000., -.1), (z - z[..., :100].mean(-1, keepdims=True))[..., -208:].clip(-12, 12), atol=1e-9)


def test_robust_scale_is_that_of_the_recording():
    raw = raw_of(30000)
    x = raw.get_data(); q = np.quantile(x, [.25, .5, .75], axis=1)
    assert np.allclose(Pipeline.parse("robust_scale|clamp(5)").apply(raw)[0].T, ((x - q[1][:, None]) / (q[2] - q[0])[:, None]).clip(-5, 5), atol=1e-3)


def test_memory_does_not_grow_with_length():
    "What is held at once: the blocks in flight, not the recording."
    import tracemalloc
    def peak(n):
        raw = raw_of(n, n=8); out = np.empty((n // 4, 8), np.float32)
        tracemalloc.start(); Pipeline.parse("bandpass(2,40)|decimate(4)").apply(raw, out); p = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return p
    peak(20000)
    assert peak(1_600_000) < 1.3 * peak(800_000)


@pytest.mark.skipif(find_test_data("neuromag_raw5s") is None, reason="real recordings are absent (set SYNAPSE_TEST_DATA)")
def test_real_recording_of_three_sensor_types():
    f = next(iter(sorted(find_test_data("neuromag_raw5s").rglob("*_sss.fif"))))
    raw = mne.io.read_raw(f, preload=False)
    out, fs, info = Pipeline.parse("bandpass(1,40)").apply(raw)
    assert {"grad", "mag", "eeg"} <= set(info.get_channel_types()) and not set(info.get_channel_types()) & {"stim", "misc"}
    ref = raw.copy().load_data().pick(info["ch_names"], exclude=()).filter(1, 40, picks="all").get_data()
    live = np.abs(ref).max(1) > 0
    assert worst(out[:, live], ref[live]) <= 1e-5


@pytest.mark.skipif(find_test_data() is None, reason="real recordings are absent (set SYNAPSE_TEST_DATA)")
@pytest.mark.parametrize("folder, pattern", [("kit", "test.sqd"), ("kit", "*RICOH160-1*"), ("ctf_short", "*.ds"), ("brainvision", "*.vhdr"), ("xdf_bdf", "*.bdf"), ("neuromag_triggers", "*.fif"), ("muse_n170", "*.csv")])
def test_real_formats_into_the_store(folder, pattern, tmp_path):
    from synapse_nb.data.raw import read_raw
    from synapse_nb.data.store import channels_of, open_store, write_store
    files = sorted(p for p in find_test_data(folder).rglob(pattern) if p.name[0] != ".") if find_test_data(folder) else []
    if not files: pytest.skip(f"no {pattern} in {folder}")
    raw = read_raw(files[0])
    s = Pipeline.parse("bandpass(1,40)|resample(100)").stream(raw)
    store = open_store(write_store(tmp_path / "x_k.h5", s, s.sfreq, **channels_of(s.info)))
    assert store.sfreq == 100 and store.n_times == round(raw.n_times * 100 / raw.info["sfreq"]) and (np.asarray(store.data).std(0) > 0).mean() > .8
    ref = raw.copy().load_data().pick(store.ch_names, exclude=()).filter(1, 40, picks="all").resample(100, method="polyphase").get_data() if raw.n_times % raw.info["sfreq"] == 0 else None
    if ref is not None: assert worst(np.asarray(store.data)[:, np.abs(ref).max(1) > 0], ref[np.abs(ref).max(1) > 0]) <= 1e-5


def planted(n_times=250 * 60, sfreq=250., seed=1):
    "EEG with a blink, a heartbeat and channels that are bad in three ways; what was planted."
    g = np.random.default_rng(seed)
    names = [c for c in mne.channels.make_standard_montage("biosemi64").ch_names if c[:2] != "Iz"]
    info = mne.create_info([*names, "EOG", "ECG"], sfreq, ["eeg"] * len(names) + ["eog", "ecg"]).set_montage("biosemi64", on_missing="ignore")
    pos = np.array([c["loc"][:3] for c in info["chs"][:len(names)]])
    sources = np.stack([mne.filter.filter_data(g.normal(size=n_times), sfreq, 1, 30) for _ in range(8)])
    spread = np.exp(-((pos[:, None] - pos[g.integers(0, len(pos), 8)][None]) ** 2).sum(-1) / .006)
    brain = spread @ sources * 3e-5 + g.normal(size=(len(names), n_times)) * 1e-6
    blink = np.convolve(g.random(n_times) < 1 / 900, np.hanning(75), "same")
    beat = np.zeros(n_times); beat[(np.arange(40, n_times - 20, 210) + g.integers(-15, 15, len(range(40, n_times - 20, 210))))] = 1
    beat = np.convolve(beat, np.hanning(13) * np.sin(np.linspace(0, 9, 13)), "same")
    maps = {"blink": np.exp(-((pos - [0, .1, 0]) ** 2).sum(1) / .004), "beat": pos[:, 0] / .1}
    parts = {"blink": np.outer(maps["blink"], blink) * 2e-4, "beat": np.outer(maps["beat"], beat) * 4e-5}
    raw = mne.io.RawArray(np.vstack([brain + parts["blink"] + parts["beat"], blink * 3e-4 + g.normal(size=n_times) * 2e-6, beat * 1e-3 + g.normal(size=n_times) * 1e-5]), info)
    return raw, parts, names


def test_ica_takes_out_what_was_planted():
    raw, parts, names = planted()
    s = Pipeline.parse("ica(12)").stream(raw)
    gone = raw.get_data("eeg") - np.concatenate(list(s)).T
    assert "eyes" in s.notes[0]
    for kind in parts:
        i = int(np.abs(parts[kind]).std(1).argmax())
        others = sum(parts[k] for k in parts if k != kind)[i]
        r = np.corrcoef(gone[i] - others, parts[kind][i])[0, 1]
        assert r > .9, (kind, r, s.notes)


def test_exactly_the_planted_bad_channels_are_found():
    raw, _, names = planted()
    g = np.random.default_rng(5)
    for bad, x in {"P3": g.normal(size=raw.n_times) * 2e-4, "O1": np.zeros(raw.n_times), "C4": raw.get_data("C4")[0] + g.normal(size=raw.n_times) * 4e-5}.items(): raw._data[names.index(bad)] = x
    s = Pipeline.parse("find_bads").stream(raw)
    assert s.info["bads"] == ["C4", "O1", "P3"], s.notes
    clean = Pipeline.parse("find_bads").stream(planted(seed=2)[0])
    assert clean.info["bads"] == []


def test_interpolation_is_mnes():
    raw, _, names = planted(2500)
    out, _, info = Pipeline.parse("bads(P3,Fz)|interpolate_bads").apply(raw)
    ref = raw.copy(); ref.info["bads"] = ["P3", "Fz"]
    assert info["bads"] == [] and worst(out, ref.interpolate_bads().get_data("eeg")) <= 1e-5


def test_bad_channels_stay_out_of_the_average():
    raw, _, names = planted(2500)
    ref = raw.copy(); ref.info["bads"] = ["P3"]; ref.set_eeg_reference()
    good = [i for i, n in enumerate(names) if n != "P3"]
    assert worst(Pipeline.parse("bads(P3)|average_reference").apply(raw)[0][:, good], ref.get_data([names[i] for i in good])) <= 1e-5
