"""A saved posterior that was changed, under checksums that agree with the change: what hashes cannot find."""

import json
from pathlib import Path
from typing import Any

from bayestune.storage.manifest import read_manifest, write_manifest

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "bayestune_manifest.json"


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def seal(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files again, and then with `changes`."""
    manifest = read_manifest(folder)
    for own in ("format", "files"):
        del manifest[own]
    write_manifest(folder, manifest | changes, (CONFIG, TENSORS))
