"""Where the numbers of a run come from beside its settings, and whether that is as it was in an earlier record."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from bayestune.errors import BayestuneWarning
from bayestune.experiment.backbone import Backbone
from bayestune.experiment.methods import adapter_file
from bayestune.experiment.processes import process_count
from bayestune.experiment.record import file_sha256, hardware, rows_sha256, versions
from bayestune.tasks import AnyRow


def provenance(
    backbone: Backbone, train: Sequence[AnyRow], evaluation: Sequence[AnyRow], adapter: str | None
) -> dict[str, Any]:
    """Hashes of the base's files, the rows and the adapter to start from; processes, versions and hardware."""
    start = {} if adapter is None else {"start": file_sha256(adapter_file(Path(adapter)))}
    hashes = {
        "base": {path.name: file_sha256(path) for path in _weight_files(backbone)},
        **start,
        "train_rows": rows_sha256(train),
        "eval_rows": rows_sha256(evaluation),
    }
    return {"processes": process_count(), "sha256": hashes, "versions": versions(), "hardware": hardware()}


def _weight_files(backbone: Backbone) -> list[Path]:
    """In the model's folder, or where what was fetched from the Hugging Face Hub is kept."""
    folder: Path | None = Path(backbone.source)
    if not folder.is_dir():
        config = try_to_load_from_cache(backbone.source, "config.json")
        folder = Path(config).parent if isinstance(config, str) else None
    return [] if folder is None else sorted(folder.glob("*.safetensors"))


def warn_if_other(record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Warn of what is not as it was when `record` was made; an empty one says nothing."""
    names = _differences(record, found)
    if names:
        warnings.warn(
            f"the record was made with other {', '.join(names)}: the numbers need not be the same.",
            BayestuneWarning,
            stacklevel=3,
        )


def _differences(record: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What both say, and not alike: "processes", "sha256.train_rows", "versions.torch" and so on."""
    names = []
    for name in record.keys() & found.keys():
        one, other = record[name], found[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names += [f"{name}.{inner}" for inner in one.keys() & other.keys() if one[inner] != other[inner]]
        elif one != other:
            names.append(name)
    return sorted(names)
