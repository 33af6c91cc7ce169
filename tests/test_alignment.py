"""Alignment on simulated sessions: no frame wrong in what is accepted, what can be recovered is recovered, what cannot is refused."""
import importlib.util
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.align import align, align_table
from synapse_nb.data.triggers import find_pulses

spec = importlib.util.spec_from_file_location("alignment_benchmark", Path(__file__).resolve().parents[1] / "benchmarks" / "alignment.py")
bench = importlib.util.module_from_spec(spec)
import sys

sys.modules["alignment_benchmark"] = bench
spec.loader.exec_module(bench)


def held(rows):
    "Every bar holds; speed is the benchmark's affair (`make bench`), not a test's."
    lines = []
    result = bench.report(rows, lines.append)
    assert all(r["holds"] or "CPU time" in r["what"] for r in result["rows"]), "\n".join(lines)


def test_200_sessions():
    held([bench.run(k) for k in range(200)])


@pytest.mark.slow
def test_2000_sessions():
    with ProcessPoolExecutor(2) as pool: held(list(pool.map(bench.run, range(1000, 3000), chunksize=8)))


def test_the_generator_repeats_and_judges_before_the_aligner():
    a, b = bench.simulate(5), bench.simulate(5)
    assert np.array_equal(a.x, b.x) and a.recoverable == b.recoverable
    kinds = {bench.simulate(k).recoverable for k in range(30)}
    assert kinds == {"yes", "no", "open"}


@pytest.fixture(scope="module")
def film():
    r = np.random.default_rng(3)
    e = np.arange(13500) * 2 / 29.97
    return e, 2.1 + e * (1 + 80e-6) + r.uniform(0, .003, len(e)), r


def test_fifteen_minutes_well_under_a_second(film):
    e, light, r = film
    keep = r.random(len(e)) > .08
    keep[[0, -1]] = True
    t = time.process_time()
    a = align(light[keep], e, span=(0, 906))
    assert time.process_time() - t < .9 and a.verdict == "repaired" and np.abs(a.corrected_onsets()[0] - light).max() < .0035
    assert a.lost.tolist() == np.flatnonzero(~keep).tolist() and abs(a.drift_ppm - 80) < 1


def test_map_and_inverse(film):
    e, light, _ = film
    a = align(light, e, span=(0, 906))
    assert np.allclose(a.to_stimulus(a.to_recording(e)), e, atol=1e-9) and a.verdict == "ok" and a.summary().startswith("Trusted as it is")


@pytest.mark.parametrize("what", ["both ends", "other film", "other log", "shorter log"])
def test_never_guesses(film, what):
    e, light, r = film
    if what == "both ends": a = align(light[700:-900], e, span=(light[700] - .03, light[-900] + .03))
    if what == "other film": a = align(light[:11000], e, span=(0, 906))
    if what == "shorter log": a = align(light, e[:12000], span=(0, 906))
    if what == "other log": a = align(np.cumsum(r.uniform(1.3, 1.7, 200)), np.cumsum(r.uniform(1.3, 1.7, 200)), span=(0, 400))
    assert a.verdict == "refused" and len(a.reason) > 20 and a.to_dict()["lag"] is None
    with pytest.raises(SynapseError, match="refused"): a.corrected_onsets()


def test_a_known_lag_decides(film):
    e, light, _ = film
    a = align(light[700:-900], e, span=(light[700] - .03, light[-900] + .03), nominal_lag=(2.1, .01))
    assert a.verdict == "repaired" and np.abs(a.corrected_onsets()[0] - light)[700:-900].max() < .0035


def test_declared_rate_is_found():
    e = np.arange(3000) * 2 / 29.97
    light = 1. + np.arange(3000) * 2 / 25.
    a = align(light, e, span=(0, 245))
    assert a.verdict == "repaired" and "declared" in a.repaired[0] and np.abs(a.corrected_onsets()[0] - light).max() < 1e-3


@pytest.mark.parametrize("jump", [-.35, .71, 260.])
def test_clock_reset(jump):
    r = np.random.default_rng(0)
    e = np.cumsum(r.uniform(1.3, 1.7, 160))
    light = e + .037 + r.uniform(0, .002, 160)
    light[80:] += jump
    a = align(light, e)
    assert a.verdict == "repaired" and "1 clock reset bridged" in a.repaired and np.abs(a.corrected_onsets()[0] - light).max() < 1e-9
    assert len(a.pairs) == 160


def test_tables_in_other_units():
    import pandas as pd
    r = np.random.default_rng(1)
    e = np.cumsum(r.uniform(.8, 1.2, 90)) + 3
    table = pd.DataFrame(dict(onset=e * 1000, image=[f"i{k}" for k in range(90)]))
    fixed, a = align_table(np.delete(e + .05, [7, 8]), table, sfreq=500.)
    assert np.abs(fixed.onset - e - .05).max() < 2e-3 and fixed.onset_source[7] == "map" and (fixed["sample"] == np.round(fixed.onset * 500)).all()


LINES = {
    "plain": lambda x, r: 5 * x, "idle at 5 V, dips": lambda x, r: 5 - 4.4 * x, "negative": lambda x, r: -3 * x, "millivolts on an offset": lambda x, r: .02 + .004 * x, "a tenth of noise": lambda x, r: x + .1 * r.normal(size=len(x)),
    "baseline wander": lambda x, r: x + 3 * np.sin(np.arange(len(x)) / 4000), "ripple of the screen": lambda x, r: x * (1 + .2 * np.sin(np.arange(len(x)) * 2 * np.pi / 11.7)), "counts": lambda x, r: np.round(900 + 800 * x + 4 * r.normal(size=len(x)))}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("width", [12, 60])
def test_lines(name, width):
    r = np.random.default_rng(7)
    on = 400 + np.cumsum(r.integers(300, 600, 60))
    x = np.zeros(on[-1] + 900)
    for k in on: x[k:k + width] = 1
    p = find_pulses(LINES[name](x, r) + (0 if name == "counts" else 1e-4 * r.normal(size=len(x))), 1000.)
    assert len(p) == 60 and np.abs(p.sample - on).max() <= 1 and np.abs(p.onset * 1000 - on + .5).max() < 1


def test_unequal_amplitudes_and_ghosts():
    r = np.random.default_rng(2)
    on = 200 + 400 * np.arange(40)
    x = .01 * r.normal(size=17000)
    for k, a in zip(on, r.uniform(1.5, 4.5, 40)): x[k:k + 15] += a
    x[on[5] + 200] += 4
    p = find_pulses(x, 1000.)
    assert p.sample.tolist() == on.tolist() and any("ghost" in why for _, why in p.rejected)


@pytest.mark.parametrize("silent", [False, True])
def test_an_even_train_without_ends_is_refused(film, silent):
    "Cut by the recording, or silent at both ends though it ran: any shift fits as well."
    e, light, _ = film
    for first, last in ((700, 900), (3, 4), (1, 1)):
        part = light[first:-last]
        a = align(part, e, span=(0, 906) if silent else (part[0] - .03, part[-1] + .03))
        assert a.verdict == "refused" and "end" in a.reason


def test_a_drift_beyond_reason_is_refused_and_units_are_not_guessed():
    r = np.random.default_rng(9)
    e = np.cumsum(r.uniform(1.3, 1.7, 300))
    a = align(2 + e * 1.003 + r.uniform(0, .01, 300), e)
    assert a.verdict == "refused" and "max_drift" in a.reason
    assert align(2 + e * 1.003 + r.uniform(0, .01, 300), e, max_drift=5000).verdict == "ok"
    t = time.process_time()
    assert align(e * 1000 + 3, e).verdict == "refused" and time.process_time() - t < 3


def test_a_late_schedule_is_not_thinned_out():
    "A log that is off by up to 150 ms a picture, and a gap in it: every pulse still belongs to its picture."
    r = np.random.default_rng(5)
    e = np.cumsum(r.uniform(1.3, 1.7, 200)) + 40_000
    light = e - 39_700 + r.uniform(-.15, .15, 200)
    a = align(light, e)
    assert a.verdict == "ok" and (a.pairs[:, 0] == a.pairs[:, 1]).all() and len(a.pairs) == 200


def test_frames_between_two_clocks_are_unknown():
    r = np.random.default_rng(6)
    e = np.cumsum(r.uniform(1.3, 1.7, 160))
    light = e + r.uniform(0, .002, 160)
    light[80:] += .71
    a = align(np.delete(light, [79, 80]), e)
    onset, half = a.corrected_onsets()
    assert a.verdict == "repaired" and np.isnan(onset[79:81]).all() and np.isinf(half[79:81]).all() and np.isfinite(np.delete(onset, [79, 80])).all()


def test_precision_of_an_onset_is_what_it_says():
    r = np.random.default_rng(7)
    on = .3 + np.cumsum(r.uniform(.15, .25, 150))
    for snr in (4, 20):
        x = np.zeros(int(on[-1] * 1000) + 500)
        for t in on: x[int(np.ceil(t * 1000)):int((t + .05) * 1000)] = 1
        p = find_pulses(x + r.normal(size=len(x)) / snr, 1000.)
        error = (p.onset - (np.ceil(on * 1000) - .5) / 1000).std()
        assert len(p) == 150 and .8 * error < p.precision < 4 * error + 1e-4


def test_a_refused_photodiode_falls_back_to_the_digital_line_and_says_so(tmp_path):
    "A diode that hangs beside the screen: the digital codes are used, and the recording's warnings say which, and why."
    import mne
    import pandas as pd
    from synapse_nb.studies.prepare import prepare
    from synapse_nb.studies.study import get_study
    r = np.random.default_rng(8)
    e = 3 + np.cumsum(r.uniform(.9, 1.4, 60))
    x = np.zeros((4, int(500 * (e[-1] + 3))))
    x[:2] = r.normal(0, 1e-6, (2, x.shape[1]))
    for t in e + .05: x[2, int(np.ceil(t * 500)):][:20] = 4
    for t in r.uniform(1, e[-1], 55): x[3, int(t * 500):][:30] = 1
    x[3] += r.normal(0, .01, x.shape[1])
    folder = tmp_path / "study" / "sub-01" / "eeg"
    folder.mkdir(parents=True)
    (tmp_path / "study" / "dataset_description.json").write_text("{}")
    mne.io.RawArray(x, mne.create_info(["Oz", "O1", "STI101", "Photodiode"], 500., ["eeg", "eeg", "stim", "misc"]), verbose="ERROR").save(folder / "sub-01_task-see_eeg.fif", verbose="ERROR")
    pd.DataFrame({"onset": e, "duration": .3, "trial_type": "exp", "stim_file": [f"p{k}.png" for k in range(60)]}).to_csv(folder / "sub-01_task-see_events.tsv", sep="\t", index=False)
    p, = prepare(get_study("bids", tmp_path / "study"), tmp_path / "store", "resample(250)", progress=False)
    assert p.alignment["source"] == "digital" and p.alignment["photodiode"]["verdict"] == "refused" and p.alignment["lag"] == pytest.approx(.051, abs=2e-3)
    assert any("photodiode was refused" in w and "digital" in w for w in p.warnings), p.warnings


@pytest.mark.parametrize("pulses", [1, 3, 20])
def test_a_few_pulses_in_minutes_of_noise(pulses):
    r = np.random.default_rng(pulses)
    on = np.sort(r.choice(np.arange(1, 100), pulses, replace=False)) * 2000
    x = np.zeros(210_000)
    for k in on: x[k:k + 30] = 1
    for sign in (1, -1):
        p = find_pulses(sign * x + r.normal(size=len(x)) / 12 + .3, 1000.)
        assert len(p) == pulses and np.abs(p.sample - on).max() <= 1


def test_a_film_whose_last_frames_are_silent():
    "A few seconds missing at the end may as well be a recorder that dropped whole intervals: refused. Uncut, with id pulses, a jump off the beat is bridged."
    r = np.random.default_rng(4)
    e = np.r_[.067 * np.arange(3), 2 + .067 * np.arange(2), 3.7 + np.arange(900) * 2 / 29.97]
    light = 2 + e + r.uniform(0, .001, len(e))
    a = align(light[:-20], e, span=(0, light[-1] + 2))
    assert a.verdict == "refused" and "missing though the recording was running" in a.reason
    b = align(np.r_[light[:500], light[510:] - .7], e, span=(0, light[-1] + 1.3))
    assert b.verdict == "repaired" and "1 clock reset bridged" in b.repaired and (b.pairs[:, 0][:500] == np.arange(500)).all() and b.pairs[-1].tolist() == [904, 894]


def test_between_pulses_the_scatter_counts_even_when_none_was_lost(film):
    e, light, r = film
    a = align(light, e, span=(0, 906))
    between = e[:-1] + 1 / 29.97
    truth = 2.1 + between * (1 + 80e-6) + r.uniform(0, .003, len(between))
    assert np.mean(np.abs(a.to_recording(between) - truth) <= a.uncertainty_at(between)) > .95
