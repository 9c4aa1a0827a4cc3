"""Which base model a checkpoint belongs to, recognised by its files without reading them whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from flexlora_ds.base_model.source import fetch, locate, one_line_errors

_SAMPLE = 4096  # bytes, at each of the places sampled
_PLACES = 16
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def base_fingerprint(model: str | Path, revision: str | None = None) -> str:
    """A SHA-256 over the configuration and, of each weight file, its size, header and sampled bytes.

    Equal for the same model at another place; different for another model, another fine-tune (every weight changes)
    or another shape. Not a proof against somebody who changes single weights on purpose.

    Raises:
        UserError: as `flexlora_ds.base_model.loading.load_causal_lm`.
    """
    source = locate(model, revision)
    with one_line_errors(source, "model"):
        folder = fetch(source, "model")
        digest = hashlib.sha256()
        if source.gguf_file is not None:
            weights = [folder / source.gguf_file]
        else:
            digest.update(_configuration(folder / "config.json"))
            weights = sorted(folder.glob("*.safetensors"))
        for path in weights:
            digest.update(_sampled(path))
        return digest.hexdigest()


def base_revision(model: str | Path, revision: str | None = None) -> str | None:
    """The commit of a hub model's files in the local cache; None for a model on disk.

    Raises:
        UserError: as `base_fingerprint`.
    """
    source = locate(model, revision)
    if source.local:
        return None
    with one_line_errors(source, "model"):
        folder = fetch(source, "model")
    return folder.name if folder.parent.name == "snapshots" else revision


def is_other_base(named: str | None, model: str) -> bool:
    """Whether the base that an adapter names and `model` are of other weights; False unless both are on this disk."""
    if not named or named == model or not (Path(named).exists() and Path(model).exists()):
        return False
    return base_fingerprint(named) != base_fingerprint(model)


def other_base_doubt(named: object, model: str) -> tuple[str, ...]:
    """What is to be said of an adapter on another base than its own, in one line; empty where nothing is.

    Not where the base that it names is no model any more, or names none.
    """
    try:
        other = isinstance(named, str) and is_other_base(named, model)
    except (OSError, ValueError):  # a UserError among them
        return ()
    said = f"the adapter was trained on {named}, whose weights are not those of {model}: its update belongs to them"
    return (said,) if other else ()


def _configuration(path: Path) -> bytes:
    values = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({k: v for k, v in values.items() if k not in _VOLATILE}, sort_keys=True).encode()


def _sampled(path: Path) -> bytes:
    """Size, the beginning (of a safetensors file its whole header: names, shapes, offsets), and spread samples."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header = min(int.from_bytes(file.read(8), "little"), size) if path.suffix == ".safetensors" else 0
        file.seek(0)
        digest.update(file.read(8 + header + _SAMPLE))
        for place in range(_PLACES):
            file.seek(size * place // _PLACES)
            digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.digest()
