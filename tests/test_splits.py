"Every leak is raised, and the honest twin of each is not."
import numpy as np
import pandas as pd
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.data.splits import Artefact, Split, check_split, fingerprint, last_seconds, leave_one_out, make_split, nested_subset, published_test, zero_shot


def table(subjects=2, sessions=2, runs=2, trials=24, soa=1.0):
    rows = [dict(trial_id=f"sub-{s:02d}_ses-{e:02d}_run-{r:02d}_t{t:03d}", subject=f"{s:02d}", session=f"{e:02d}", run=f"{r:02d}", onset=1 + t * soa, trial_type="exp",
                 image=f"p{(t * 5 + r + 2 * e) % trials:02d}", concept=f"c{(t * 5 + r + 2 * e) % trials // 3}", category="ab"[(t * 5 + r + 2 * e) % trials // 3 % 2])
            for s in range(1, subjects + 1) for e in range(1, sessions + 1) for r in range(1, runs + 1) for t in range(trials)]
    return pd.DataFrame(rows)


EV = table()


def leak(split, events=EV, artefacts=(), **kw):
    "The leak that is found, or None."
    try: check_split(split, events, artefacts, **kw)
    except SynapseError as e:
        assert str(e).startswith("leak: ")
        return str(e)


def moved(split, n=1):
    "The split with n test trials also claimed by nobody but the training side."
    return Split(split.train + split.test[:n], split.val, split.test[n:], split.by)


@pytest.mark.parametrize("by", ["image", "concept", "run", "session", "subject", "segment"])
def test_groups(by):
    kw = {"segment": 8.} if by == "segment" else {}
    good = make_split(EV, by=by, test=.25 if by != "subject" else .5, val=.2 if by != "subject" else 0, seed=0, **kw)
    assert leak(good, **kw) is None and good.train and good.test
    assert by in leak(moved(good), **kw)
    assert set(good.train) | set(good.val) | set(good.test) | set(good.excluded) == set(EV.trial_id)


def test_same_trial(): assert "trial" in leak(Split(EV.trial_id[:9], (), EV.trial_id[8:12])) and leak(Split(EV.trial_id[:8], (), EV.trial_id[8:12])) is None


def test_zero_shot_and_new_image_are_different_claims():
    by_image = make_split(EV, "image", .25, 0, seed=1)
    assert leak(by_image) is None
    assert "concept" in leak(Split(by_image.train, (), by_image.test, ("concept",)))      # new pictures of known concepts are not zero-shot
    assert leak(zero_shot(EV, .25, 0)) is None


def test_subject_on_both_sides_of_loso():
    for s in leave_one_out(EV, "subject", val=0):
        assert leak(s) is None and "subject" in leak(moved(s))


def test_overlapping_windows_and_guard():
    film = table(1, 1, 1, 600, .5)
    s = make_split(film, "segment", test=["2", "4"], val=0, window=(-.1, .5), guard=1., segment=60)
    assert leak(s, film) is None
    naive = make_split(film, "segment", test=["2", "4"], val=0, segment=60)
    assert "overlaps" in leak(naive, film, window=(-.1, .5)) and leak(naive, film, window=(-.1, .3)) is None      # 0.5 s apart: 0.6 s windows overlap, 0.4 s ones do not
    assert "within" in leak(naive, film, window=(-.1, .3), guard=.5)                                             # but they lie inside the guard
    last = last_seconds(film, 60, (-.1, .5), guard=1.)
    assert leak(last, film) is None and len(last.val) == 120
    assert "overlaps" in leak(Split(last.train + tuple(t for t in last.excluded), last.val, ()), film, window=(-.1, .5))


def test_near_duplicate_frames_across_parts():
    r = np.random.default_rng(0)
    frames = {f"p{i:02d}": r.integers(0, 255, (48, 86, 3)) for i in range(24)}
    s = make_split(EV, "image", .25, 0, seed=0)
    a, b = s.rows(EV, "train")["image"].iloc[0], s.rows(EV, "test")["image"].iloc[0]
    assert leak(s, fingerprints={k: fingerprint(v) for k, v in frames.items()}) is None
    frames[b] = np.clip(frames[a] * .95 + r.normal(0, 2, frames[a].shape), 0, 255)        # darker, noisy: the next frame of the same shot
    found = leak(s, fingerprints={k: fingerprint(v) for k, v in frames.items()})
    assert a in found and b in found


def test_pairs_made_before_the_split():
    s = make_split(EV, "image", .25, 0, seed=0)
    crossing = Artefact("paired", "EEG with MEG", ((s.train[0], s.test[0]),))
    within = Artefact("paired", "EEG with MEG", ((s.train[0], s.train[1]), (s.test[0], s.test[1])), split_id=s.id)
    assert "pairs" in leak(s, artefacts=[crossing]) and leak(s, artefacts=[within]) is None
    assert "split" in leak(s, artefacts=[Artefact("paired", "EEG with MEG", within.made_from, split_id="another")])


@pytest.mark.parametrize("what", ["scaler", "whitening"])
def test_fitted_on_test(what):
    s = make_split(EV, "image", .25, .1, seed=0)
    assert leak(s, artefacts=[Artefact("fitted", what, s.train)]) is None
    for other in (s.val, s.test): assert what in leak(s, artefacts=[Artefact("fitted", what, s.train + other[:1])])


def test_averaged_over_the_border():
    s = make_split(EV, "image", .25, 0, seed=0)
    assert leak(s, artefacts=[Artefact("averaged", "4 repeats", (s.train[:4], s.test[:4]))]) is None
    assert "averages" in leak(s, artefacts=[Artefact("averaged", "4 repeats", (s.train[:3] + s.test[:1],))])


def test_one_file_under_two_names():
    ev = EV.assign(source_hash=EV.subject + EV.session + EV.run)
    s = make_split(ev, "subject", test=["02"], val=0)
    assert leak(s, ev) is None
    copied = ev.assign(source_hash=ev.session + ev.run)                                   # subject 02's files are subject 01's
    assert "two names" in leak(s, copied)


def test_stores_say_which_file_they_came_from(tmp_path):
    from synapse_nb.data.store import open_store, write_store
    def store(name, source):
        ev = EV[(EV.subject == name) & (EV.session == "01") & (EV.run == "01")].assign(sample=lambda d: (d.onset * 10).astype(int), duration=.1)
        return open_store(write_store(tmp_path / f"{name}_k.h5", np.zeros((400, 1), np.float32), 10., ["a"], ["eeg"], events=ev, provenance={"source_hash": source}))
    ev = EV[(EV.session == "01") & (EV.run == "01")]
    s = make_split(ev, "subject", test=["02"], val=0)
    assert leak(s, ev, stores=[store("01", "A"), store("02", "B")]) is None
    assert "two names" in leak(s, ev, stores=[store("01", "A"), store("02", "A")])


def test_published_test_set():
    ev = EV.assign(trial_type=np.where(EV.image.isin(["p00", "p10"]), "test", np.where(EV.image == "p05", "catch", "exp")))
    s = published_test(ev, val=.2)
    assert leak(s, ev) is None and "moved out" in s.how and {"c0", "c3"}.isdisjoint(s.rows(ev, "train")["concept"])
    assert set(s.rows(ev, "test")["image"]) == {"p00", "p10"} and not set(ev.trial_id[ev.trial_type == "catch"]) & {*s.train, *s.val, *s.test}
    kept = published_test(ev, val=0, keep_shared=True)
    assert leak(kept, ev) is None and len(kept.train) > len(s.train) and kept.by == ("image",)


def test_json_and_id(tmp_path):
    s = make_split(EV, ("subject", "image"), .5, 0, seed=4)
    s.save(tmp_path / "s.json")
    assert Split.load(tmp_path / "s.json") == s
    text = (tmp_path / "s.json").read_text().replace(s.test[0], s.train[0])
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(SynapseError, match="edited"): Split.load(tmp_path / "s.json")
    with pytest.raises(AttributeError): s.train = ()
    assert s.id != make_split(EV, ("subject", "image"), .5, 0, seed=5).id


def test_order_of_rows_and_extra_people_do_not_matter():
    a = make_split(EV, "image", .25, .1, seed=0)
    b = make_split(EV.sample(frac=1, random_state=1), "image", .25, .1, seed=0)
    assert a.id == b.id
    more = pd.concat([EV, table(3)[lambda d: d.subject == "03"]])
    c = make_split(more, "image", .25, .1, seed=0)
    assert set(a.test) <= set(c.test)


def test_nested_subsets():
    sizes = [10, 20, 50, 100]
    sets = [set(nested_subset(EV, n, seed=2).trial_id) for n in sizes]
    assert all(a < b for a, b in zip(sets, sets[1:])) and [len(s) for s in sets] == sizes
    with pytest.raises(SynapseError): nested_subset(EV, 10_000)
