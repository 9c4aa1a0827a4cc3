"""Find a base model (hub id, local folder or `.gguf` file); one-line errors for what is missing."""

from __future__ import annotations

import importlib.util
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flexlora_ds.errors import UserError
from flexlora_ds.home import at_home
from flexlora_ds.terminal.command import one_line

_PROBE_SECONDS = 5.0
_GGUF_PACKAGES = ("gguf", "accelerate")  # what transformers needs to read a GGUF file
_TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*", "*.model")
_MODEL_FILES = ("*.json", "*.safetensors")
_OTHER_COPIES = ("original/*", "onnx/*", "consolidated*")  # the same weights in other formats


FORESEEN = (OSError, ValueError, ImportError, KeyError)
"""What transformers raises where a model cannot be loaded, and says why."""
LONGEST_TEXT = 600
"""Characters of another library's message; its beginning and its end are kept."""


@dataclass(frozen=True)
class ModelSource:
    """A base model: the name the user gave, the hub repository or folder, and for a GGUF the file in it."""

    name: str
    repo: str
    local: bool
    gguf_file: str | None = None
    revision: str | None = None


def locate(model: str | Path, revision: str | None = None) -> ModelSource:
    """Resolve what the user called the model, without touching the network.

    Raises UserError if nothing usable is behind a path, or if the packages to read a GGUF are missing.
    """
    name = str(model)
    path = Path(at_home(name))
    if path.suffix == ".gguf":
        return _locate_gguf(name, path, revision)
    if path.is_dir():
        _require_config(name, path)
        return ModelSource(name, str(path), local=True)
    if path.exists():
        raise UserError(
            f"model {name} is a file", mend="give the folder that holds config.json, or a .gguf file"
        )
    if _looks_like_path(name):
        raise UserError(
            f"model folder {name} does not exist", mend="give an existing one, a .gguf file or a hub id"
        )
    return ModelSource(name, name, local=False, revision=revision)


def _locate_gguf(name: str, path: Path, revision: str | None) -> ModelSource:
    missing = [package for package in _GGUF_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        needed = " ".join(missing)
        raise UserError(
            f"model {name} is a GGUF file and reading it needs: {needed}", mend=f"pip install {needed}"
        )
    if path.is_file():
        return ModelSource(name, str(path.parent), local=True, gguf_file=path.name)
    parts = name.split("/")
    if len(parts) == 3 and not path.parent.exists() and not _looks_like_path("/".join(parts[:2])):
        return ModelSource(name, "/".join(parts[:2]), local=False, gguf_file=parts[2], revision=revision)
    raise UserError(
        f"model file {name} does not exist", mend="give an existing .gguf file, a folder or a hub id"
    )


def _require_config(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model folder {name} holds an adapter", mend="give its base model, and this as the adapter"
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    mend = f"give the file itself: {folder / ggufs[0]}" if ggufs else "give the folder a model was saved to"
    raise UserError(f"model folder {name} holds no config.json", mend=mend)


def _looks_like_path(name: str) -> bool:
    if name in ("", ".", "..") or name.count("/") > 1:
        return True
    return name.startswith(("/", "./", "../", "~")) or name.endswith("/")


def fetch(source: ModelSource, what: str) -> Path:
    """The folder with the files of `what` ("model" or "tokenizer"), fetched from the hub if it is not local.

    Raises what huggingface_hub raises; call it inside `one_line_errors`.
    """
    if source.local:
        return Path(source.repo)
    from huggingface_hub import snapshot_download

    patterns = list(_TOKENIZER_FILES if what == "tokenizer" else _MODEL_FILES)
    if source.gguf_file is not None:
        patterns = [source.gguf_file]
    folder = snapshot_download(
        source.repo,
        revision=source.revision,
        allow_patterns=patterns,
        ignore_patterns=list(_OTHER_COPIES),
        local_files_only=not _hub_reachable(),
    )
    return Path(folder)


def _hub_reachable() -> bool:
    """Whether the hub answers at all; asked first, as its client retries for half a minute, and aloud."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def one_line_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Turn what the hub or transformers raises while loading `what` (a noun) into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _explain(source, what, error)
        if message is None:
            raise
        raise UserError(message) from error


def _explain(source: ModelSource, what: str, error: Exception) -> str | None:
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    chain = list(_causes(error))
    page = f"https://huggingface.co/{source.repo}"
    access = f"accept its licence at {page} and set HF_TOKEN or run `hf auth login`"
    if _any(chain, hub.GatedRepoError):
        return f"{what} {source.name} is gated and this account has no access; {access}"
    if _any(chain, hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
        revision = source.revision or "main"
        return f"the hub has no {source.name} at revision {revision}; correct it or, if private, {access}"
    if _any(chain, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError):
        return (
            f"{what} {source.name} is neither a local folder nor in the Hugging Face cache, and the hub "
            f"cannot be reached; where it can, run `hf download {source.repo}` and give the folder it prints "
            f"(a gated one, such as Meta's Llama: first {access})"
        )
    if _any(chain, SafetensorError):
        return f"a weight file of {what} {source.name} is damaged ({_short(error)}); fetch it again"
    if any("trust_remote_code" in str(cause) for cause in chain):
        return (
            f"{what} {source.name} needs code that comes with it, and such code is never run; "
            "name one that transformers knows by itself"
        )
    if isinstance(
        error, (*FORESEEN, hub.StrictDataclassError)
    ):  # which is what a configuration's values raise
        return f"{what} {source.name} cannot be loaded ({_short(error)}); check it or name another"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _any(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in chain)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error), LONGEST_TEXT)}"
