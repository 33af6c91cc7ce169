"The store and the windows: round trips, damage, killed conversions, keys, labels that follow their trial."
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.store import open_store, store_path, write_store

FS, C = 200.0, 5


def events(n=8, name="sub-01"):
    at = 100 + np.arange(n) * 100
    return pd.DataFrame({"trial_id": [f"{name}_t{i:03d}" for i in range(n)], "subject": name[4:], "session": "01", "run": "01", "onset": at / FS, "sample": at, "duration": .1,
                         "trial_type": ["catch" if i % 4 == 3 else "exp" for i in range(n)], "image": [f"dir/ü{i}.jpg" for i in range(n)], "concept": "", "category": [["fruit", "toy"][i % 2] for i in range(n)]})


def make(folder, name="sub-01", n=8, **kw):
    "A recording in volts whose signal at a trial is the trial's number in µV."
    ev = events(n, name)
    x = np.random.default_rng(0).normal(size=(100 * n + 400, C)) * 1e-7
    for i, a in enumerate(ev["sample"]): x[a:a + 60] += (i + 1) * 1e-6
    args = dict(ch_pos=np.random.default_rng(1).normal(size=(C, 3)) * .1, events=ev, provenance={"source_hash": name, "pipeline": "x"}, bads=["E4"], meta={"subject": name[4:]})
    return write_store(folder / f"{name}_k.h5", x.astype(np.float32), FS, [f"E{i}" for i in range(C)], ["eeg"] * C, **{**args, **kw}), x.astype(np.float32)


@pytest.mark.parametrize("compress", [False, True])
def test_round_trip(tmp_path, compress):
    path, x = make(tmp_path, compress=compress)
    s = open_store(path)
    assert np.array_equal(s.data, x) and s.data.dtype == np.float32
    assert 1e-7 < s.data.std() < 1e-4 and (s.data.std(0) > 0).all()                     # nothing quantised to zero
    pd.testing.assert_frame_equal(s.events, events(), check_dtype=False)
    assert s.bads == ["E4"] and s.meta["subject"] == "01" and s.provenance["pipeline"] == "x" and s.mne_info()["bads"] == ["E4"]


def test_other_tools_read_it(tmp_path):
    import h5py
    path, x = make(tmp_path)
    with h5py.File(path) as f:
        assert np.array_equal(f["signal"][:], x) and f["signal"].chunks is None
        assert f["events/00"].attrs["name"] == "trial_id" and f["events/00"].asstr()[0] == "sub-01_t000"


def test_mne_info_keeps_the_geometry(tmp_path):
    mne = pytest.importorskip("mne")
    from synapse_nb.data.store import channels_of
    info = mne.create_info(["Fz", "Cz", "Oz"], 100., "eeg").set_montage("biosemi64", verbose="error")
    back = open_store(write_store(tmp_path / "a_k.h5", np.zeros((50, 3), np.float32), 100., **channels_of(info))).mne_info()
    for a, b in zip(info["chs"], back["chs"]):
        np.testing.assert_allclose(a["loc"], b["loc"]); assert a["coil_type"] == b["coil_type"] and a["coord_frame"] == b["coord_frame"]


def test_any_damage_is_named(tmp_path):
    path, _ = make(tmp_path)
    good, off = path.read_bytes(), open_store(path).offset
    rng = np.random.default_rng(0)
    for k, at in enumerate([*rng.integers(off, off + 4 * C * 1200, 10)]):
        bad = bytearray(good); bad[at] ^= 1 << int(rng.integers(8))
        p = tmp_path / f"bad{k}.h5"; p.write_bytes(bad)
        with pytest.raises(SynapseError, match=p.name): open_store(p)
    for k, n in enumerate([0, 1, 100, off, len(good) // 2, len(good) - 1]):
        p = tmp_path / f"short{k}.h5"; p.write_bytes(good[:n])
        with pytest.raises(SynapseError, match=p.name): open_store(p)


def test_events_and_channels_are_checked(tmp_path):
    for kw, word in [(dict(events=events().assign(sample=5000)), "outside"), (dict(events=events().assign(trial_id="x")), "more than once"), (dict(events=events().drop(columns="image")), "image"),
                     (dict(bads=["E9"]), "E9"), (dict(ch_pos=np.zeros((2, 3))), "agree")]:
        with pytest.raises(SynapseError, match=word): make(tmp_path, **kw)
    with pytest.raises(SynapseError, match="NaN"): write_store(tmp_path / "n.h5", np.full((9, 1), np.nan, np.float32), 1., ["a"], ["eeg"])
    with pytest.raises(SynapseError, match="announced"): write_store(tmp_path / "n.h5", iter([np.zeros((9, 1), np.float32)]), 1., ["a"], ["eeg"], n_times=10)
    assert list(tmp_path.iterdir()) == []


def test_what_made_it_is_its_name(tmp_path):
    names = {store_path(tmp_path, "s", *a, **k) for a, k in [(("bandpass(1,40)", "h"), {}), (("bandpass(1,30)", "h"), {}), (("bandpass(1,40)", "g"), {}), (("bandpass(1,40)", "h"), {"picks": ["O1"]}),
                                                             (("bandpass(1,40)", "h"), {"sfreq": 200})]}
    assert len(names) == 5


SLOW_WRITER = """
import sys, time, numpy as np
from synapse_nb.data.store import write_store
def blocks():
    for i in range(200):
        yield np.full((500, 20), i, np.float32); time.sleep(.005)
print('go', flush=True)
write_store(sys.argv[1], blocks(), 100., [str(i) for i in range(20)], ['eeg']*20, n_times=100000)
print('done', flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_conversion_leaves_nothing_finished(tmp_path, how):
    rng = np.random.default_rng(int(how))
    for k in range(3):
        path = tmp_path / f"r{k}_k.h5"
        p = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        p.stdout.readline()
        time.sleep(rng.uniform(0, .6)); p.send_signal(how); p.wait()
        assert not path.exists() or p.returncode == 0
        write_store(path, np.zeros((10, 2), np.float32), 100., ["a", "b"], ["eeg"] * 2)           # and it can be done again at once
        assert open_store(path).n_times == 10


def test_windows_carry_their_own_label(tmp_path):
    torch = pytest.importorskip("torch")
    from synapse_nb.data.windows import Windows, make_loader
    paths = [make(tmp_path, f"sub-{i:02d}", n)[0] for i, n in ((1, 8), (2, 13))]
    ev = pd.concat([open_store(p).events for p in paths])
    ev = ev[ev.trial_type == "exp"].sample(frac=1, random_state=0)
    ds = Windows(paths, ev, 0., .2, picks=["E0", "E3"])
    seen = {}
    for b in make_loader(ds, 4, shuffle=True):
        for x, y, i in zip(b["x"], b["y"], b["index"]):
            row = ds.events.iloc[int(i)]
            assert round(float(x.mean()) * 1e6) - 1 == int(row.trial_id[-3:]) and ds.classes[int(y)] == row.category
            seen[row.trial_id] = 1
    assert len(seen) == len(ev) and isinstance(b["x"], torch.Tensor)


def test_batches_do_not_depend_on_the_workers(tmp_path):
    pytest.importorskip("torch")
    import torch
    from synapse_nb.data.augment import Augment
    from synapse_nb.data.windows import Windows, make_loader
    path, _ = make(tmp_path, n=20)
    for contiguous in (True, False):
        ds = Windows(path, tmin=0., tmax=.2, window="zscore", transform=Augment("noise(0.5)|time_shift(0.05)", FS), contiguous=contiguous)
        runs = [[(b["index"].tolist(), b["x"].clone()) for _ in range(2) for b in make_loader_once] for make_loader_once in (make_loader(ds, 6, True, 3, num_workers=w) for w in (0, 2))]
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(*runs, strict=True))
        assert not torch.equal(runs[0][0][1], runs[0][4][1])                                    # the next epoch is another


def test_a_batch_stays_while_it_is_held(tmp_path):
    pytest.importorskip("torch")
    from synapse_nb.data.windows import Windows
    path, _ = make(tmp_path, n=20)
    for contiguous in (True, False):
        ds = Windows(path, tmin=0., tmax=.2, contiguous=contiguous)
        held = [(ds.__getitems__([i, i + 1])["x"], i) for i in range(12)]                        # buffers are used again only when nobody holds them
        for x, i in held: assert np.allclose(x.numpy(), ds.__getitems__([i, i + 1])["x"].numpy())
        view = ds.__getitems__([0, 1])["x"][:, :2]
        before = view.clone()
        for i in range(12): ds.__getitems__([i, i + 1])
        assert np.array_equal(view.numpy(), before.numpy())


@pytest.mark.parametrize("stay", [True, False])
def test_a_batch_of_a_worker_stays_while_it_is_held(tmp_path, stay):
    "Workers use their memory again, but not what somebody still holds: whole batches, parts of them, through epochs that are broken off."
    torch = pytest.importorskip("torch")
    from synapse_nb.data.windows import PairedWindows, Windows, make_loader
    path, _ = make(tmp_path, n=40)
    ds = Windows(path, tmin=0., tmax=.2)
    loader = make_loader(ds, 2, True, 3, num_workers=2, persistent_workers=stay)
    held = []
    for k, b in enumerate(loader):
        if k % 3 == 0: held.append((b["x"], b["index"]))                                            # 14 of them: more than a worker has pieces
        if k % 3 == 1: held.append((b["x"][1:, :2].numpy(), b["index"][1:]))
    for k, b in enumerate(loader):
        if k == 7: break
    for b in loader: held.append((b["x"][:1], b["index"][:1]))
    for x, i in held:
        want = ds.__getitems__(i)["x"].numpy()
        assert np.array_equal(np.asarray(x), want[:, :x.shape[1]])
    pw = PairedWindows(ds, ds, pd.DataFrame({"meg_trial": ds.events["trial_id"], "eeg_trial": ds.events["trial_id"]}))
    for b in make_loader(pw, 7, num_workers=2, persistent_workers=stay):
        assert torch.equal(b["meg"], b["eeg"]) and np.array_equal(b["meg"].numpy(), ds.__getitems__(b["index"])["x"].numpy())


@pytest.mark.filterwarnings("error")
def test_pairs_and_read_only_rows_do_not_warn(tmp_path):
    pytest.importorskip("torch")
    from synapse_nb.data.windows import PairedWindows, Windows
    ds = Windows(make(tmp_path, n=8)[0], tmin=0., tmax=.2)
    rows = np.arange(3); rows.flags.writeable = False
    ids = ds.events["trial_id"]
    assert len(ds.__getitems__(rows)["y"]) == len(PairedWindows(ds, ds, pd.DataFrame({"meg_trial": ids, "eeg_trial": ids})).__getitems__(rows)["y"]) == 3


def test_stores_travel_to_other_processes(tmp_path):
    path, x = make(tmp_path)
    s = pickle.loads(pickle.dumps(open_store(path)))
    assert np.array_equal(s.data, x) and len(pickle.dumps(s)) < 20_000


def test_opening_is_light():
    code = "import sys, synapse_nb.data.store, synapse_nb.data.splits, synapse_nb.data.preprocess; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
