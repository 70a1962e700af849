"""Record what a run's numbers depend on besides its settings, and compare it with an earlier record."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from bayestune.errors import BayestuneWarning
from bayestune.experiment.backbone import Backbone
from bayestune.experiment.folder import POSTERIOR
from bayestune.experiment.processes import process_count
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.experiment.settings import Experiment
from bayestune.experiment.start import adapter_file
from bayestune.files import MANIFEST, file_sha256
from bayestune.packaged import GGUF_RECORD
from bayestune.tasks import AnyRow

_SETTINGS = ("config.json", "tokenizer*.json", "*.model", "vocab.*", "merges.txt", "*_tokens*.json")
"""The configuration and tokenizer files beside the weights."""


def provenance(backbone: Backbone, rows: Mapping[str, Sequence[AnyRow]], experiment: Experiment) -> dict[str, Any]:
    """Return hashes of what a run is made from, and the processes, versions and hardware.

    The hashes are those of the base's files, the rows, the adapter to start from, and the run that the method asks.

    Args:
        backbone: the base model.
        rows: the rows by use, such as "train" and "eval"; empty lists are left out.
        experiment: the settings.
    """
    start, source = {}, experiment.method.source_run
    if experiment.adapter is not None:
        start["start"] = file_sha256(adapter_file(Path(experiment.adapter)))
    if source is not None and (asked := Path(source) / POSTERIOR / MANIFEST).is_file():
        start["source_run"] = file_sha256(asked)
    hashes = {
        "base": _hashes(backbone, "*.safetensors", GGUF_RECORD) or _hashes(backbone, "pytorch_model*.bin"),
        "base_settings": _hashes(backbone, *_SETTINGS),
        **start,
        **{f"{use}_rows": rows_sha256(found) for use, found in rows.items() if found},
    }
    return {"processes": process_count(), "sha256": hashes, "versions": versions(), "hardware": hardware()}


def _hashes(backbone: Backbone, *patterns: str) -> dict[str, str]:
    """Return the SHA-256 of each file by its name, from the model's folder or the cache of the Hugging Face Hub."""
    folder: Path | None = Path(backbone.source)
    if not folder.is_dir():
        config = try_to_load_from_cache(backbone.source, "config.json")
        folder = Path(config).parent if isinstance(config, str) else None
    if folder is None:
        return {}
    found = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: file_sha256(found[name]) for name in sorted(found)}


def warn_if_other(record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Warn about every value in which `found` differs from `record`."""
    names = differences(record, found)
    if names:
        warnings.warn(
            f"the record was made with different {', '.join(names)}: the numbers may differ.",
            BayestuneWarning,
            stacklevel=3,
        )


def differences(record: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the keys in both whose values differ, such as "processes", "sha256.train_rows" or "versions.torch"."""
    names = []
    for name in record.keys() & found.keys():
        one, other = record[name], found[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names += [f"{name}.{inner}" for inner in one.keys() & other.keys() if one[inner] != other[inner]]
        elif one != other:
            names.append(name)
    return sorted(names)
