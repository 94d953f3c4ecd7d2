"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from uuid import uuid4


@contextmanager
def whole_file(path: str | Path, like: Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place at the end: readers see the old file or the new.

    After an error it is removed; a killed process leaves it behind under a hidden name. Who may read it is up
    to the umask, or as with the file `like`, whatever the library that writes it (safetensors) makes of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = S_IMODE((like or temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
