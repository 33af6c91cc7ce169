"""Fetching from a server on this machine that breaks off, lies about sizes, sends wrong bytes, ignores ranges, answers 503: what lies on the disk is whole or is not there."""
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from synapse_nb.core import SynapseError
from synapse_nb.studies.fetch import RemoteFile, SOURCES, choose, download, fetch, list_files


def git_sha(b): return hashlib.sha1(f"blob {len(b)}\0".encode() + b).hexdigest()


class Server:
    "Files by key, served under the three kinds of listing; `faults` {key: list of faults, one taken a request}; `log` of (key, range)."
    def __init__(self):
        self.files, self.faults, self.log, self.page, self.slow = {}, {}, [], 1000, 0
        outer = self

        class H(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *a): pass
            def do_GET(self): outer.answer(self)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), H); self.http.daemon_threads = True; threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, h):
        path, _, query = h.path.partition("?"); q = dict(urllib.parse.parse_qsl(query)); key = urllib.parse.unquote(path.lstrip("/")); asked = h.headers.get("Range"); self.log.append((key, asked))
        if "list-type" in q: return self.send(h, self.s3(q))
        if key.startswith("nodes/"): return self.send(h, self.osf(key, q))
        if key.startswith("repos/"): return self.send(h, json.dumps({"truncated": False, "tree": [{"path": k, "type": "blob", "size": len(v), "sha": git_sha(v)} for k, v in self.files.items()]}).encode())
        key = key.removeprefix("raw/NeuroTechX/eeg-notebooks_v0.1/HEAD/")
        if key not in self.files: return self.send(h, b"no", 404)
        self.serve(h, key, asked, (self.faults.get(key) or [None]).pop(0) if self.faults.get(key) else None)

    def serve(self, h, key, asked, fault):
        body, a = self.files[key], int(asked[6:].split("-")[0]) if asked and fault != "no range" else 0
        if fault in (503, 500, 403): return self.send(h, b"busy", fault)
        if asked and a >= len(body): return self.send(h, b"", 416)
        part = body[a:]
        if fault == "wrong": part = bytes(255 - x for x in part[:50]) + part[50:]
        total = len(body) + (13 if fault == "lies" else 0); h.send_response(206 if a else 200)
        if a: h.send_header("Content-Range", f"bytes {a}-{total - 1}/{total}")
        if fault != "endless": h.send_header("Content-Length", str(len(part) + total - len(body)))
        h.send_header("Connection", "close"); h.end_headers(); h.close_connection = True
        if isinstance(fault, tuple): part = part[:fault[1]]                                        # ("breaks", bytes)
        if fault == "endless": part = part + b"more"*1000
        for k in range(0, len(part), 65536):
            h.wfile.write(part[k:k + 65536])
            if self.slow: time.sleep(self.slow)

    def send(self, h, body, code=200): h.send_response(code); h.send_header("Content-Length", str(len(body))); h.end_headers(); h.wfile.write(body)

    def s3(self, q):
        keys = [k for k in sorted(self.files) if k.startswith(q["prefix"])]; a = int(q.get("continuation-token", 0)); more = a + self.page < len(keys)
        rows = "".join(f"<Contents><Key>{k}</Key><Size>{len(self.files[k])}</Size><ETag>&quot;{hashlib.md5(self.files[k]).hexdigest()}&quot;</ETag></Contents>" for k in keys[a:a + self.page])
        return f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{str(more).lower()}</IsTruncated>{f"<NextContinuationToken>{a + self.page}</NextContinuationToken>" if more else ""}{rows}</ListBucketResult>'.encode()

    def osf(self, key, q):
        node, folder = key.split("/")[1], q.get("folder", ""); mine = {k.removeprefix(f"{node}/"): v for k, v in self.files.items() if k.startswith(f"{node}/")}; names = sorted({k.removeprefix(folder).split("/")[0] for k in mine if k.startswith(folder)}); a = int(q.get("page", 0)); data = []
        for n in names[a:a + 2]:
            if folder + n in mine: v = mine[folder + n]; data.append({"attributes": {"name": n, "kind": "file", "size": len(v), "extra": {"hashes": {"sha256": hashlib.sha256(v).hexdigest(), "md5": "0"}}}, "links": {"download": f"{self.url}/{node}/{folder}{n}"}})
            else: data.append({"attributes": {"name": n, "kind": "folder"}, "relationships": {"files": {"links": {"related": {"href": f"{self.url}/nodes/{node}/files/osfstorage/?folder={folder}{n}/"}}}}})
        return json.dumps({"data": data, "links": {"next": f"{self.url}/{key}?folder={folder}&page={a + 2}" if a + 2 < len(names) else None}}).encode()


@pytest.fixture()
def server():
    s = Server(); r = np.random.default_rng(0)
    for who in ("BIGMEG1", "BIGMEG2"):
        for ses in ("01", "02"): s.files[f"ds004212/sub-{who}/ses-{ses}/meg/sub-{who}_ses-{ses}_task-main_run-01_meg.ds/a.meg4"] = r.bytes(300_000); s.files[f"ds004212/sub-{who}/ses-{ses}/meg/sub-{who}_ses-{ses}_task-main_run-01_events.tsv"] = b"onset\n1\n"
    for k in ("participants.tsv", "dataset_description.json", "sourcedata/sample_attributes_P1.csv", "derivatives/huge.fif", "sub-BIGMEG1/ses-01/anat/t1.nii"): s.files[f"ds004212/{k}"] = r.bytes(1000)
    s.files["ds004212/empty.txt"] = b""
    yield s
    s.http.shutdown()


KW = dict(show=False, wait=0., timeout=10.)
ONE = "sub-BIGMEG1/ses-01/meg/sub-BIGMEG1_ses-01_task-main_run-01_meg.ds/a.meg4"


def whole(server, root, prefix="ds004212/"):
    for p in root.rglob("*"):
        if p.is_file() and not p.name.startswith("."): assert p.read_bytes() == server.files[prefix + p.relative_to(root).as_posix()], p
    assert not list(root.rglob("*.part"))


def test_a_session_of_a_person_and_its_cost_first(server, tmp_path, capsys):
    server.page = 3
    rows = fetch("things_meg", tmp_path / "d", ["BIGMEG1"], ["1"], dry_run=True, base=server.url)
    said = capsys.readouterr().out
    assert "CC0" in said and "https://openneuro.org/datasets/ds004212" in said and re.search(r"30[23] kB to fetch", said) and not (tmp_path / "d").exists()
    assert [r["path"] for r in rows] == ["dataset_description.json", "empty.txt", "participants.tsv", "sourcedata/sample_attributes_P1.csv", "sub-BIGMEG1/ses-01/meg/sub-BIGMEG1_ses-01_task-main_run-01_events.tsv", ONE]
    fetch("things_meg", tmp_path / "d", ["sub-BIGMEG1"], ["ses-01"], base=server.url, **KW); whole(server, tmp_path / "d")
    assert {r["state"] for r in fetch("things_meg", tmp_path / "d", base=server.url, **KW)} == {"have", "fetched"}; whole(server, tmp_path / "d")
    n = len(server.log); rows = fetch("things_meg", tmp_path / "d", base=server.url, **KW)
    assert {r["state"] for r in rows} == {"have"} and all(k == "" for k, _ in server.log[n:])           # nothing but the listing is asked for
    assert not (tmp_path / "d/derivatives").exists() and not (tmp_path / "d/sub-BIGMEG1/ses-01/anat").exists()


@pytest.mark.parametrize("fault", [[("breaks", 100_000), ("breaks", 50_000)], [503, 500], [("breaks", 100_000), "no range"], ["wrong"], [("breaks", 70_000), 503, ("breaks", 10)]], ids=str)
def test_a_server_that_fails_is_outlasted(server, tmp_path, fault):
    server.faults["ds004212/" + ONE] = list(fault)
    fetch("things_meg", tmp_path, ["BIGMEG1"], ["01"], base=server.url, **KW); whole(server, tmp_path)
    asked = [r for k, r in server.log if k.endswith(ONE)]
    if fault[0] == ("breaks", 100_000) and len(fault) == 2 and fault[1] == ("breaks", 50_000): assert asked == [None, "bytes=100000-", "bytes=150000-"]       # continued, not begun anew


@pytest.mark.parametrize("fault,says", [("lies", "the server speaks of 300013 bytes, the listing of 300000"), ("wrong", "not the checksum of the listing.*twice"), ("endless", "more than the 300000 bytes"), (403, "answers 403"), (("breaks", 0), "breaks off at byte 0 of 300000"), (500, "answers 500")], ids=str)
def test_a_server_that_cannot_be_trusted_is_named_and_nothing_is_kept(server, tmp_path, fault, says):
    server.faults["ds004212/" + ONE] = [fault] * 40
    with pytest.raises(SynapseError, match=says): fetch("things_meg", tmp_path, ["BIGMEG1"], ["01"], base=server.url, **KW, retries=2)
    assert not (tmp_path / ONE).exists()
    server.faults.clear(); fetch("things_meg", tmp_path, ["BIGMEG1"], ["01"], base=server.url, **KW); whole(server, tmp_path)


def test_a_listing_that_lies(server, tmp_path):
    f = next(f for f in list_files("things_meg", server.url) if f.path == ONE)
    for size in (299_000, 301_000):
        with pytest.raises(SynapseError, match="one of them lies"): download(RemoteFile(f.path, f.url, size, f.digest), tmp_path / "a", wait=0)
    (tmp_path / "b.part").write_bytes(b"z" * 400_000); download(f, tmp_path / "b", wait=0); assert (tmp_path / "b").read_bytes() == server.files["ds004212/" + ONE]       # a part longer than the file
    (tmp_path / "c.part").write_bytes(b"z" * 1000); download(f, tmp_path / "c", wait=0); assert (tmp_path / "c").read_bytes() == server.files["ds004212/" + ONE]         # a part of another file
    server.files["ds004212/../../outside.txt"] = b"x"; server.files["ds004212/sub-1/meg/../../../../x"] = b"x"
    with pytest.raises(SynapseError, match="outside the study's folder"): list_files("things_meg", server.url)


def test_a_file_spoiled_on_the_disk_is_fetched_again(server, tmp_path):
    fetch("things_meg", tmp_path, ["BIGMEG1"], ["01"], base=server.url, **KW); p = tmp_path / ONE; b = bytearray(p.read_bytes()); b[5] ^= 1; p.write_bytes(b)
    rows = {r["path"]: r["state"] for r in fetch("things_meg", tmp_path, ["BIGMEG1"], ["01"], base=server.url, **KW)}
    assert rows[ONE] == "fetched" and list(rows.values()).count("fetched") == 1; whole(server, tmp_path)


PROGRAM = """
import sys; from synapse_nb.studies.fetch import fetch
print("begin", flush=True); fetch("things_meg", sys.argv[1], base=sys.argv[2], show=False, wait=0); print("end", flush=True)
"""


def test_killed_in_the_middle_and_continued(server, tmp_path):
    server.slow = .02
    for k in range(3):
        p = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "d"), server.url], stdout=subprocess.PIPE, text=True); p.stdout.readline(); time.sleep(.15 + .1 * k); p.send_signal(signal.SIGKILL); p.wait()
        for f in (tmp_path / "d").rglob("a.meg4"): assert f.read_bytes() == server.files["ds004212/" + f.relative_to(tmp_path / "d").as_posix()]      # what has its name is whole
    parts = [f for f in (tmp_path / "d").rglob("*.part") if f.stat().st_size]
    server.slow = 0; n = len(server.log); fetch("things_meg", tmp_path / "d", base=server.url, **KW); whole(server, tmp_path / "d")
    assert sum(r is not None for _, r in server.log[n:]) == len(parts)                              # what was begun goes on where it stopped


def test_osf_zips_are_walked_checked_and_unpacked(server, tmp_path):
    for who in ("01", "02"):
        z = io.BytesIO()
        with zipfile.ZipFile(z, "w") as f:
            for ses in ("01", "02"): f.writestr(f"sub-{who}/ses-{ses}/raw_eeg_test.npy", bytes([int(ses)]) * 500)
        server.files[f"crxs4/raw/sub-{who}.zip"] = z.getvalue()
    server.files["crxs4/readme.txt"] = b"no"; server.files["y63gw/image_metadata.npy"] = b"m" * 10; server.files["y63gw/training_images.zip"] = b"pictures"
    assert [f.path for f in list_files("things_eeg2", server.url)] == ["image_metadata.npy", "raw/sub-01.zip", "raw/sub-02.zip"]
    rows = fetch("things_eeg2", tmp_path / "a", ["1"], base=server.url, **KW)
    assert [r["state"] for r in rows] == ["fetched", "unpacked"] and sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.npy")) == ["image_metadata.npy", "sub-01/ses-01/raw_eeg_test.npy", "sub-01/ses-02/raw_eeg_test.npy"]
    n = len(server.log); assert {r["state"] for r in fetch("things_eeg2", tmp_path / "a", ["1"], base=server.url, **KW)} == {"have"} and not [k for k, _ in server.log[n:] if k.endswith(".zip")]
    fetch("things_eeg2", tmp_path / "b", ["01"], ["02"], base=server.url, **KW); assert [p.parent.name for p in (tmp_path / "b").rglob("raw_eeg_test.npy")] == ["ses-02"]
    z = io.BytesIO()
    with zipfile.ZipFile(z, "w") as f: f.writestr("../../evil.npy", b"x")
    server.files["crxs4/raw/sub-03.zip"] = z.getvalue()
    with pytest.raises(SynapseError, match="outside"): fetch("things_eeg2", tmp_path / "c", ["3"], base=server.url, **KW)
    server.files["crxs4/raw/sub-04.zip"] = b"PK not a zip" * 20
    with pytest.raises(SynapseError, match="cannot be unpacked"): fetch("things_eeg2", tmp_path / "c", ["4"], base=server.url, **KW)
    assert not (tmp_path / "evil.npy").exists()


def test_the_headband_sets_come_from_a_git_host(server, tmp_path):
    server.files = {f"data/visual/N170/subject{s}/session1/x.csv": f"timestamps\n{s}\n".encode() * 50 for s in (1, 2, 10)} | {"data/visual/P300/subject1/session1/y.csv": b"t\n", "setup.py": b"x"}
    rows = fetch("n170", tmp_path, ["1"], base=server.url, **KW); assert [r["path"] for r in rows] == ["data/visual/N170/subject1/session1/x.csv"]; whole(server, tmp_path, "")
    with pytest.raises(SynapseError, match="no subject '3'; there are 1, 2, 10"): fetch("n170", tmp_path, ["3"], base=server.url, **KW)


def test_what_cannot_be_fetched(server, tmp_path):
    with pytest.raises(SynapseError, match="private"): fetch("movie", tmp_path)
    with pytest.raises(SynapseError, match="No public set.*Did you mean 'things_eeg'"): fetch("thing_eeg", tmp_path)
    with pytest.raises(SynapseError, match="lists no file of 'stories'"): fetch("stories", tmp_path, base=server.url, **KW)
    with pytest.raises(SynapseError, match="cannot be reached"): fetch("stories", tmp_path, base="http://127.0.0.1:9", show=False, wait=0.)
    server.files = {"ds003825/participants.tsv": b"x"}
    import shutil
    old = shutil.disk_usage
    try:
        shutil.disk_usage = lambda p: type("U", (), {"free": 0})()
        with pytest.raises(SynapseError, match="has 0 B left"): fetch("things_eeg", tmp_path, base=server.url, **KW)
    finally: shutil.disk_usage = old
    assert choose([RemoteFile("sub-01/x", "", 1)], None, None) and set(SOURCES) >= {"things_eeg", "things_eeg2", "things_meg", "stories", "tones", "n170", "p300", "left_right", "ssvep"}


def test_the_command(server, tmp_path):
    run = lambda *a: subprocess.run([sys.executable, "-c", "import sys; from synapse_nb.apps.cli import main; sys.exit(main())", "fetch", *a], capture_output=True, text=True)
    p = run("things_meg", "--subjects", "BIGMEG1", "--sessions", "01", "--dry-run", "--out", str(tmp_path / "d"), "--mirror", server.url)
    assert p.returncode == 0 and ONE in p.stdout and "licence CC0" in p.stdout and not (tmp_path / "d").exists(), p.stderr
    p = run("things_meg", "--subjects", "BIGMEG1", "--sessions", "01", "--out", str(tmp_path / "d"), "--mirror", server.url); assert p.returncode == 0, p.stderr; whole(server, tmp_path / "d")
    p = run("god", "--out", str(tmp_path / "d")); assert p.returncode == 1 and "private" in p.stderr
