"""Random batches of 64 windows, 271 channels × 200 samples, out of 10 minutes at 1000 Hz: our store against a raw memory map, h5py and braindecode.

    python benchmarks/store.py [--quick]

Each row: pairs in the order A B B A, CPU time of the process, the median ratio with a bootstrap interval; a bar holds when the interval's bad end does. A batch is delivered as a float32 tensor whose bytes were copied;
both sides then consume it (one sum) inside the timer. The row of a peer that is not installed is left out (run it in .venv-bench for braindecode).
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import h5py
import numpy as np
import torch

torch.set_num_threads(1)
from synapse_nb.data.store import open_store, write_store
from synapse_nb.data.windows import Windows, make_loader

C, T, FS, B = 271, 200, 1000.0, 64


def compare(what, ours, peer, bar, n_pairs, peer_name, higher="speed", cpu=time.process_time):
    "ratio = time of the peer / our time (so above 1 we are faster), A B B A, median and bootstrap interval of the pairs."
    ours(), peer()
    a, b = [], []
    for i in range(n_pairs):
        for f, out in ((ours, a), (peer, b)) if i % 2 == 0 else ((peer, b), (ours, a)):
            t = cpu(); f(); out.append(cpu() - t)
    a, b = np.array(a), np.array(b)
    r, g = b / a, np.random.default_rng(0)
    boot = np.median(r[g.integers(0, n_pairs, (2000, n_pairs))], 1)
    lo, hi = np.quantile(boot, [.025, .975])
    return {"what": f"{what}, against {peer_name}", "ours": float(np.median(a)), "peer": float(np.median(b)), "ratio": float(np.median(r)), "interval": [float(lo), float(hi)], "bar": bar,
            "holds": bool(lo >= bar), "n_pairs": n_pairs}


def cpu_of_all():
    "CPU seconds of this process and all that it started, the living and the ended."
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(sum(map(int, Path(f"/proc/{c}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for c in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / os.sysconf("SC_CLK_TCK")


def rss_anon():
    "MB of this process's own memory; mapped pages of a file are the page cache's."
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024


def events(n_times, n):
    import pandas as pd
    at = np.random.default_rng(1).integers(200, n_times - 400, n)
    return pd.DataFrame({"trial_id": [f"t{i:05d}" for i in range(n)], "subject": "01", "session": "01", "run": "01", "onset": at / FS, "sample": at, "duration": .1,
                         "trial_type": "exp", "image": "", "concept": "", "category": "x"})


def consume(x):
    "Touch every byte that was delivered."
    return float(x.view(-1)[::16].sum()) if x.is_contiguous() else float(x.transpose(1, 2).reshape(-1)[::16].sum())


class Peak:
    "The largest RssAnon (MB) while the block runs, above `before`."
    def __init__(self, before): self.before, self.most = before, 0.
    def __enter__(self):
        self.on = True; self.t = threading.Thread(target=self.watch); self.t.start()
        return self
    def watch(self):
        while self.on: self.most = max(self.most, rss_anon() - self.before); time.sleep(0.002)
    def __exit__(self, *a): self.on = False; self.t.join()


def h5py_files(folder, view, start):
    "The usual layouts, for h5py: channels first, and windows cut beforehand, one chunk each."
    with h5py.File(folder / "channels_first.h5", "w") as f:
        d = f.create_dataset("x", (C, 60000), np.float32)
        for i in range(C): d[i] = view[:60000, i]
    with h5py.File(folder / "windows.h5", "w") as f:
        d = f.create_dataset("x", (len(start), C, T), np.float32, chunks=(1, C, T))
        for i, a in enumerate(start.tolist()): d[i] = view[a:a + T].T
    return h5py.File(folder / "channels_first.h5", "r")["x"], h5py.File(folder / "windows.h5", "r")["x"]


def main():
    p = argparse.ArgumentParser(); p.add_argument("--quick", action="store_true"); p.add_argument("--out")
    args = p.parse_args()
    before = rss_anon()
    seconds, n_pairs, n_batches = (60, 20, 4) if args.quick else (600, 40, 10)
    tmp = tempfile.TemporaryDirectory(prefix="bench-store-")
    n_times, path = int(seconds * FS), Path(tmp.name) / "s_k.h5"
    g = np.random.default_rng(0)
    blocks = (g.standard_normal((10000, C), dtype=np.float32) for _ in range(n_times // 10000))
    write_store(path, blocks, FS, [f"MEG{i:03d}" for i in range(C)], ["mag"] * C, events=events(n_times, 1194), n_times=n_times)
    store = open_store(path)
    kw = dict(tmin=0., tmax=T / FS, labels="category")
    lazy, dense, z = Windows(store, contiguous=False, **kw), Windows(store, **kw), Windows(store, window="zscore", **kw)
    start = lazy.events["sample"].to_numpy()
    rows_of = [g.integers(0, len(start), B) for _ in range(n_batches)]
    turn = {"k": 0}

    def rows():
        turn["k"] += 1
        return rows_of[turn["k"] % n_batches]

    def served(ds):
        def f():
            for _ in range(n_batches): consume(ds.__getitems__(rows())["x"])
        return f

    with Peak(before) as memory:
        for ds in (lazy, dense, z):
            for _ in range(5): served(ds)()
            for b in make_loader(ds, B, shuffle=True): consume(b["x"])

    plain = np.memmap(path, np.float32, "r", store.offset, (n_times, C))
    view, keep = np.asarray(plain), np.empty((B, T, C), np.float32)

    def raw_map():
        "A plain numpy memory map, the same bytes into a buffer that is used again."
        for _ in range(n_batches):
            for o, a in zip(keep, start[rows()].tolist()): o[:] = view[a:a + T]
            consume(torch.from_numpy(keep).transpose(1, 2))

    def fresh_map():
        "The same into new memory each time."
        for _ in range(n_batches):
            out = np.empty((B, T, C), np.float32)
            for o, a in zip(out, start[rows()].tolist()): o[:] = view[a:a + T]
            consume(torch.from_numpy(out).transpose(1, 2))

    own = h5py.File(path, "r")["signal"]
    first, cut = h5py_files(Path(tmp.name), view, start)

    def fancy_windows():
        "dset[sorted unique windows] of windows cut beforehand: one batch."
        u, back = np.unique(rows(), return_inverse=True)
        consume(torch.from_numpy(cut[u][back]))

    def fancy_channels_first():
        "dset[:, [a, a+1, …]] of (n_channels, n_times); 2 of the 64 windows of a batch, since it is slow."
        consume(torch.from_numpy(np.stack([first[:, np.arange(a, a + T)] for a in (start[rows()][:2] % 59000)])))

    def fancy_own():
        "dset[sorted unique samples] in our own file, time first: all windows of a batch in one call."
        at = start[rows()][:, None] + np.arange(T)
        u, back = np.unique(at, return_inverse=True)
        consume(torch.from_numpy(own[u][back.reshape(at.shape)]).transpose(1, 2))

    def all_own():
        "The batch of fancy_own by the raw memory map: what a copy of the bytes takes."
        for o, a in zip(keep, start[rows()].tolist()): o[:] = view[a:a + T]
        consume(torch.from_numpy(keep).transpose(1, 2))

    what = "64 windows 271 × 200, any strides"
    results = [compare(what, served(lazy), raw_map, .8, n_pairs, "a numpy memory map into one buffer"),
               compare(what, served(lazy), fresh_map, .8, n_pairs, "a numpy memory map into new memory")]
    for f, g2, bar, name in ((n_batches, fancy_windows, 50, "h5py fancy indexing over windows, one chunk each"),
                             (n_batches * 32, fancy_channels_first, 50, "h5py fancy indexing over samples, channels first"),
                             (n_batches, fancy_own, 0, "h5py fancy indexing over samples in our own layout (no bar: see the next row)")):
        results.append(scaled(compare(what, served(lazy), g2, bar, 20, name), f))
    results.append({**compare("a copy of the same bytes by a raw memory map: the most that any reader of that layout can reach", all_own, fancy_own, 0, 20, "h5py fancy indexing in our own layout")})
    results.append({"what": "own memory while serving, peak MB above the interpreter (RssAnon)", "ours": memory.most, "peer": None, "ratio": None, "bar": 300, "holds": memory.most <= 300})
    results += braindecode_rows(store, start, lazy, dense, z, served, rows, n_batches, n_pairs)
    show(results, args)


def scaled(h, f):
    "The row of a peer that did 1/f of the work."
    return {**h, "peer": h["peer"] * f, "ratio": h["ratio"] * f, "interval": [v * f for v in h["interval"]], "holds": h["interval"][0] * f >= h["bar"]}


def braindecode_rows(store, start, lazy, dense, z, served, rows, n_batches, n_pairs):
    "braindecode with everything loaded, if it is installed here."
    try:
        import mne
        from braindecode.datasets import BaseConcatDataset, RawDataset
        from braindecode.preprocessing import create_windows_from_events
    except ImportError as e:
        print(f"braindecode is not installed here ({e}); its rows are left out. benchmarks/make_venv.sh makes a venv that has it.", file=sys.stderr)
        return []
    mne.set_log_level("error")
    raw = mne.io.RawArray(np.asarray(store.data).T.astype(np.float64), mne.create_info(store.ch_names, FS, "mag"))
    s = np.unique(start)
    raw.set_annotations(mne.Annotations(s / FS, [.2] * len(s), ["x"] * len(s)))
    ds = create_windows_from_events(BaseConcatDataset([RawDataset(raw, description={"subject": 1})]), 0, 0, window_size_samples=T, window_stride_samples=T, preload=True,
                                    mapping={"x": 0}, drop_bad_windows=False)

    def peer():
        for _ in range(n_batches): consume(torch.stack([torch.as_tensor(ds[int(i) % len(ds)][0]) for i in rows()]))

    def peer_z():
        for _ in range(n_batches):
            x = torch.stack([torch.as_tensor(ds[int(i) % len(ds)][0]) for i in rows()])
            v, m = torch.var_mean(x, -1, keepdim=True, correction=0)
            consume((x - m) / v.sqrt())

    def zcollate(items):
        x = torch.stack([torch.as_tensor(i[0]) for i in items])
        v, m = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - m) / v.sqrt()

    def stacked(items): return torch.stack([torch.as_tensor(i[0]) for i in items])

    def drain(loader, n):
        def f():
            for i, b in enumerate(loader):
                consume(b["x"] if isinstance(b, dict) else b)
                if i + 1 == n: break
        return f
    name = "braindecode, preloaded"
    out = [compare("64 windows 271 × 200, any strides", served(lazy), peer, 8, n_pairs, name),
           compare("64 windows 271 × 200, contiguous", served(dense), peer, 1.5, n_pairs, name),
           compare("64 windows 271 × 200, contiguous, z-scored", served(z), peer_z, 2, n_pairs, name)]
    k = len(z) // B
    for what, own, collate, bar in (("contiguous", dense, stacked, 1.5), ("z-scored", z, zcollate, 2)):
        mine, other = (drain(make_loader(own, B, shuffle=True), k), drain(torch.utils.data.DataLoader(ds, B, shuffle=True, collate_fn=collate), k))
        out.append(compare(f"{what}, through a DataLoader, 0 workers", mine, other, bar, n_pairs, name))
        mine = drain(make_loader(own, B, shuffle=True, num_workers=2), k)
        other = drain(torch.utils.data.DataLoader(ds, B, shuffle=True, num_workers=2, collate_fn=collate, persistent_workers=True), k)
        out.append(compare(f"{what}, through a DataLoader, 2 workers that stay on both sides, CPU s of all processes", mine, other, bar, 20, name, cpu=cpu_of_all))
        out.append(compare(f"{what}, through a DataLoader, 2 workers that stay on both sides, wall s", mine, other, bar, 20, name, cpu=time.perf_counter))
        mine = other = None
    return out


def show(results, args):
    print(f"{'what':130} {'ours':>10} {'peer':>10} {'ratio':>8}  {'95 %':>15} {'bar':>6}  holds")
    for r in results:
        ci = r.get("interval")
        print(f"{r['what']:130} {r['ours']:10.4g} {'' if r['peer'] is None else format(r['peer'], '10.4g'):>10} {'' if r['ratio'] is None else format(r['ratio'], '.2f'):>8}  "
              f"{'' if ci is None else f'{ci[0]:.2f}..{ci[1]:.2f}':>15} {r['bar']:>6}  {'yes' if r['holds'] else 'NO'}")
    line = json.dumps({"rows": results, "holds": all(r["holds"] for r in results)})
    if args.out: Path(args.out).write_text(line)
    print(line)


if __name__ == "__main__": main()
