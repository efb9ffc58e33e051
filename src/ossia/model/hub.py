"""Models by name: found in the ordinary Hugging Face cache, downloaded into it; and found in Ollama's store.

Nothing here is a store of ossia's own: what transformers or vLLM have downloaded is found, and they find ours.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ossia.config import EMBEDDED
from ossia.errors import CheckpointError, InputError, NotFoundError, OssiaError, UnavailableError
from ossia.model.checkpoint_files import find_files

# Names that need no owner.
PUBLISHED = ("gpt-oss-20b", "gpt-oss-120b", "gpt-oss-safeguard-20b", "gpt-oss-safeguard-120b")
_EMBEDDED_FOLDER = Path(__file__).parent.parent / EMBEDDED
# The same weights again in two other layouts: twice the download, and nothing here needs them.
_SKIPPED = ("original/", "metal/")
# Of a user, and of the service on Linux.
_OLLAMA_STORES = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")
# As gpt-oss:20b.
_OLLAMA_NAME = re.compile(r"(gpt-oss|gpt-oss-safeguard):([\w.-]+)")


def resolve_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder or file of a model: the embedded model, a path that exists, or one in the Hugging Face cache.

    Names are `EMBEDDED`, those of `PUBLISHED`, and repositories such as openai/gpt-oss-20b, where owner/name:Q8_0 is
    the GGUF file of that ending; and Ollama's, as gpt-oss:20b. Raises NotFoundError when there is none of these.
    """
    name = str(name_or_path)
    # os.path.expanduser keeps what names no home as it is, where Path's raises; exists is false for names too long.
    path = Path(os.path.expanduser(name))
    # First, since it is what no name stands for: a folder that happens to be called so is ./nano.
    if name == EMBEDDED:
        return _EMBEDDED_FOLDER
    if name and os.path.exists(path):
        return path
    if _OLLAMA_NAME.fullmatch(name):
        return _of_ollama(name)
    repository, ending = _repository(name)
    if not repository:
        raise NotFoundError(
            f"there is no file or folder {name}, and it is no model's name. Give a checkpoint's path, a repository "
            f"such as openai/gpt-oss-20b, or one of: {', '.join((EMBEDDED, *PUBLISHED))}."
        )
    # Imported here: it costs a fifth of a second, and a path needs none of it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    at_revision = f" at revision {revision}" if revision else ""
    command = f"`ossia pull {name}{f' --revision {revision}' if revision else ''}`"
    try:
        # No pattern: others download less of a repository than ossia does. What is missing is told by who reads it.
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
    except (OSError, HFValidationError):
        raise NotFoundError(
            f"model {name} is not here: no file or folder of that name in {Path.cwd()}, and no download of "
            f"{repository}{at_revision} in {constants.HF_HUB_CACHE}. Run {command}, or give the path of a checkpoint."
        ) from None
    if not ending:
        return folder
    files = _of_ending((path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")), ending)
    if not files:
        raise NotFoundError(f"{folder}, the download of {repository}, has no GGUF file {ending}. Run {command}.")
    return folder / files[0]


def _of_ollama(name: str) -> Path:
    """The file of a model in Ollama's store, by the manifest of its name. Raises NotFoundError.

    Source: `types/model/name.go` and `manifest/paths.go` of ollama/ollama.
    """
    model, _, tag = name.partition(":")
    stores = _ollama_stores()
    for store in stores:
        # Of another user perhaps, or half written.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            manifest = json.loads((_ollama_manifests(store) / model / tag).read_bytes())
            (digest,) = (one["digest"] for one in manifest["layers"] if one["mediaType"].endswith("image.model"))
            blob = store / "blobs" / digest.replace(":", "-")
            if blob.is_file():
                return blob
    raise NotFoundError(
        f"model {name} is not in Ollama's store: looked in {', '.join(map(str, stores))}. Run `ollama pull {name}`, or "
        f"download it as it is published: `ossia pull {model}-{tag}`."
    )


def _ollama_stores() -> list[Path]:
    folders = (os.environ.get("OLLAMA_MODELS", ""), *_OLLAMA_STORES)
    return [Path(os.path.expanduser(folder)) for folder in folders if folder]


def _ollama_manifests(store: Path) -> Path:
    return store / "manifests/registry.ollama.ai/library"


def downloaded() -> list[str]:
    """Names of the gpt-oss models that are complete here: published ones, those of others, those in Ollama's store."""
    here = []
    for name in (*PUBLISHED, *_of_others(), *_named_by_ollama()):
        # What was begun, or looked at for its vocabulary alone, has a folder too.
        with contextlib.suppress(OssiaError):
            find_files(resolve_model(name))
            here.append(name)
    return here


def _of_others() -> list[str]:
    """Cached repositories whose config.json is a gpt-oss model's, but for the published ones; of GGUF files each."""
    from huggingface_hub import constants

    names = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        if repository.removeprefix("openai/") in PUBLISHED:
            continue
        # By what they are called: a header has the whole vocabulary, and is slow to read.
        gguf_files = [path.as_posix() for path in folder.glob("snapshots/*/**/*gpt-oss*.gguf")]
        for file in sorted({_name(path) for path in gguf_files}):
            ending = re.split("[-.]", file)[-1]
            is_clear = {_name(path) for path in _of_ending(gguf_files, ending)} == {file}
            names.append(f"{repository}:{ending if is_clear else file}")
        for path in folder.glob("snapshots/*/config.json") if not gguf_files else ():
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads(path.read_bytes()).get("model_type") == "gpt_oss":
                    names.append(repository)
                    break
    return names


def _named_by_ollama() -> list[str]:
    """The names of gpt-oss models that Ollama has manifests of."""
    paths = (path for store in _ollama_stores() for path in _ollama_manifests(store).glob("gpt-oss*/*"))
    return sorted({f"{path.parent.name}:{path.name}" for path in paths})


def pull(name: str, revision: str | None = None, *, show_progress: bool = False) -> Path:
    """Download a model into the Hugging Face cache and return its folder or file; what is there already is kept.

    Of several GGUF files a name such as owner/name:Q8_0 takes one, and its other parts. An interrupted download goes on
    where it stopped. ``show_progress`` lets huggingface_hub draw its bars on stderr. Raises InputError for what is no
    name and where one of several files has to be chosen, NotFoundError when there is no such model, revision or file,
    UnavailableError without network, access or space.
    """
    if match := _OLLAMA_NAME.fullmatch(name):
        raise InputError(
            f"{name} is Ollama's name: run `ollama pull {name}`, or `ossia pull {'-'.join(match.groups())}`."
        )
    repository, ending = _repository(name)
    if not repository:
        raise InputError(f"{name!r} is no model's name; expected a repository or one of: {', '.join(PUBLISHED)}")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    bars: dict[str, Any] = {} if show_progress else {"tqdm_class": _silent_bar()}
    try:
        sizes = _sizes(repository, revision)
        patterns: dict[str, Any] = {"ignore_patterns": [f"{path}*" for path in _SKIPPED]}
        if sizes is not None:
            patterns = {"allow_patterns": list(map(glob.escape, _wanted(sizes, repository, ending)))}
        elif ending:
            patterns = {"allow_patterns": []}
        # Where the hub does not answer, or does not know the name, this finds what is here, or tells why.
        folder = snapshot_download(repository, revision=revision, **patterns, **bars)
        try:
            found = resolve_model(name, revision) if ending else Path(folder)
            if sizes is None:
                # Nobody has said what belongs to it, and what was begun has a folder too.
                find_files(found)
            return found
        except (NotFoundError, CheckpointError) as error:
            raise LocalEntryNotFoundError(error.message) from None
    except OssiaError:
        raise
    except GatedRepoError:
        raise UnavailableError(
            f"{repository} asks for permission: accept its terms at {constants.ENDPOINT}/{repository} and log in with "
            "`hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise NotFoundError(
            f"there is no model {repository} on {constants.ENDPOINT}, or it is private and needs `hf auth login`. "
            f"ossia runs {', '.join(PUBLISHED)}, and models trained from them."
        ) from None
    except RevisionNotFoundError:
        raise NotFoundError(f"{repository} has no revision {revision!r}. Leave it out for the newest.") from None
    except LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{constants.ENDPOINT} cannot be reached, and {repository} is not complete in {constants.HF_HUB_CACHE} "
            f"({_first_line(error.__cause__ or error)}). Check the network (or HF_HUB_OFFLINE), or copy a checkpoint "
            "here and give its path."
        ) from error
    except Exception as error:
        # The transport below huggingface_hub (requests, httpx, hf_xet) differs by version, and so do its exceptions.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UnavailableError(_disk_full(repository, Path(constants.HF_HUB_CACHE))) from error
        raise UnavailableError(
            f"the download of {repository} stopped: {_first_line(error)}. Run `ossia pull {name}` again; what is "
            "complete is not downloaded twice."
        ) from error


def _repository(name: str) -> tuple[str, str]:
    """owner/name for what can be the name of a repository, empty otherwise, and what stands behind its colon."""
    name, _, ending = name.partition(":")
    if name in PUBLISHED:
        return f"openai/{name}", ending
    owner, slash, rest = name.partition("/")
    is_repository = bool(slash and owner.strip(".") and rest) and not owner.startswith("~") and "/" not in rest
    return (name if is_repository and not rest.endswith((".safetensors", ".gguf")) else ""), ending


def _sizes(repository: str, revision: str | None) -> dict[str, int] | None:
    """The files of a repository in bytes; None when the hub does not tell."""
    from huggingface_hub import HfApi, constants

    try:
        # One request that is not tried again: without network list_repo_tree waits for half a minute.
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except Exception:
        # The transport below huggingface_hub (requests, httpx, hf_xet) differs by version, and so do its exceptions.
        return None


def _wanted(sizes: Mapping[str, int], repository: str, ending: str) -> list[str]:
    """Of a repository's files those to download: one layout of the weights, of several GGUF files one."""
    files = [path for path in sizes if not path.startswith(_SKIPPED)]
    gguf_files = [path for path in files if path.endswith(".gguf")]
    names = sorted({_name(path) for path in gguf_files})
    if ending:
        if chosen := _of_ending(gguf_files, ending):
            return chosen
        has = f"It has: {', '.join(names)}." if names else "It has none at all: leave the colon out."
        raise NotFoundError(f"{repository} has no GGUF file {ending}. {has}")
    if any(path.endswith(".safetensors") for path in files):
        return [path for path in files if path not in gguf_files]
    if not names:
        raise NotFoundError(f"{repository} has no weights that ossia reads: neither .safetensors nor .gguf files.")
    if len(names) > 1:
        gibibytes = {name: sum(sizes[path] for path in gguf_files if _name(path) == name) / 2**30 for name in names}
        choices = ", ".join(f"{name} ({gibibytes[name]:.1f} GiB)" for name in names)
        raise InputError(
            f"{repository} has {len(names)} GGUF files, each of them a model: {choices}. Choose one by its ending: "
            f"`ossia pull {repository}:{names[0].rpartition('-')[2]}`."
        )
    return files


def _name(path: str) -> str:
    """What a GGUF file is called, without folder, part and suffix."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.rpartition("/")[2])


def _of_ending(paths: Iterable[str], ending: str) -> list[str]:
    """The GGUF file whose name is, or ends in -, ``ending`` in either case, with its parts: where several do, the
    shortest. Empty if none does."""
    of_name: dict[str, list[str]] = {}
    ending = ending.lower().removesuffix(".gguf")
    for path in sorted(paths):
        name = _name(path)
        if name.lower() == ending or name.lower().endswith((f"-{ending}", f".{ending}")):
            of_name.setdefault(name, []).append(path)
    return of_name[min(of_name, key=len)] if of_name else []


def _disk_full(repository: str, cache: Path) -> str:
    parent = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    return (
        f"the disk is full: {repository} goes to {cache}, where {free_bytes / 2**30:.1f} GiB are free. gpt-oss-20b "
        "needs 12.8 GiB, gpt-oss-120b 60.8 GiB. Free some space, or set HF_HOME to a folder on another disk."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _silent_bar() -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return SilentBar
