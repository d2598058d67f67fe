"""One reader a format for every file that the program reads. Whatever is wrong with a file is one
line that names it and what mends it; nothing here can run code.

`mend` ends the message: "make it again with run_prepare.sh".
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

NPY_MAGIC = b"\x93NUMPY"
LARGEST = 1e300  # in size, of a number that is computed with
NAME_BYTES = 255  # of a file's name, on every common disk


def safe_join(root: Path, name: Any, what: str, links: bool = False) -> Path:
    """root/name for a name that comes from outside: a listing, an archive, metadata, a record.

    what: whose name it is, for the message. links: whether those in `root` are the user's own, who
    may have put the files elsewhere (a hub's cache does). UserError for a name that is no text, is
    empty, or leads out of `root`, other links followed.
    """
    mend = (
        "give a name below that folder in the file it comes from, or get that from a trusted source"
    )
    shown = told(name)
    if not isinstance(name, str) or not name.strip() or "\0" in name or _too_long(name):
        raise UserError(f"{what} {shown} is no path below {root}; {mend}")
    parts = Path(name).parts
    if links and parts and ".." not in parts and not Path(name).is_absolute():
        return Path(root) / name
    try:
        base, path = Path(root).resolve(), (Path(root) / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        raise UserError(f"{what} {shown} cannot be followed ({error}); {mend}") from None
    if path == base or not path.is_relative_to(base):
        raise UserError(f"{what} {shown} lies outside {root}; {mend}")
    return Path(root) / name


def told(name: object, most: int = 120) -> str:
    """What a file names, for a message: quoted, and of fewer than `most` characters."""
    return repr(name) if len(repr(name)) < most else repr(name)[: most - 4] + "..."


def _too_long(name: str) -> bool:
    return any(len(part.encode(errors="replace")) > NAME_BYTES for part in name.split("/"))


@contextlib.contextmanager
def file_errors(path: Path, mend: str) -> Iterator[None]:
    """An OSError while a file is read becomes a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder where a file should be; {mend}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {mend}") from None


def checked_file(path: Path, mend: str) -> int:
    """Bytes of a regular file. UserError for one that is missing, empty, or no file."""
    with file_errors(path, mend):
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError
    return _regular(found, path, mend)


def _regular(found: os.stat_result, path: Path, mend: str) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file; {mend}")
    if not found.st_size:
        raise UserError(f"{path} is empty; {mend}")
    return found.st_size


def open_unlinked(real: Path, path: Path, mend: str) -> BinaryIO:
    """The file `path`, open to read, if it is still what it was when `real` was its real path.

    No link on the way to `real` is followed: one there was put there since. UserError for that,
    and as `checked_file`.
    """
    with file_errors(path, mend):
        try:
            file = open(_fd_without_links(real), "rb")
        except ValueError as error:  # a name that no disk takes
            raise UserError(f"{path} cannot be opened ({error}); {mend}") from None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise UserError(f"{path} has become a link since it was listed; {mend}") from None
    try:
        _regular(os.fstat(file.fileno()), path, mend)
    except UserError:
        file.close()
        raise
    return file


def _fd_without_links(real: Path) -> int:
    """Folder by folder from the root, so that none can be exchanged for a link on the way."""
    look = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    folder = os.open(real.anchor, look)
    try:
        for part in real.parts[1:-1]:
            inner = os.open(part, look, dir_fd=folder)
            os.close(folder)
            folder = inner
        # a pipe would wait for a writer
        return os.open(real.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def read_text(path: Path, mend: str) -> str:
    """UTF-8 text, or UTF-16 with a byte order mark, which is left out. UserError as `checked_file`,
    and for what is none, with its line.
    """
    checked_file(path, mend)
    with file_errors(path, mend):
        content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(content) > 2
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start}, line {line}"
        raise UserError(f"{path} is not UTF-8 text ({where}); {mend}") from None
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise UserError(f"{path} is not text (it holds a zero byte in line {line}); {mend}")
    return text


def parse_json(
    text: str | bytes, what: object, mend: str, kind: type = object, gaps: bool = False
) -> Any:
    """A JSON value of type `kind`; refused are NaN and Infinity, which JSON does not know, and a
    key that is there twice with two values.

    gaps: read them as null, as tables are written where a cell is empty.
    """

    def number(text: str) -> float | None:
        if not math.isfinite(value := float(text)):
            if gaps:
                return None
            raise ValueError(f"{text} is no number, or too large a one")
        return value

    try:
        value = json.loads(
            text, parse_constant=number, parse_float=number, object_pairs_hook=_unambiguous
        )
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{what} is not JSON ({reason}); {mend}") from None
    if not isinstance(value, kind):
        wanted = {"dict": "an object", "list": "a list"}.get(kind.__name__, kind.__name__)
        raise UserError(f"{what} is not {wanted} but {type(value).__name__}; {mend}")
    return value


def misfit(value: Any, like: Any, place: str = "") -> str:
    """Where a JSON value is not like a pattern of types, {"name": str, "numbers": [float]}; ""
    where it is. A float may be whole; keys that the pattern lacks may be anything.
    """
    if isinstance(like, dict) and isinstance(value, dict):
        pairs = [(f"{place}.{key}".lstrip("."), value.get(key), of) for key, of in like.items()]
    elif isinstance(like, list) and isinstance(value, list):
        pairs = [(f"{place}[{i}]", item, like[0]) for i, item in enumerate(value)]
    elif like in (int, float):
        number = isinstance(value, like | int) and not isinstance(value, bool)
        return "" if number and abs(value) < LARGEST else place
    else:
        return "" if isinstance(like, type) and isinstance(value, like) else place
    return next(filter(None, (misfit(item, of, where) for where, item, of in pairs)), "")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{key[:40]!r} is there twice")
    return found


def read_json(path: Path, mend: str, kind: type = dict) -> Any:
    """The JSON value of a file. UserError as `read_text` and `parse_json`."""
    return parse_json(read_text(path, mend), path, mend, kind)


def read_npy(path: Path, mend: str, dims: int | None = None, mmap: bool = False) -> np.ndarray:
    """An .npy of numbers, in the machine's byte order unless memory-mapped.

    dims: of the array, if they are known. UserError for a header that is none, promises more than
    the file holds, or is of another kind.
    """
    import numpy as np  # here: a start that reads no array needs none

    size = checked_file(path, mend)
    with file_errors(path, mend), open(path, "rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise UserError(f"{path} is not an .npy file; {mend}")
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            reader = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
            shape, _, dtype = getattr(np.lib.format, reader)(file)
        except Exception as error:  # noqa: BLE001 - whatever the header's text makes numpy raise
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} has a damaged header ({reason}); {mend}") from None
        wanted = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or dtype.kind not in "fiub":
        raise UserError(f"{path} holds {dtype}, not numbers; {mend}")
    if size != wanted or min(shape, default=1) < 0:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, not {wanted}; {mend}")
    if dims is not None and len(shape) != dims:
        raise UserError(f"{path} has {len(shape)} dimensions, not {dims}; {mend}")
    with file_errors(path, mend):
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    return array if mmap else array.astype(array.dtype.newbyteorder("="), copy=False)


def read_safetensors(path: Path, mend: str) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file. UserError for one that is none or holds a value that is not
    finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    checked_file(path, mend)
    with file_errors(path, mend):
        try:
            tensors = load_file(path)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is not a safetensors file ({reason}); {mend}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds a NaN or infinite value; {mend}")
    return tensors


def refuse_misfits(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: object, mend: str
) -> None:
    """UserError that names the first tensor which is missing in `what`, is one too many, or has
    another dtype or shape than the one of that name in `wanted`.
    """
    for name in (*wanted, *tensors):
        if name not in tensors:
            raise UserError(f"{what} lacks {told(name)}; {mend}")
        if name not in wanted:
            raise UserError(f"{what} holds {told(name)}, which is no part of it; {mend}")
        found, right = (f"{t.dtype} {list(t.shape)}" for t in (tensors[name], wanted[name]))
        if found != right:
            raise UserError(f"{what}: {told(name)} is {found}, not {right}; {mend}")


def read_numbers(
    found: Any, key: str, shape: tuple[int | None, ...], what: object, mend: str
) -> np.ndarray:
    """The numbers of a JSON object under `key`, of that shape (None: any length above 0). UserError
    for anything else, which names `what` they were read from.
    """
    import numpy as np

    value = found.get(key) if isinstance(found, dict) else None
    with contextlib.suppress(ValueError):  # lists of unequal length
        array = np.array(value)
        sizes = zip(array.shape, shape, strict=False)
        if (
            array.dtype.kind in "iuf"
            and array.ndim == len(shape)
            and all(n == wanted or (wanted is None and n) for n, wanted in sizes)
        ):
            return array
    size = " x ".join("n" if n is None else str(n) for n in shape)
    raise UserError(f"{what}: {told(key)} is not {size} numbers; {mend}")
