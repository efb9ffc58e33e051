"""Models by name, against a hub of our own on this machine: real requests, real files, no internet."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from ossia.errors import InputError, NotFoundError, UnavailableError
from ossia.model.hub import downloaded, pull, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": bytes(1000), "original/config.json": b"{}", "metal/model.bin": b"x"}


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's interface for one repository, openai/gpt-oss-20b."""

    downloads: list[str]

    def do_HEAD(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if "other" in parts:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "gated" in parts:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "v9" in parts:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "broken" in parts:
            self.answer(500, b"{}", {})
        elif "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in FILES.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {})
        elif parts[0] == "api":
            self.answer(200, json.dumps({"id": "openai/gpt-oss-20b", "sha": COMMIT, "siblings": []}).encode(), {})
        else:
            name = "/".join(parts[4:])
            if self.command == "GET":
                self.downloads.append(name)
            self.answer(200, FILES[name], {"ETag": f'"{_etag(FILES[name])}"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def set_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What the variable HF_ENDPOINT does when huggingface_hub is imported."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and a hub that refuses connections."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch) -> type[Hub]:
    """The same with a hub that answers."""
    handler = type("FreshHub", (Hub,), {"downloads": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_path_that_exists_is_itself(tmp_path):
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_goes_before_a_name(cache):
    (cache.parent / "gpt-oss-20b").mkdir()
    assert resolve_model("gpt-oss-20b") == Path("gpt-oss-20b")


@pytest.mark.parametrize("name", ["gpt-oss-20b", "openai/gpt-oss-20b"])
def test_what_was_pulled_is_found_by_name_without_the_other_layouts(name, hub):
    folder = pull(name)
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert resolve_model(name) == resolve_model("gpt-oss-20b", revision="main") == folder


def test_what_is_here_are_published_models_and_others_of_their_kind(hub, cache):
    assert downloaded() == []
    pull("gpt-oss-20b")
    for name, kind in (("me/tuned", "gpt_oss"), ("me/else", "llama"), ("me/broken", None)):
        folder = cache / f"models--{name.replace('/', '--')}"
        for path, text in (
            ("refs/main", COMMIT),
            (f"snapshots/{COMMIT}/config.json", json.dumps({"model_type": kind})),
        ):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text(text if kind else "[")
    snapshot = cache / "models--me--tuned" / "snapshots" / COMMIT
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").write_bytes(b"")
    # Interrupted: a shard is missing.
    assert downloaded() == ["gpt-oss-20b"]
    (snapshot / "model-2.safetensors").write_bytes(b"")
    assert downloaded() == ["gpt-oss-20b", "me/tuned"]
    # Looked at for its vocabulary alone.
    (resolve_model("gpt-oss-20b") / "model.safetensors").unlink()
    assert downloaded() == ["me/tuned"]


def test_what_is_there_is_not_downloaded_twice(hub):
    folder = pull("gpt-oss-20b")
    (folder / "config.json").unlink()
    hub.downloads.clear()
    assert pull("gpt-oss-20b") == folder
    assert "model.safetensors" not in hub.downloads
    assert (folder / "config.json").exists()


def test_progress_bars_are_drawn_when_asked_for_and_not_otherwise(hub, capfd):
    pull("gpt-oss-20b")
    assert capfd.readouterr() == ("", "")
    (resolve_model("gpt-oss-20b") / "config.json").unlink()
    pull("gpt-oss-20b", show_progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "files" in captured.err


def test_without_network_a_complete_download_still_counts(hub, monkeypatch):
    folder = pull("gpt-oss-20b")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert pull("gpt-oss-20b") == folder


def test_a_model_that_is_not_here_is_told_with_where_it_was_looked_for_and_how_to_get_it(cache):
    with pytest.raises(NotFoundError) as caught:
        resolve_model("gpt-oss-safeguard-20b")
    message = caught.value.message
    assert "openai/gpt-oss-safeguard-20b" in message
    assert str(cache) in message and str(cache.parent) in message
    assert "ossia pull gpt-oss-safeguard-20b" in message
    with pytest.raises(NotFoundError, match=r"at revision v1 .*ossia pull gpt-oss-20b --revision v1"):
        resolve_model("gpt-oss-20b", revision="v1")


@pytest.mark.parametrize(
    "name",
    ["gpt-oss-21b", "a/b/c", "./folder", "../model", "/no/such", "folder/x.gguf", "", "~nobody-here/x", "x" * 5000],
    ids=lambda name: name[:20] or "empty",
)
def test_what_is_neither_a_path_nor_a_name_is_told_with_the_names_there_are(name, cache):
    with pytest.raises(NotFoundError, match=r"no file or folder.*gpt-oss-20b, gpt-oss-120b"):
        resolve_model(name)
    with pytest.raises(InputError, match=r"no model's name"):
        pull(name)


def test_without_network_the_error_names_the_host_and_the_cache(cache):
    with pytest.raises(UnavailableError) as caught:
        pull("gpt-oss-20b")
    assert "http://127.0.0.1:9 cannot be reached" in caught.value.message
    assert str(cache) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


def test_offline_mode_is_told_by_its_name(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        pull("gpt-oss-20b")


@pytest.mark.parametrize(
    ("name", "revision", "error", "words"),
    [
        ("openai/other", None, NotFoundError, "there is no model openai/other"),
        ("openai/gated", None, UnavailableError, "asks for permission.*hf auth login"),
        ("gpt-oss-20b", "v9", NotFoundError, "has no revision 'v9'"),
        ("openai/--bad--", None, NotFoundError, "there is no model openai/--bad--"),
        ("openai/broken", None, UnavailableError, "openai/broken"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(name, revision, error, words, hub):
    with pytest.raises(error, match=words):
        pull(name, revision)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"the disk is full: .* GiB are free.*HF_HOME"),
        (
            RuntimeError("connection reset\nby peer"),
            r"stopped: RuntimeError: connection reset\. .*ossia pull gpt-oss-20b",
        ),
    ],
)
def test_a_download_that_breaks_off_is_told_with_what_to_do(cause, words, cache, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UnavailableError, match=words):
        pull("gpt-oss-20b")
