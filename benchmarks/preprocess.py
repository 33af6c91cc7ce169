"""Preprocessing a recording: the THINGS-EEG preset on 63 channels × 10 minutes × 1000 Hz against MNE, and the memory of a long MEG recording.

    python benchmarks/preprocess.py [--quick]

Speed: pairs in the order A B B A, CPU time of the process, the median ratio with a bootstrap interval; a bar holds when the interval's bad end does. Memory: each way in a process of its own, peak of what it owns above the input.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import mne
import numpy as np

mne.set_log_level("error")
from synapse_nb.data.preprocess import Pipeline

FS, TEXT = 1000.0, "average_reference|bandpass(0.1,100)|decimate_to(250)"


def make_raw(n_chans, n_times, sfreq=FS):
    g = np.random.default_rng(0)
    x = np.empty((n_chans, n_times))
    for c in x: c[:] = g.standard_normal(n_times, dtype=np.float32) * 1e-5
    return mne.io.RawArray(x, mne.create_info(n_chans, sfreq, "eeg"))


def onsets(n_times, n=1194):
    return np.sort(np.random.default_rng(1).choice(np.arange(500, n_times - 1500, 8), min(n, n_times // 500), replace=False))


def events_of(raw): return np.c_[onsets(raw.n_times), np.zeros(len(onsets(raw.n_times)), int), np.ones(len(onsets(raw.n_times)), int)]


def ours(raw):
    "Filter and decimate in blocks, then cut the windows."
    data, fs, _ = Pipeline.parse(TEXT).apply(raw)
    at = np.round(onsets(raw.n_times) / raw.info["sfreq"] * fs).astype(int)
    return np.stack([data[a - 25:a + 250].T for a in at])


def mne_resample(raw):
    "MNE's usual way: reference, filter, FFT resample, epochs."
    r = raw.copy().set_eeg_reference().filter(0.1, 100)
    r, ev = r.resample(250, events=events_of(raw))
    return mne.Epochs(r, ev, tmin=-0.1, tmax=0.996, baseline=None, preload=True).get_data(copy=False)


def mne_decim(raw):
    "MNE's fastest way: reference, filter, epochs that keep every fourth sample."
    r = raw.copy().set_eeg_reference().filter(0.1, 100)
    return mne.Epochs(r, events_of(raw), tmin=-0.1, tmax=0.999, baseline=None, decim=4, preload=True).get_data(copy=False)


def compare(what, a, b, bar, n_pairs, name):
    ta, tb = [], []
    for i in range(n_pairs):
        for f, out in ((a, ta), (b, tb)) if i % 2 == 0 else ((b, tb), (a, ta)):
            t = time.process_time(); f(); out.append(time.process_time() - t)
    r, g = np.array(tb) / np.array(ta), np.random.default_rng(0)
    lo, hi = np.quantile(np.median(r[g.integers(0, n_pairs, (2000, n_pairs))], 1), [.025, .975])
    return {"what": f"{what}, CPU s, against {name}", "ours": float(np.median(ta)), "peer": float(np.median(tb)), "ratio": float(np.median(r)), "interval": [float(lo), float(hi)], "bar": bar,
            "holds": bool(lo >= bar), "n_pairs": n_pairs}


class Peak:
    "The largest RssAnon (MB) while the block runs, above what was there before."
    def now(self): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
    def __enter__(self):
        self.before, self.most, self.on = self.now(), 0, True
        self.t = threading.Thread(target=self.watch); self.t.start()
        return self
    def watch(self):
        while self.on:
            self.most = max(self.most, self.now() - self.before); time.sleep(0.002)
    def __exit__(self, *a): self.on = False; self.t.join()


def memory_of(way, n_chans, seconds, sfreq):
    "Peak MB of one way; 'long' writes a store from a recording that is made up on the fly (so the input is not in memory)."
    if way == "long":
        from synapse_nb.data.store import channels_of, write_store
        piece = np.random.default_rng(0).normal(size=(n_chans, 4096)) * 1e-12

        class Made(mne.io.BaseRaw):
            "A recording whose samples are made up when they are read."
            def _read_segment_file(self, data, idx, fi, start, stop, cals, mult):
                data[:] = np.take(piece[idx], np.arange(start, stop), axis=1, mode="wrap")
        with tempfile.TemporaryDirectory(prefix="bench-pre-") as tmp:
            raw = Made(mne.create_info(n_chans, sfreq, "mag"), last_samps=[int(seconds * sfreq) - 1])
            with Peak() as p:
                s = Pipeline.parse("bandpass(0.1,40)|decimate_to(200)").stream(raw)
                write_store(Path(tmp) / "x_k.h5", s, s.sfreq, **channels_of(s.info), n_times=s.n_times)
        total = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) / 1024
        return {"above": p.most, "process": total}
    raw = make_raw(n_chans, int(seconds * sfreq), sfreq)
    small = make_raw(2, 5000)
    for f in (ours, mne_resample, mne_decim): f(small)            # imports and first-time costs are not the recording's
    with Peak() as p: globals()[way](raw)
    return {"above": p.most}


def in_process(way, *args):
    r = subprocess.run([sys.executable, __file__, "--memory", way, *map(str, args)], capture_output=True, text=True, check=True)
    return json.loads(r.stdout.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser(); p.add_argument("--quick", action="store_true"); p.add_argument("--memory", nargs=4); p.add_argument("--out")
    args = p.parse_args()
    if args.memory:
        way, c, s, f = args.memory
        return print(json.dumps(memory_of(way, int(c), float(s), float(f))))
    n_chans, seconds, n_pairs = (16, 60, 20) if args.quick else (63, 600, 20)
    raw = make_raw(n_chans, int(seconds * FS))
    a, b = ours(raw), mne_decim(raw)
    worst = float((np.abs(a - b[..., :a.shape[-1]]).max((0, 2)) / np.abs(b).max((0, 2))).max())
    size = f"{n_chans} ch × {seconds / 60:g} min × 1000 Hz, THINGS-EEG preset"
    rows = [{"what": "largest difference to MNE, of a channel's maximum", "ours": worst, "peer": None, "ratio": None, "bar": 1e-5, "holds": worst <= 1e-5},
            compare(size, lambda: ours(raw), lambda: mne_resample(raw), 1.8, n_pairs, "MNE filter, FFT resample, epochs"),
            compare(size, lambda: ours(raw), lambda: mne_decim(raw), 1.0, n_pairs, "MNE filter, epochs with decim")]
    raw = a = b = None
    n_chans, seconds = 63, 600            # memory at full size also in the quick version: small recordings fit into one block
    size = f"{n_chans} ch × {seconds / 60:g} min × 1000 Hz, THINGS-EEG preset"
    mine = in_process("ours", n_chans, seconds, FS)["above"]
    for way, name in (("mne_resample", "MNE filter, FFT resample, epochs"), ("mne_decim", "MNE filter, epochs with decim")):
        other = in_process(way, n_chans, seconds, FS)["above"]
        rows.append({"what": f"{size}, peak MB above the input, against {name}", "ours": mine, "peer": other, "ratio": mine / other, "bar": 0.5, "holds": mine <= 0.5 * other})
    c, minutes = (271, (4, 8)) if args.quick else (271, (40, 80))
    long = [in_process("long", c, m * 60, 1200.) for m in minutes]
    rows.append({"what": f"{c} ch × {minutes[0]} min × 1200 Hz into a store, peak MB of the whole process", "ours": long[0]["process"], "peer": None, "ratio": None, "bar": 1200, "holds": long[0]["process"] <= 1200})
    rows.append({"what": f"the same for {minutes[1]} min (as much: within 10 %)", "ours": long[1]["process"], "peer": long[0]["process"], "ratio": long[1]["process"] / long[0]["process"], "bar": 1.1,
                 "holds": long[1]["process"] <= 1.1 * long[0]["process"]})
    print(f"{'what':110} {'ours':>10} {'peer':>10} {'ratio':>7}  {'95 %':>13} {'bar':>7}  holds")
    for r in rows:
        ci = r.get("interval")
        print(f"{r['what']:110} {r['ours']:10.4g} {'' if r['peer'] is None else format(r['peer'], '10.4g'):>10} {'' if r['ratio'] is None else format(r['ratio'], '.2f'):>7}  "
              f"{'' if ci is None else f'{ci[0]:.2f}..{ci[1]:.2f}':>13} {r['bar']:>7}  {'yes' if r['holds'] else 'NO'}")
    line = json.dumps({"rows": rows, "holds": all(r["holds"] for r in rows)})
    if args.out: Path(args.out).write_text(line)
    print(line)


if __name__ == "__main__": main()
