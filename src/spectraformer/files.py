"""Files that are whole or absent: written beside their place, synced, renamed; read only if their hash is right."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectraformer.config import digest

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"


class DamagedError(ValueError):
    """A file or directory is not what was written: truncated, changed, or something else altogether."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that any reader, now or after a crash, sees all of the old or all of the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON values atomically, for people to read too."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON values of a file.

    Raises:
        DamagedError: If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: {error}") from None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with the sha256 of the others among them."""
    return {**content, "sha256": digest(dict(content))}


def require_sealed(content: Mapping[str, Any], path: Path) -> None:
    """Raises ``DamagedError`` unless the values read from a file are those that :func:`seal` saw."""
    try:
        whole = content.get("sha256") == digest({key: value for key, value in content.items() if key != "sha256"})
    except (TypeError, RecursionError):  # NaN, infinity and nesting without end are never written
        whole = False
    if not whole:
        raise DamagedError(f"{path} was changed after it was written: its sha256 does not match")


def require_folder(name: str, path: Path) -> None:
    """Raises ``ValueError`` if a file is where a folder is, or is to be made."""
    if next(place.is_dir() for place in (path, *path.absolute().parents) if place.exists()):
        return
    raise ValueError(f"{name} is {str(path)!r}, where a file is in the way; expected a folder, or a place for one")


def remove(path: Path) -> None:
    """Removes a file, or a directory with all that is in it; nothing there is well, too."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Makes renames inside a directory survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (AttributeError, PermissionError):  # not on every system
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal.

    Args:
        path: The file.
        advance: Called with the number of bytes read, as they are.
    """
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return total.hexdigest()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which appears under its name when the block ends well, and never half filled.

    Its files are synced first. A directory of that name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_directory(temporary)
        if path.exists():
            old = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
            path.rename(old)
            temporary.rename(path)
            remove(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(path.parent)


def remove_unfinished(directory: Path, name: str = "*") -> None:
    """Removes what a killed process left half written, of all names or one; only where no other process writes."""
    for path in directory.glob(f"{UNFINISHED}{name}-{'[0-9a-f]' * 8}"):
        remove(path)


def write_manifest(directory: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Describes all files of a directory, with their sha256 and that of the description; returns what it wrote."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and not path.name.startswith(UNFINISHED)
    }
    manifest = seal({**content, "files": files})
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(
    directory: Path, kind: str, newest: int, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """The manifest of a directory, after checking every file against it.

    Args:
        directory: Where it is.
        kind: What the directory must hold, the manifest's "kind".
        newest: Highest format that can be read.
        advance: Called with the number of bytes checked.

    Raises:
        DamagedError: If anything is missing, differs from what was written, or is of another kind.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{directory} has no {MANIFEST}: it is not a finished {kind}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{path} is not the manifest of a {kind}")
    require_sealed(manifest, path)
    if manifest.get("kind") != kind:
        raise DamagedError(f"{directory} holds a {manifest.get('kind')}; expected a {kind}")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > newest:
        raise DamagedError(
            f"{directory} has format {manifest.get('format')}, newer than this version reads ({newest}); "
            "upgrade spectraformer"
        )
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedError(
                f"{file} has {size} bytes; expected {expected['bytes']}: it is truncated or another file"
            )
        if sha256_of(file, advance) != expected["sha256"]:
            raise DamagedError(f"{file} was changed after it was written: its sha256 does not match")
    return manifest


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Holds a run's directory for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on every system
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is working on {path}; wait for it or stop it") from None
        yield
