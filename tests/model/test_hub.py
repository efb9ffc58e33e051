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
from ossia.model.checkpoint_files import find_files
from ossia.model.hub import downloaded, pull, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": bytes(1000), "original/config.json": b"{}", "metal/model.bin": b"x"}
# Of others, as they are on the hub: both kinds of weights, one GGUF file, many with long ones in parts, and neither.
OTHERS = {
    "me/both": {**FILES, "both-F16.gguf": b"F16"},
    "me/one": {"README.md": b"", "one-mxfp4.gguf": b"mxfp4"},
    "me/deep": {"Q8/deep-q8-00001-of-00002.gguf": b"Q8", "Q8/deep-q8-00002-of-00002.gguf": b"_0"},
    "me/many": {
        "config.json": b"{}",
        "many-F16.gguf": b"F16",
        "many-UD-BF16.gguf": b"other",
        "many-BF16.gguf": b"BF16",
        "many-Q4_K_M.gguf": b"Q4_K_M",
        "Q8_0/many-Q8_0-00001-of-00002.gguf": b"Q8",
        "Q8_0/many-Q8_0-00002-of-00002.gguf": b"_0",
    },
    "me/gpt-oss-GGUF": {
        "config.json": b'{"model_type": "gpt_oss"}',
        "gpt-oss-F16.gguf": b"F16",
        "gpt-oss-UD-F16.gguf": b"other",
        "Q8_0/gpt-oss-Q8_0-00001-of-00002.gguf": b"Q8",
        "Q8_0/gpt-oss-Q8_0-00002-of-00002.gguf": b"_0",
    },
    "me/onnx": {"config.json": b"{}", "onnx/model.onnx": b"x"},
}


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's interface for a few repositories."""

    downloads: list[str]

    def do_HEAD(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = OTHERS.get(repository, FILES)
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
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {})
        elif parts[0] == "api":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), {})
        else:
            name = "/".join(parts[4:])
            if self.command == "GET":
                self.downloads.append(name)
            self.answer(200, files[name], {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": COMMIT})

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
    """An empty Hugging Face cache, a hub that refuses connections, and no store of Ollama's."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ossia.model.hub._OLLAMA_STORES", ())
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


def test_the_embedded_model_goes_before_a_folder_that_is_called_so(cache):
    (cache.parent / "nano").mkdir()
    assert (resolve_model("nano") / "model.safetensors").is_file()
    assert resolve_model("./nano") == Path("nano")


@pytest.mark.parametrize("name", ["gpt-oss-20b", "openai/gpt-oss-20b"])
def test_what_was_pulled_is_found_by_name_without_the_other_layouts(name, hub):
    folder = pull(name)
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert resolve_model(name) == resolve_model("gpt-oss-20b", revision="main") == folder


def test_of_two_kinds_of_weights_one_is_downloaded(hub):
    folder = pull("me/both")
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    assert resolve_model("me/both") == folder


def test_a_gguf_file_alone_needs_no_choice(hub):
    folder = pull("me/one")
    assert find_files(resolve_model("me/one")) == (folder / "one-mxfp4.gguf",)
    assert resolve_model("me/one:mxfp4") == pull("me/one:MXFP4") == folder / "one-mxfp4.gguf"


def test_a_gguf_file_in_a_folder_of_its_own_needs_no_choice_either(hub):
    folder = pull("me/deep")
    parts = tuple(folder / "Q8" / f"deep-q8-0000{i}-of-00002.gguf" for i in (1, 2))
    assert find_files(resolve_model("me/deep")) == parts


def test_of_several_gguf_files_one_has_to_be_chosen(hub, monkeypatch):
    with pytest.raises(InputError) as caught:
        pull("me/many")
    assert hub.downloads == []
    message = caught.value.message
    assert "5 GGUF files" in message and "many-Q8_0 (0.0 GiB)" in message and "`ossia pull me/many:BF16`" in message
    with pytest.raises(NotFoundError, match=r"no GGUF file Q2_K\. It has: many-BF16, many-F16, many-Q4_K_M,"):
        pull("me/many:Q2_K")
    with pytest.raises(NotFoundError, match=r"openai/gpt-oss-20b has no GGUF file F16\. It has none"):
        pull("gpt-oss-20b:F16")

    chosen = pull("me/many:bf16")
    assert hub.downloads == ["many-BF16.gguf"] and chosen.read_bytes() == b"BF16"
    parts = find_files(pull("me/many:Q8_0"))
    assert [part.read_bytes() for part in parts] == [b"Q8", b"_0"]
    assert resolve_model("me/many:Q8_0") == parts[0]
    assert resolve_model("me/many:many-BF16.gguf") == chosen
    assert pull("me/many:q4_k_m").read_bytes() == b"Q4_K_M"
    with pytest.raises(NotFoundError, match=r"has no GGUF file F16\. Run `ossia pull me/many:F16`"):
        resolve_model("me/many:F16")

    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert pull("me/many:BF16") == chosen
    with pytest.raises(UnavailableError, match=r"cannot be reached.*has no GGUF file F16"):
        pull("me/many:F16")


def test_a_repository_without_weights_that_ossia_reads_is_not_downloaded(hub):
    with pytest.raises(NotFoundError, match=r"me/onnx has no weights that ossia reads"):
        pull("me/onnx")
    assert hub.downloads == []


def test_what_others_downloaded_of_a_repository_is_found(hub):
    folder = huggingface_hub.snapshot_download("openai/gpt-oss-20b", allow_patterns=["*.safetensors"])
    assert resolve_model("gpt-oss-20b") == Path(folder)


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


def test_what_is_here_are_gguf_files_by_their_endings(hub):
    repository = "me/gpt-oss-GGUF"
    pull(f"{repository}:Q8_0")
    pull(f"{repository}:F16")
    huggingface_hub.hf_hub_download(repository, "gpt-oss-UD-F16.gguf")
    assert downloaded() == [f"{repository}:{ending}" for ending in ("F16", "Q8_0", "gpt-oss-UD-F16")]
    assert len({resolve_model(name) for name in downloaded()}) == 3
    # Of a file in parts one is missing.
    resolve_model(f"{repository}:Q8_0").unlink()
    assert downloaded() == [f"{repository}:{ending}" for ending in ("F16", "gpt-oss-UD-F16")]


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


def test_without_network_a_part_of_a_download_is_not_taken_for_the_whole(cache, monkeypatch):
    """As it lies in a cache that an older huggingface_hub has filled, or that was copied."""
    folder = cache / "models--openai--gpt-oss-20b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (cache / "models--openai--gpt-oss-20b" / "refs").mkdir()
    (cache / "models--openai--gpt-oss-20b" / "refs" / "main").write_text(COMMIT)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="is not complete in") as caught:
        pull("gpt-oss-20b")
    assert "lacks 1 of its 2 shards" in caught.value.message
    (folder / "model-2.safetensors").write_bytes(b"")
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


def test_a_model_of_ollama_s_store_is_found_by_its_name(cache, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(cache / "ollama"))
    with pytest.raises(NotFoundError, match=r"gpt-oss:20b is not in Ollama's store: looked in .*/ollama\. "):
        resolve_model("gpt-oss:20b")
    manifest = cache / "ollama/manifests/registry.ollama.ai/library/gpt-oss/20b"
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{kind}"}
        for kind in ("template", "model")
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    with pytest.raises(NotFoundError, match=r"`ollama pull gpt-oss:20b`, .*`ossia pull gpt-oss-20b`"):
        resolve_model("gpt-oss:20b")
    blob = cache / "ollama/blobs/sha256-model"
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    assert resolve_model("gpt-oss:20b") == blob
    assert downloaded() == ["gpt-oss:20b"]
    manifest.write_text("[]")
    with pytest.raises(NotFoundError, match="not in Ollama's store"):
        resolve_model("gpt-oss:20b")
    assert downloaded() == []
    with pytest.raises(InputError, match=r"gpt-oss-safeguard:20b is Ollama's name.*`ossia pull gpt-oss-safeguard-20b`"):
        pull("gpt-oss-safeguard:20b")


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
