"""Folders that are either whole or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """
    Gives a temporary folder beside `target`, and renames it to `target` when the block ends without an error.

    A run that dies leaves nothing at `target` that looks finished.

    Raises:
        FileExistsError: when `target` exists, is not an empty folder, and `overwrite` is false.
    """
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; name another folder, or allow overwriting.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
    replaced = temporary.with_suffix(".replaced")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
