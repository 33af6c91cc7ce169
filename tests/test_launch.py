"Many ranks from a kernel or a shell: live rows, one readable error, nobody left behind."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import synapse_nb
import training_program as program
from synapse_nb.core import SynapseError
from synapse_nb.dist import run_ranks
from synapse_nb.train.checkpoint import read_tensors
from synapse_nb.train.launch import find_target, launch
from synapse_nb.train.runs import RunFolder, find_runs, runs_table

ROOT = Path(synapse_nb.__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMOKE = "synapse_nb.train.launch:smoke"


def left(marker):
    "Living processes whose command line holds the marker."
    out = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and marker in " ".join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE: out.append(p)
        except psutil.Error: pass
    return out


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(0.1)
    return False


def test_launch_from_a_process_with_torch_threads_and_a_group(tmp_path):
    "What a kernel may hold: live torch threads and a process group of its own, with its variables in the environment."
    code = f'''
import os, torch, torch.distributed as td
torch.set_num_threads(2); torch.randn(400, 400) @ torch.randn(400, 400)
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", LOCAL_RANK="0")
td.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
from synapse_nb.train.launch import launch
h = launch("n_epochs = 2", nproc=2, target="{SMOKE}")
assert len(h) == 2 and h[1]["train_loss"] < h[0]["train_loss"]
print("history", h[1]["epoch_idx"])
'''
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s), global batch 32" in done.stdout and "epoch 2 of 2" in done.stdout and "history 1" in done.stdout and "@row" not in done.stdout


def test_a_dead_rank_is_one_readable_error():
    with pytest.raises(SynapseError) as e: launch("fail = 1", nproc=2, target=SMOKE, quiet=True, env=ENV)
    text = str(e.value)
    assert "ValueError: rank 1 was told to fail" in text and text.count("Traceback") == 1 and "elastic" not in text and len(text) < 4000


def test_a_wrong_recipe_is_one_sentence(tmp_path):
    with pytest.raises(SynapseError, match="does not exist"): launch(tmp_path / "none.toml", nproc=1, target=SMOKE, quiet=True)
    with pytest.raises(SynapseError) as e: launch("n_epochs = = 2", nproc=1, target=SMOKE, quiet=True, env=ENV)
    assert "TOML" in str(e.value) and "Traceback" not in str(e.value)
    with pytest.raises(SynapseError, match="module:function"): find_target("synapse_nb.nowhere:f")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_no_orphans(tmp_path, sig):
    "The launching process is interrupted, or killed outright (a restarted kernel): its ranks end too."
    marker = f"marker={tmp_path.name}-{int(sig)}"
    code = f'from synapse_nb.train.launch import launch; launch("n_epochs = 100000\\nslow = 0.02", overrides=["{marker}"], nproc=2, target="{SMOKE}", quiet=True)'
    p = subprocess.Popen([sys.executable, "-c", code], env=ENV, stderr=subprocess.DEVNULL)
    mine = lambda: [q for q in left(marker) if q.pid != p.pid]
    assert wait_for(lambda: len(mine()) >= 3)
    time.sleep(2)
    p.send_signal(sig)
    p.wait(60)
    assert wait_for(lambda: not mine(), 150), mine()


def test_a_loss_that_is_no_number_on_one_rank_is_said_with_its_batch():
    "The other rank only loses its partner; that is not what is shown."
    with pytest.raises(SynapseError, match=r"^rank 1: The loss is nan at epoch 0, batch 0 \(rows \d+.*on rank 1") as e: launch("nan = 1", nproc=2, target=SMOKE, quiet=True, env=ENV, timeout_s=200)
    assert "Traceback" not in str(e.value)


def test_the_smoke_script():
    done = subprocess.run(["bash", ROOT / "scripts/smoke_ddp.sh"], env={**ENV, "PYTHON": sys.executable}, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and done.stdout.strip().endswith("two ranks trained together: ok"), done.stdout + done.stderr


def test_the_train_script_runs_a_recipe_with_overrides(tmp_path):
    (tmp_path / "r.toml").write_text("n_epochs = 5\n")
    cmd = ["bash", ROOT / "scripts/train.sh", "--target", SMOKE, "--live", "--set", "n_epochs=1"]
    done = subprocess.run(cmd, env={**ENV, "PYTHON": sys.executable, "NPROC": "1", "CONFIG": str(tmp_path / "r.toml")}, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and done.stdout.count("@row") == 1, done.stdout + done.stderr
    assert subprocess.run(cmd, env={k: v for k, v in ENV.items() if k != "CONFIG"}, capture_output=True, cwd=ROOT).returncode != 0
    for script in ("train.slurm", "train.sh", "smoke_ddp.sh"): subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)


@pytest.mark.slow
def test_torchrun_restarts_after_a_dead_rank_and_nothing_is_lost(tmp_path):
    args = ["--keep-state", "--every-steps", "1", "--epochs", "4", "--dropout", "0.2"]
    run_ranks([program.__file__, "--out", tmp_path / "whole", *args], 2, env=ENV, on_line=None, timeout_s=240)
    run_ranks([program.__file__, "--out", tmp_path / "died", *args, "--die-at", "6"], 2, env=ENV, on_line=None, timeout_s=240, max_restarts=1)
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "died/metrics.csv").read_text()
    a, b = (read_tensors(tmp_path / n / "weights.safetensors")[0] for n in ("whole", "died"))
    assert all((a[k] == b[k]).all() for k in a)


def test_run_folders_know_their_state(tmp_path):
    with RunFolder(tmp_path, "decode", "a = 1\n", "0a1b2c3d") as run:
        code = f"from synapse_nb.train.runs import run_state_of, RunFolder\nprint(run_state_of(r'{run.path}'))\nRunFolder(r'{tmp_path}', 'decode', config_id='0a1b2c3d').start()"
        other = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
        assert other.stdout.strip() == "running" and "Another process is running" in other.stderr
    assert run.state == "finished"
    p = subprocess.Popen([sys.executable, "-c", f"from synapse_nb.train.runs import RunFolder; import time; run = RunFolder(r'{tmp_path}', 'long').start(); time.sleep(60)"], env=ENV)
    assert wait_for(lambda: RunFolder(tmp_path, "long").state == "running")
    p.kill(); p.wait()
    assert RunFolder(tmp_path, "long").state == "broken"
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, "stopped"): raise KeyboardInterrupt
    assert {r.name: r.state for r in find_runs(tmp_path)} == {"decode": "finished", "long": "broken", "stopped": "failed"}
    (tmp_path / "decode-0a1b2c3d/status.json").write_text("{half")
    assert "broken" in runs_table(tmp_path)


def test_a_killed_rank_is_named(tmp_path):
    (tmp_path / "die.py").write_text("import os\nfrom synapse_nb.dist import *\ninit_from_env()\nif rank() == 1: os.kill(os.getpid(), 9)\nbarrier()\n")
    with pytest.raises(SynapseError, match="rank 1 was killed by signal 9"): run_ranks([tmp_path / "die.py"], 2, env=ENV, on_line=None, timeout_s=120)
    (tmp_path / "abort.py").write_text("import os\nif os.environ['RANK'] == '1':\n    def lost_sensor(): os.abort()\n    lost_sensor()\n")
    with pytest.raises(SynapseError, match="rank 1 was killed by signal 6[^~]*in lost_sensor"): run_ranks([tmp_path / "abort.py"], 2, env=ENV, on_line=None, timeout_s=120)
