"Captions as a recipe: from a study on the disk to sentences, each score beside its control; killed and run again; on two ranks."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synapse_nb
from synapse_nb.core import SynapseError, read_json
from synapse_nb.evaluate.metrics import read_scores
from synapse_nb.selfsup.caption import consensus, consensus_table
from synapse_nb.stimuli.images import PictureSet
from synapse_nb.studies.simulate import simulate_study
from synapse_nb.train.captioning import CaptionConf, best_said, caption_scores
from synapse_nb.train.launch import launch
from synapse_nb.train.recipes import read_saved, run_recipe

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(Path(synapse_nb.__file__).parents[1]), "OMP_NUM_THREADS": "1", "SYNAPSE_CHECKPOINT_S": "0"}
SMALL = ["d=32", "depth=1", "train.device=cpu", "train.n_epochs=2", 'study.modalities=["meg"]']
BOTH = ['study.modalities=["meg","eeg"]']
QUIET = ["network.options={drop=0.0}", "dropout=0.0", 'parts=["contrast","caption"]']           # nothing is drawn: no dropout, no sampled negatives


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caption")
    simulate_study(folder / "study", "easy", 0, 1, n_train_pictures=64, n_test_pictures=16, train_repeats=2, quick=True)
    return folder


def recipe(study, sets, out): return run_recipe(ROOT / "configs/sim_caption.toml", [f"study.root={study}/study", *SMALL, *sets], out)


@pytest.fixture(scope="module")
def done(study):
    run_recipe(ROOT / "configs/sim_pretrain.toml", [f"study.root={study}/study", 'study.modalities=["meg"]', "train.n_epochs=1", "train.device=cpu"], study / "runs")
    return recipe(study, ["pretrained=run:sim_pretrain/mae"], study / "runs")


def test_the_recipe_speaks_with_a_fresh_and_a_pretrained_encoder(done, study):
    table, scores = read_saved(done.path / "captions.tsv"), read_scores(done.path / "scores.json")
    assert done.state == "finished" and set(table["model"]) == {"spatial_conv", "pre-trained"} and set(table["side"]) == {"val", "test"}
    assert {"category", "colour", "size", "position", "consensus", "top_1", "top_5"} == {s.metric for s in scores}
    own = {(s.model, s.metric, s.protocol.id): s for s in scores if "shuffled" not in s.model}
    for s in scores:
        assert s.n > 0 and s.ci_low <= s.value <= s.ci_high and s.protocol is not None
        if "shuffled" in s.model and not s.metric.startswith("top"): assert own[s.model.replace(" (shuffled brain)", ""), s.metric, s.protocol.id].chance == pytest.approx(s.value)
    repeats = table[(table["side"] == "test") & (table["n_averaged"] > 1)]
    assert len(repeats) and {s.protocol.unit for s in scores} == {"single", f"pred-avg:{repeats['n_averaged'].max()}"}
    page = done.report.read_text()
    for title in ("What the model said", "What came from the brain", "true caption"): assert title in page
    assert recipe(study, ["pretrained=run:sim_pretrain/mae"], study / "runs").path == done.path                  # found, not run again


def pictures(n=12):
    colours, sizes = ["red", "blue", "green"], ["small", "large"]
    table = pd.DataFrame([dict(image=f"{i:02d}.png", category="fruit" if i % 2 else "tool", colour=colours[i % 3], size=sizes[i // 6], position="left") for i in range(n)])
    table["caption"] = [f"a {s} {c} {k} at the left, number{i}" for i, (s, c, k) in enumerate(zip(table["size"], table["colour"], table["category"]))]
    return PictureSet(np.zeros((n, 8, 8, 3), np.uint8), table)


def said(p, what, repeats=3):
    rows = pd.DataFrame([dict(trial_id=f"{i}-{r}", subject="01", run="1", image=f"{i:02d}.png", said=what(i), n_averaged=1, modality="meg", model="m", side="test") for i in range(8) for r in range(repeats)])
    return pd.concat([rows, rows.assign(side="val")], ignore_index=True)


def test_who_says_the_truth_scores_one_and_who_always_says_the_same_scores_the_control():
    p = pictures(); captions, conf = p.table["caption"].to_numpy(object), CaptionConf(name="c")
    truth, habit = ({(s.metric, "shuffled" in s.model): s for s in caption_scores(said(p, what), conf, p, captions)} for what in (lambda i: captions[i], lambda i: captions[4]))
    for a in ("category", "colour"):
        assert truth[a, False].value == 1 and truth[a, False].above_chance and truth[a, True].value < 0.6
        assert habit[a, False].value == pytest.approx(habit[a, True].value) and not habit[a, False].above_chance
    assert ("position", False) not in truth                                                                       # all at the left: nothing to tell
    assert truth["consensus", False].value == pytest.approx(10) and habit["consensus", False].value < 4
    assert truth["colour", False].n == 24 and "8 pictures" in truth["colour", False].note and truth["colour", False].protocol.unit == "single"
    model, rows = best_said(said(p, lambda i: captions[i]), p, captions); assert model == "m" and len(rows) == 24


def test_the_table_of_consensus_is_the_consensus_of_every_pair():
    said, refs, corpus = ["a red cat", "the blue dog runs", ""], ["a red dog", "a cat"], ["a red cat", "a blue dog", "the cat runs"]
    assert np.allclose(consensus_table(said, refs, corpus), [[consensus([s], [r], corpus)[0] for r in refs] for s in said])


def test_pictures_without_captions_are_refused(study, tmp_path):
    import shutil
    shutil.copytree(study / "study", tmp_path / "study")
    names = next((tmp_path / "study").rglob("pictures.tsv")); t = pd.read_csv(names, sep="\t", keep_default_na=False); t.loc[3, "caption"] = ""; t.to_csv(names, sep="\t", index=False)
    with pytest.raises(SynapseError, match="no caption, the first is " + t["image"][3]): recipe(tmp_path, [], tmp_path / "runs")


def test_killed_and_run_again_says_the_same(study):
    whole = recipe(study, BOTH, study / "whole")
    sets = [f"study.root={study}/study", *SMALL, *BOTH]
    code = f"from synapse_nb.train.recipes import run_recipe; run_recipe({str(ROOT / 'configs/sim_caption.toml')!r}, {sets!r}, {str(study / 'killed')!r})"
    p = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not any(not s.name.endswith("_end") for s in (study / "killed").glob("*/checkpoints/001-*/step_*")): time.sleep(0.005)
    assert p.poll() is None, "ended before it could be killed"
    p.send_signal(signal.SIGKILL); p.wait()
    again = recipe(study, BOTH, study / "killed")
    assert (again.path / "captions.tsv").read_bytes() == (whole.path / "captions.tsv").read_bytes()
    assert read_json(again.path / "caption.json") == read_json(whole.path / "caption.json")


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(study):
    one = recipe(study, QUIET, study / "one")
    launch(ROOT / "configs/sim_caption.toml", 2, [f"study.root={study}/study", *SMALL, *QUIET], out=study / "two", quiet=True, env=ENV, timeout_s=200)
    two = next((study / "two").glob("sim_caption-*"))
    (a, b) = (next(iter(read_json(p / "caption.json")["histories"].values())) for p in (one.path, two))
    assert [r["val_caption_loss"] for r in a] == pytest.approx([r["val_caption_loss"] for r in b], rel=1e-3)
    s, t = (read_saved(p / "captions.tsv") for p in (one.path, two))
    near = [c for c in s if c[0] == "s" and c[1:].isdigit()]
    assert s[["trial_id", "image"]].equals(t[["trial_id", "image"]]) and np.nanmax(np.abs(s[near].to_numpy() - t[near].to_numpy())) < 1e-2
