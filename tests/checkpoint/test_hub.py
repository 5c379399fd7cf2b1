"""Models of a hub, served on this machine."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from dist_int8.checkpoint import resolve_model

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs; the files are on the class."""

    folders: dict[str, Path]
    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        parts = self.path.strip("/").split("?")[0].split("/")
        if parts[:3] == ["api", "models", "org"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = COMMITS.get(revision, revision)
            names = sorted(path.name for path in self.folders[commit].iterdir())
            files = [{"rfilename": name} for name in names]
            tree = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
            body = (
                tree if "tree" in parts else {"id": "org/model", "sha": commit, "siblings": files}
            )
            self.answer(200, json.dumps(body).encode(), {})
            return
        commit = COMMITS.get(parts[3], parts[3])
        path = self.folders[commit] / parts[4]
        if not path.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hash((commit, path.name)):x}"'}
        self.answer(200, body, headers)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(originals, tmp_path, monkeypatch):
    """The server's class; huggingface_hub asks it and caches its answers in tmp_path."""
    for commit, name in zip(COMMITS.values(), ("llama", "bloom"), strict=True):
        folder = Path(shutil.copytree(originals[name], tmp_path / "hub" / commit))
        (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
        (folder / "other.safetensors").write_bytes(b"of another program")
        torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    handler = type(
        "Served", (Hub,), {"folders": {c: tmp_path / "hub" / c for c in COMMITS.values()}}
    )
    handler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield handler
    server.shutdown()


def test_only_files_that_are_read_are_fetched_all_of_one_commit(hub, originals):
    folder = resolve_model("org/model")
    assert folder.name == COMMITS["main"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == (
        originals["llama"] / "model.safetensors"
    ).read_bytes()
    weights = [path for path in hub.requests if "model.safetensors" in path]
    assert weights and all(COMMITS["main"] in path for path in weights)
    # a pinned revision, and pickles only if asked for
    for commit in COMMITS.values():
        (hub.folders[commit] / "model.safetensors").unlink()
    folder = resolve_model("org/model", "old", allow_pickle=True)
    assert folder.name == COMMITS["old"]
    assert {p.name for p in folder.iterdir()} >= {"pytorch_model.bin"}
    assert not (folder / "modeling_evil.py").exists()


def test_a_single_file_is_fetched_before_the_shards_of_an_index(hub):
    main = hub.folders[COMMITS["main"]]
    (main / "model-1.safetensors").write_bytes(b"older")
    index = {"weight_map": {"x": "model-1.safetensors"}}
    (main / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {path.name for path in resolve_model("org/model").iterdir()}
    assert "model.safetensors" in names and "model-1.safetensors" not in names
    (main / "model.safetensors").rename(main / "model-2.safetensors")
    hub.folders["c" * 40] = main  # a commit without it
    names = {path.name for path in resolve_model("org/model", "c" * 40).iterdir()}
    assert "model-1.safetensors" in names and "model-2.safetensors" not in names
