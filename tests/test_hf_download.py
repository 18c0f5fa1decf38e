"""`hf_download_*` with the real hub client against a small hub on loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from steps import StepCancelled, StepError, StepFailed
from steps import hf_download_dataset as dataset
from steps import hf_download_model as model

FIRST, SECOND = "1" * 40, "2" * 40
WEIGHTS = os.urandom(300_000)


class Hub:
    """Answers as the hub does for one repository with two commits; `token` closes it, `down` breaks it."""

    def __init__(self):
        self.files = {
            FIRST: {"config.json": b"{}", "old.bin": b"old"},
            SECOND: {"config.json": b'{"v": 2}', "weights/model.bin": WEIGHTS, "README.md": b"# hi\n"},
        }
        self.refs = {"main": SECOND, "v1": FIRST}
        self.token, self.gated, self.down, self.stall = "", False, 0, None
        self.requests = []

    def __call__(self, handler):
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(
            (handler.command, path, handler.headers.get("Authorization"), handler.headers.get("Range"))
        )
        if handler.command == "POST":
            length = int(handler.headers.get("Content-Length", 0))
            body = handler.rfile.read(length)
        else:
            body = b""
        if self.down:
            return self.answer(handler, self.down, b"down")
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            code = "GatedRepo" if self.gated else "RepoNotFound"
            return self.answer(handler, 403 if self.gated else 401, b"no", {"X-Error-Code": code})
        if found := re.fullmatch(r"/api/(?:models|datasets)/team/repo(?:/(revision|tree|paths-info)/([^/]+).*)?", path):
            return self.api(handler, found[1], found[2] or "main", body)
        if found := re.fullmatch(r"(?:/datasets)?/team/repo/resolve/([^/]+)/(.+)", path):
            return self.file(handler, self.refs.get(found[1], found[1]), found[2])
        return self.answer(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def api(self, handler, kind, revision, body):
        commit = self.refs.get(revision, revision)
        if commit not in self.files:
            return self.answer(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.files[commit]
        if kind in ("tree", "paths-info"):
            wanted = set(files)
            if kind == "paths-info":
                text = body.decode()
                wanted = {name for name in files if name in text.replace("%2F", "/") or f'"{name}"' in text}
            entries = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
                for name in sorted(wanted)
            ]
            return self.answer(handler, 200, json.dumps(entries).encode())
        info = {
            "_id": "1", "id": "team/repo", "modelId": "team/repo", "sha": commit, "private": False, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "author": "team",
            "siblings": [{"rfilename": name} for name in sorted(files)],
        }  # fmt: skip
        return self.answer(handler, 200, json.dumps(info).encode())

    def file(self, handler, commit, name):
        data = self.files.get(commit, {}).get(name)
        if data is None:
            return self.answer(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        if wanted is None:
            if self.stall is not None and handler.command == "GET" and name.endswith(".bin"):
                handler.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    handler.send_header(key, value)
                handler.end_headers()
                handler.wfile.write(data[:1000])
                handler.wfile.flush()
                self.stall[0].set()
                self.stall[1].wait(60)
                handler.close_connection = True
                return None
            return self.answer(handler, 200, data, headers)
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self.answer(handler, 206, data[start : end + 1], headers)

    def answer(self, handler, status, body, headers=None):
        handler.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
def hub_context(hub, http_site, step_context, tmp_path):
    """A context whose hub is ours and whose home is the test's folder."""
    address = http_site(hub)

    def make(env=None, secrets=None):
        return step_context(env={"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", **(env or {})}, secrets=secrets)

    return make


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def offline(code, home):
    """Run Python in a fresh process that must not ask the hub."""
    env = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_lands_where_a_later_job_looks(hub_context, tmp_path):
    context = hub_context()
    outputs = model.run(model.Params(model_id="team/repo", cache_dir="cache"), context)
    assert 0 < context.progress[-1]["fraction"] <= 1 and "0.3 MB" in context.progress[-1]["text"]
    snapshot = tmp_path / "cache/hub/models--team--repo/snapshots" / SECOND
    assert outputs == {"path": str(snapshot), "revision": SECOND}
    assert names(snapshot) == ["README.md", "config.json", "weights/model.bin"]
    assert (snapshot / "weights/model.bin").read_bytes() == WEIGHTS
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('team/repo', 'config.json'))"
    assert offline(code, tmp_path / "cache") == str(snapshot / "config.json")


def test_the_default_cache_is_the_hubs_own(hub_context, tmp_path):
    outputs = model.run(model.Params(model_id="team/repo"), hub_context())
    assert outputs["path"].startswith(str(tmp_path / ".cache/huggingface/hub/"))
    elsewhere = model.run(model.Params(model_id="team/repo"), hub_context(env={"HF_HOME": str(tmp_path / "own")}))
    assert elsewhere["path"].startswith(str(tmp_path / "own/hub/"))


def test_revision_and_patterns(hub_context):
    params = model.Params(model_id="team/repo", cache_dir="c", revision="v1", ignore_patterns=["*.bin"])
    outputs = model.run(params, hub_context())
    assert outputs["revision"] == FIRST and names(outputs["path"]) == ["config.json"]
    params = model.Params(model_id="team/repo", cache_dir="d", revision=SECOND, allow_patterns=["weights/*"])
    assert names(model.run(params, hub_context())["path"]) == ["weights/model.bin"]


def test_what_is_there_is_not_fetched_again(hub, hub_context):
    params = model.Params(model_id="team/repo", cache_dir="c")
    model.run(params, hub_context())
    hub.requests.clear()
    model.run(params, hub_context())
    assert not [request for request in hub.requests if request[0] == "GET" and "/resolve/" in request[1]]


def test_the_token_comes_from_the_secret_or_the_environment(hub, hub_context):
    hub.token = "hf_t0ken"
    params = model.Params(model_id="team/repo", cache_dir="c", token_secret="TOKEN")
    context = hub_context(secrets={"TOKEN": "hf_t0ken"})
    assert model.run(params, context)["revision"] == SECOND
    assert "hf_t0ken" not in context.text() + context.text("stderr")
    assert model.run(model.Params(model_id="team/repo", cache_dir="d"), hub_context(env={"HF_TOKEN": "hf_t0ken"}))


@pytest.mark.parametrize(
    ("change", "params", "message"),
    [
        ({}, {"model_id": "team/other"}, "`team/other` cannot be had(.|\n)*hint: look at the id"),
        ({}, {"revision": "v9"}, "hint: `v9` is no branch"),
        ({"token": "x"}, {}, "a private repository looks like this"),
        ({"token": "x", "gated": True}, {}, "hint: accept its terms"),
        ({}, {"model_id": "not/a/repo"}, "not/a/repo"),
        ({}, {"allow_patterns": ["*.nothing"]}, "no file of `team/repo` matches"),
        ({}, {"token_secret": "NONE"}, "secret `NONE` of `token_secret` is not declared"),
    ],
)
def test_what_cannot_be_had_is_final(hub, hub_context, change, params, message):
    vars(hub).update(change)
    with pytest.raises(StepError, match=message) as caught:
        model.run(model.Params(**{"model_id": "team/repo", "cache_dir": "c", **params}), hub_context())
    assert not isinstance(caught.value, StepFailed)


def test_a_hub_that_is_down_may_come_back_even_when_there_is_an_old_copy(hub, hub_context):
    params = model.Params(model_id="team/repo", cache_dir="c")
    hub.down = 501
    with pytest.raises(StepFailed):
        model.run(params, hub_context())
    hub.down = 0
    model.run(params, hub_context())
    hub.down = 501
    with pytest.raises(StepFailed):
        model.run(params, hub_context())


def test_no_hub_is_a_failure_that_may_pass(hub_context):
    with pytest.raises(StepFailed):
        model.run(
            model.Params(model_id="team/repo", cache_dir="c"), hub_context(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
        )


def test_offline_uses_the_cache_or_says_so(hub_context):
    context = hub_context(env={"HF_HUB_OFFLINE": "1"})
    params = model.Params(model_id="team/repo", cache_dir="c")
    with pytest.raises(StepError, match="not in the cache, and `HF_HUB_OFFLINE`"):
        model.run(params, context)
    fetched = model.run(params, hub_context())
    assert model.run(params, context) == fetched


def test_cancel_ends_the_transfer_and_a_later_attempt_finishes_it(hub, hub_context):
    hub.stall = threading.Event(), threading.Event()
    context, ended = hub_context(), []

    def work():
        try:
            model.run(model.Params(model_id="team/repo", cache_dir="c"), context)
        except StepCancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    assert hub.stall[0].wait(60)
    context.cancel()
    thread.join(20)
    hub.stall[1].set()
    assert ended == [True]
    hub.stall = None
    assert model.run(model.Params(model_id="team/repo", cache_dir="c"), hub_context())["revision"] == SECOND


def test_a_file_of_the_plans_folder_does_not_stand_in_for_a_package(hub_context, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit('wrong module')\n")
    assert model.run(model.Params(model_id="team/repo", cache_dir="c"), hub_context())["revision"] == SECOND


def test_a_dataset_without_config_and_split_is_its_files(hub_context, tmp_path):
    params = dataset.Params(dataset_id="team/repo", cache_dir="c", allow_patterns=["*.md"])
    outputs = dataset.run(params, hub_context())
    assert outputs["path"] == str(tmp_path / "c/hub/datasets--team--repo/snapshots" / SECOND)
    assert names(outputs["path"]) == ["README.md"] and outputs["rows"] == 0


def test_a_dataset_with_a_split_is_prepared_and_found_offline(hub, hub_context, tmp_path):
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(20))
    hub.files = {SECOND: {"train.jsonl": rows.encode(), "README.md": b"# data\n"}}
    outputs = dataset.run(dataset.Params(dataset_id="team/repo", split="train[:5]", cache_dir="c"), hub_context())
    assert outputs["rows"] == 5 and outputs["revision"] == SECOND
    assert outputs["path"].startswith(str(tmp_path / "c/datasets/"))
    code = "from datasets import load_dataset; print(load_dataset('team/repo', split='train')[19]['text'])"
    assert offline(code, tmp_path / "c") == "row 19"


def test_a_split_that_is_not_there_is_final(hub, hub_context):
    pytest.importorskip("datasets")
    hub.files = {SECOND: {"train.jsonl": b'{"a": 1}\n'}}
    with pytest.raises(StepError, match="dev") as caught:
        dataset.run(dataset.Params(dataset_id="team/repo", split="dev", cache_dir="c"), hub_context())
    assert not isinstance(caught.value, StepFailed)


def test_patterns_do_not_go_with_a_split(hub_context):
    with pytest.raises(StepError, match="do not go with"):
        dataset.run(dataset.Params(dataset_id="team/repo", split="train", allow_patterns=["*"]), hub_context())


@pytest.mark.parametrize("type", ["hf_download_model", "hf_download_dataset"])
def test_through_the_host(hub, http_site, run_step, type):
    hub.token = "hf_t0ken-value"
    field = "model_id" if type == "hf_download_model" else "dataset_id"
    result = run_step(
        type,
        {field: "team/repo", "cache_dir": "c", "token_secret": "TOKEN"},
        env={"HF_ENDPOINT": http_site(hub), "HF_HUB_DISABLE_XET": "1"},
        secrets={"TOKEN": "TOKEN"},
        node_env={"TOKEN": "hf_t0ken-value"},
    )
    assert result.outcome == "succeeded", result
    assert result.outputs["revision"] == SECOND
