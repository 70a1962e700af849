"""The versions of other packages that bayestune stands on, from its own metadata; read before any is imported."""

import importlib.metadata

from packaging.requirements import Requirement

from bayestune.errors import VersionError

_CHECKED = ("torch", "transformers", "peft", "safetensors")


def check_versions() -> None:
    """Refuse an installed package outside of the range that the metadata of bayestune asks for.

    Nothing is checked of a source tree that is not installed, nor of a package without metadata.

    Raises:
        VersionError: the package, the version found, the range expected.
    """
    for name in _CHECKED:
        try:
            declared = importlib.metadata.requires("bayestune") or []
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, declared):
            in_range = requirement.specifier.contains(found, prereleases=True)
            if requirement.name == name and requirement.marker is None and not in_range:
                raise VersionError(
                    f"{name}: found version {found}, expected {requirement.specifier}; "
                    f"pip install '{name}{requirement.specifier}'"
                )
