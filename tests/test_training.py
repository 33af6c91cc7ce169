"Training: exact means, the same run after any interruption, the same gradients on any number of ranks, files that cannot hurt."
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import training_program as program
from torch import nn
from torch.utils.data import DataLoader

import synapse_nb
from synapse_nb.core import SynapseError
from synapse_nb.dist import run_ranks
from synapse_nb.train.callbacks import EMA, BestCheckpoint, LastCheckpoint, keep_states, tracked, wandb_key, warmup_cosine
from synapse_nb.train.checkpoint import State, full_weights, list_states, load_weights, read_tensors
from synapse_nb.train.loop import fit
from synapse_nb.train.runs import RunFolder

PROGRAM = Path(program.__file__)
ENV = {**os.environ, "PYTHONPATH": str(Path(synapse_nb.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def run_one(out, *args): subprocess.run([sys.executable, PROGRAM, "--out", out, *map(str, args)], env=ENV, check=True)
def run_two(out, *args): return run_ranks([PROGRAM, "--out", out, *args], 2, env=ENV, on_line=None, timeout_s=240)
def rows(out): return json.loads((Path(out) / "history.json").read_text())["rows"]
def tensors(out, name="weights"): return read_tensors(Path(out) / f"{name}.safetensors")[0]


def same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


def nearly(a, b, tol=1e-6):
    assert a.keys() == b.keys()
    for k in a:
        err = float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(1e-12))
        assert err <= tol, (k, err)


# --- exact means

@pytest.mark.parametrize("batch", [1, 7, 16, 50, 64])
def test_means_do_not_depend_on_the_batch_size(batch):
    torch.manual_seed(0)
    model, data = nn.Linear(96, 2), program.Augmented(augment=False)
    flat = lambda m, b: program.step(m, {"x": b["x"].flatten(1), "y": b["y"]})
    truth = flat(model, {"x": data.x, "y": data.y})
    row = fit(model, flat, DataLoader(data, batch), n_epochs=1, lr=0.0, weight_decay=0.0, val_loader=DataLoader(data, batch), device="cpu")[0]
    for part in ("train", "val"):
        assert row[f"{part}_loss"] == pytest.approx(truth["loss"].item(), abs=1e-6)
        assert row[f"{part}_correct"] == pytest.approx(float(truth["correct"].double().mean()), abs=1e-15)


def test_accumulation_gives_the_gradient_of_the_whole_group():
    data, grads = program.Augmented(augment=False), {}
    for batch, accumulate in ((50, 1), (16, 4)):
        keep = program.KeepGradients()
        torch.manual_seed(0)
        fit(program.Encoder(), program.step, DataLoader(data, batch), n_epochs=1, accumulate=accumulate, callbacks=[keep], device="cpu")
        grads[batch] = keep.grads
    nearly(grads[16], grads[50], 2e-6)


def test_no_decay_on_biases_and_norms():
    torch.manual_seed(0)
    model = program.Conv()
    zero = lambda m, b: {"loss": 0.0 * sum(p.sum() for p in m.parameters()), "n": 1}
    before = {k: v.clone() for k, v in model.named_parameters()}
    fit(model, zero, [{}], n_epochs=3, lr=0.1, weight_decay=0.5, optimizer=torch.optim.SGD, device="cpu")
    for k, v in model.named_parameters(): assert torch.equal(v, before[k]) == (v.ndim == 1), k


def test_training_leaves_the_callers_random_stream_alone():
    draws, model, train = [], program.Conv(), DataLoader(program.Augmented(), 25, shuffle=True)
    for n_epochs in (0, 1):
        torch.manual_seed(1), random.seed(1)
        fit(model, program.step, train, n_epochs=n_epochs, device="cpu")
        draws.append((torch.rand(1).item(), random.random()))
    assert draws[0] == draws[1]


# --- nothing lost

class Stop:
    def __init__(self, at): self.at = at
    def on_step_end(self, run):
        if run.global_step == self.at: os.kill(os.getpid(), signal.SIGINT)


def interrupted(folder, workers, stops, seed=0, stay=False):
    kw = dict(n_epochs=3, lr=1e-2, val_loader=DataLoader(program.Augmented(27, augment=False), 16), device="cpu", seed=3)
    for i, at in enumerate([*stops, None]):
        torch.manual_seed(seed + i)
        model = program.Conv(0.3)
        cbs = [EMA(0.9), warmup_cosine(), BestCheckpoint()] + ([LastCheckpoint(folder)] if stops else []) + ([Stop(at)] if at else [])
        try: history = fit(model, program.step, DataLoader(program.Augmented(), 16, shuffle=True, num_workers=workers, persistent_workers=stay), callbacks=cbs, resume=folder if stops else None, **kw)
        except KeyboardInterrupt: assert at
    return history, full_weights(model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory): return interrupted(tmp_path_factory.mktemp("none"), 0, [])


@pytest.mark.parametrize("workers,stay", [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("stops", [[], [1], [4], [6, 9]])
def test_k_and_resume_and_m_is_k_plus_m_bit_for_bit(tmp_path, uninterrupted, workers, stay, stops):
    "Without workers, with workers that are started anew for each epoch, and with workers that stay: one result."
    parts = interrupted(tmp_path, workers, stops, stay=stay)
    assert uninterrupted[0] == parts[0]
    same(uninterrupted[1], parts[1])


class Bad(program.Augmented):
    "Row 20 kills its worker, or never comes."
    def __init__(self, how): super().__init__(); self.how = how
    def __getitem__(self, i):
        if i == 20: os.kill(os.getpid(), signal.SIGKILL) if self.how == "dies" else time.sleep(60)
        return super().__getitem__(i)


@pytest.mark.parametrize("how,said", [("dies", "worker"), ("hangs", "timed out after 1 seconds")])
def test_a_batch_that_never_comes_is_named_and_nobody_is_left(tmp_path, how, said):
    loader = DataLoader(Bad(how), 8, num_workers=1, persistent_workers=True, timeout=1 if how == "hangs" else 0)
    with pytest.raises(SynapseError, match=rf"{said}.*epoch 0, batch .*2 \(rows 16, 17, 18, 19, 20, 21, 22, 23\)"): fit(program.Conv(), program.step, loader, n_epochs=1, device="cpu", callbacks=[LastCheckpoint(tmp_path)])
    end = time.monotonic() + 10
    while (left := [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())]) and time.monotonic() < end: time.sleep(0.1)
    assert not left


def kill_and_resume(folder, n_kills, every_steps, seed, ranks=1, wait=(0.3, 1.0)):
    args = ["--out", folder, "--keep-state", "--every-steps", every_steps, "--epochs", 4, "--dropout", 0.2, "--slow", 0.06]
    cmd = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else [])
    rnd, kills = random.Random(seed), 0
    while True:
        for f in Path(folder).glob("at.*"): f.unlink()
        p = subprocess.Popen([*cmd, str(PROGRAM), *map(str, args)], env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills == n_kills: assert p.wait(200) == 0; return
        while not (Path(folder) / f"at.{ranks - 1}").exists() and p.poll() is None: time.sleep(0.01)
        time.sleep(rnd.uniform(*wait) * 0.3)
        os.killpg(p.pid, signal.SIGKILL); p.wait()
        kills += 1


def test_kill_9_three_times_and_continue(tmp_path):
    run_one(tmp_path / "whole", "--keep-state", "--every-steps", 1, "--epochs", 4, "--dropout", 0.2)
    (tmp_path / "killed").mkdir()
    kill_and_resume(tmp_path / "killed", 3, 1, seed=0)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    same(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "killed/metrics.csv").read_text()


@pytest.mark.slow
def test_kill_9_twenty_times_and_continue(tmp_path):
    run_one(tmp_path / "whole", "--keep-state", "--every-steps", 1, "--epochs", 4, "--dropout", 0.2)
    for seed in range(4):
        (tmp_path / f"killed{seed}").mkdir()
        kill_and_resume(tmp_path / f"killed{seed}", 5, 1, seed=seed, wait=(0.0, 1.2))
        assert rows(tmp_path / "whole") == rows(tmp_path / f"killed{seed}")
        same(tensors(tmp_path / "whole"), tensors(tmp_path / f"killed{seed}"))


def test_a_disk_that_fills_up_loses_the_new_state_not_the_old(tmp_path, monkeypatch):
    import synapse_nb.train.checkpoint as ck
    real, calls = ck.save_file, []

    def failing(tensors, path, *a):
        calls.append(path)
        if len(calls) >= 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, *a)
    monkeypatch.setattr(ck, "save_file", failing)
    kw = dict(n_epochs=4, lr=1e-2, device="cpu", resume=tmp_path)
    train = DataLoader(program.Augmented(), 16, shuffle=True)
    torch.manual_seed(0)
    with pytest.raises(SynapseError, match="No space left.*make room"): fit(program.Conv(0.2), program.step, train, callbacks=[LastCheckpoint(tmp_path)], **kw)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000008_end"]                # the second epoch's, whole
    monkeypatch.setattr(ck, "save_file", real)
    resumed = program.Conv(0.2)
    h1 = fit(resumed, program.step, train, callbacks=[LastCheckpoint(tmp_path)], **kw)
    torch.manual_seed(0)
    h2 = fit(whole := program.Conv(0.2), program.step, train, **{**kw, "resume": None})
    assert h1 == h2
    same(full_weights(resumed), full_weights(whole))


def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_old_one(tmp_path):
    torch.manual_seed(0)
    train = DataLoader(program.Augmented(), 16)
    fit(program.Conv(), program.step, train, n_epochs=1, callbacks=[LastCheckpoint(tmp_path)], device="cpu")
    half = tmp_path / ".step_00000099.tmp"
    half.mkdir(); (half / "tensors-00000.safetensors").write_bytes(b"half")
    assert [p.name for p in list_states(tmp_path)] == ["step_00000004_end"]
    assert len(fit(program.Conv(), program.step, train, n_epochs=2, callbacks=[LastCheckpoint(tmp_path)], resume=tmp_path, device="cpu")) == 2


def test_a_pickle_is_never_opened(tmp_path):
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self): return (mark.write_text, ("ran",))
    for name, data in {"a.pt": pickle.dumps(Evil()), "c.ckpt": pickle.dumps(Evil(), protocol=2), "d.safetensors": pickle.dumps(Evil())}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SynapseError, match="pickle"): load_weights(tmp_path / name, nn.Linear(1, 1))
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(SynapseError, match="pickle"): read_tensors(tmp_path / "b.pth")
    state = tmp_path / "states/step_00000001"; state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"format": 1, "n_files": 1, "plain": {}}))
    (state / "tensors-00000.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SynapseError, match="damaged"): State(state)
    assert not mark.exists()


def test_resuming_with_another_model_or_other_data_is_refused(tmp_path):
    kw = dict(n_epochs=2, device="cpu")
    train = DataLoader(program.Augmented(), 16)
    fit(program.Conv(), program.step, train, n_epochs=1, callbacks=[LastCheckpoint(tmp_path)], device="cpu")
    with pytest.raises(SynapseError, match="another model"): fit(program.Encoder(), program.step, train, resume=tmp_path, **kw)
    with pytest.raises(SynapseError, match="batches an epoch"): fit(program.Conv(), program.step, DataLoader(program.Augmented(), 10), resume=tmp_path, **kw)
    with pytest.raises(SynapseError, match="another run"): fit(program.Conv(), program.step, train, callbacks=[LastCheckpoint(tmp_path)], **kw)


# --- trackers

def test_a_key_is_read_from_outside_and_goes_nowhere(tmp_path, monkeypatch):
    secret, calls = "0123456789abcdef" * 2, []

    class Wandb:
        def login(self, **kw): calls.append(("login", kw))
        def init(self, **kw): calls.append(("init", kw)); return self
        def log(self, row, step): calls.append(("log", row))
        def finish(self): calls.append(("finish", {}))
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    inside, outside = tmp_path / "repo/key.txt", tmp_path / "key.txt"
    (tmp_path / "repo/.git").mkdir(parents=True)
    for f in (inside, outside): f.write_text(secret + "\n")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(inside))
    with pytest.raises(SynapseError, match="lies in the git repository"): wandb_key()
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(SynapseError, match="is not there"): wandb_key()
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(outside))
    for mode, logins in (("offline", 0), ("online", 1)):
        calls.clear()
        monkeypatch.setenv("WANDB_MODE", mode)
        with RunFolder(tmp_path / "runs", mode, "a = 1") as run, tracked(["wandb", "tensorboard"], run.path, "demo", {"a": 1}), keep_states(run.checkpoints, table=run.metrics):
            fit(program.Conv(), program.step, DataLoader(program.Augmented(), 16), n_epochs=2, device="cpu", progress_desc="a net")
        assert [c for c, _ in calls] == ["login"] * logins + ["init", "log", "log", "finish"]
        assert all(secret not in repr(kw) for c, kw in calls if c != "login")
        assert list((run.path / "tensorboard/000-a-net").glob("events*"))
    held = [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert {"log.txt", "environment.json", "metrics.csv"} <= {f.name for f in held} and not [f for f in held if secret.encode() in f.read_bytes()]


def test_a_run_folder_keeps_what_was_said(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path, "broken"):
        fit(program.Conv(), program.step, DataLoader(program.Augmented(), 16), n_epochs=1, device="cpu", progress_desc="a net")
        1 / 0
    said = (tmp_path / "broken/log.txt").read_text()
    assert "a net: 1 rank(s), global batch 16" in said and "ZeroDivisionError" in said and "Traceback" in said


# --- many ranks

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    d = tmp_path_factory.mktemp("one")
    for model in ("conv", "encoder"): run_one(d / model, "--model", model, "--batch", 17, "--plain-data", "--double")
    return d


@pytest.mark.parametrize("model,how", [("conv", "ddp"), ("encoder", "ddp"), ("encoder", "fsdp")])
def test_two_ranks_train_what_one_process_trains(one, tmp_path, model, how):
    "50 samples in batches of 17, 17 and 16: uneven shares of uneven batches. In float64, where only a wrong sum could differ (float32 is measured in benchmarks/training.py)."
    run_two(tmp_path, "--model", model, "--batch", "17", "--parallel", how, "--plain-data", "--double")
    info = json.loads((tmp_path / "history.json").read_text())
    assert info["ranks"] == 2 and (info["local"] <= 0.52 if how == "fsdp" else info["local"] == 1)
    nearly(tensors(tmp_path, "gradients"), tensors(one / model, "gradients"), 1e-11)
    nearly(tensors(tmp_path), tensors(one / model), 1e-9)
    for a, b in zip(info["rows"], rows(one / model), strict=True):
        for k in b: assert a[k] == (b[k] if k.endswith(("correct", "epoch_idx")) else pytest.approx(b[k], rel=1e-9)), k


def test_negatives_do_not_stop_at_a_ranks_border(tmp_path):
    "Seven samples, three on one rank and four on the other: the losses and gradients of one process."
    script = PROGRAM.with_name("contrast_program.py")
    subprocess.run([sys.executable, script, tmp_path], env=ENV, check=True)
    run_ranks([script, tmp_path], 2, env=ENV, on_line=None, timeout_s=120)
    one, two = tensors(tmp_path, "ranks1"), tensors(tmp_path, "ranks2")
    assert one["top1"] == two["top1"]
    nearly(two, one, 1e-8)                      # targets are float32 inside, a wrong border would be off by a tenth


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_killed_and_resumed(tmp_path, how):
    args = ["--keep-state", "--every-steps", "1", "--epochs", "4", "--dropout", "0.2", "--model", "encoder", "--parallel", how]
    run_two(tmp_path / "whole", *args)
    (tmp_path / "killed").mkdir()
    cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PROGRAM, "--out", tmp_path / "killed", *args, "--slow", "0.1"]
    p = subprocess.Popen([str(c) for c in cmd], env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    at = tmp_path / "killed/at.1"
    while not at.exists() or len(at.read_text().split()) < 2 or int(at.read_text().split()[1]) < 5: time.sleep(0.02)
    os.kill(int(at.read_text().split()[0]), signal.SIGKILL)              # one rank only: torchrun ends the other
    assert p.wait(120) != 0
    assert list_states(tmp_path / "killed/checkpoints")
    run_two(tmp_path / "killed", *args)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    same(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
