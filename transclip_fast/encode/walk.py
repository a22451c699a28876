"""The image files below a folder, and in words what else is there and left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transclip_fast.data.names import listed
from transclip_fast.encode.pixels import suffixes
from transclip_fast.errors import InputError

ESCAPE = re.compile(rb"\\x([89a-f][0-9a-f])")  # of a byte that is not UTF-8
NO_SUFFIX = "no suffix"
HIDDEN = "hidden"  # in the place of a suffix
# Folders of previews and attributes that systems write beside images.
SYSTEM_FOLDERS = frozenset({"@eaDir", "__MACOSX"})
SHOWN = 8  # kinds of files that are left out, the most frequent; folders and links to them


def walk_images(root: Path, follow_links: bool) -> tuple[list[tuple[str, str]], str]:
    """
    Key and path of the image files below a folder, sorted, and what is left out.

    Hidden files and folders, whose names begin with a dot, and those of systems are left out. Links
    to folders are not followed, or with `follow_links` all but those to a folder above.
    """
    found, left_out = [], Counter[str]()
    links, hidden = list[str](), list[str]()
    skip = _leads_back if follow_links else os.path.islink
    for folder, subfolders, files in os.walk(root, onerror=_unreadable, followlinks=follow_links):
        paths = {name: os.path.join(folder, name) for name in subfolders}
        hidden += [path for name, path in paths.items() if _is_hidden_folder(name)]
        seen = {name: path for name, path in paths.items() if not _is_hidden_folder(name)}
        skipped = {name: path for name, path in seen.items() if skip(path)}
        subfolders[:] = [name for name in seen if name not in skipped]
        links += skipped.values()
        for name in files:
            file = Path(folder, name)
            if name.startswith("."):
                left_out[HIDDEN] += 1
            elif file.suffix.lower() in suffixes():
                found.append((utf8_name(file.relative_to(root).as_posix()), str(file)))
            else:
                left_out[file.suffix.lower() or NO_SUFFIX] += 1
    words = [left_out_words(left_out), _hidden_words(sorted(hidden))]
    words.append(_link_words(sorted(links), follow_links))
    return sorted(found), "; ".join(filter(None, words))


def left_out_words(counts: Counter[str]) -> str:
    """Text like "3 files left out, not images that can be read here: .heic 3"; "" if none."""
    number = counts.total()
    by_number = sorted((-n, suffix) for suffix, n in counts.items() if n)
    shown = _shown([f"{suffix} {-n:,}" for n, suffix in by_number])
    files, images = ("files", "images") if number > 1 else ("file", "an image")
    text = f"{number:,} {files} left out, not {images} that can be read here: {shown}"
    return text if number else ""


def _is_hidden_folder(name: str) -> bool:
    """Whether the name of a folder below the first is hidden, or that of a system's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _hidden_words(folders: Sequence[str]) -> str:
    """The hidden folders and those of systems; "" if none."""
    number = f"{len(folders):,} hidden or system {'folders' if len(folders) > 1 else 'folder'}"
    return f"{number} left out: {_shown(folders)}" if folders else ""


def _link_words(links: Sequence[str], follow_links: bool) -> str:
    """The links to folders that are not followed; "" if none."""
    if not links:
        return ""
    number = f"{len(links):,} {'links' if len(links) > 1 else 'link'}"
    if follow_links:
        return f"{number} to a folder above, not followed: {_shown(links)}"
    return f"{number} to folders, not followed without --follow-links: {_shown(links)}"


def _shown(names: Sequence[str]) -> str:
    """The first of some names, in one line."""
    return listed([name if name.isprintable() else ascii(name) for name in names], SHOWN)


def _leads_back(folder: str) -> bool:
    """Whether a folder is one of those above it, as a link can be; it would have no end."""
    with suppress(OSError):  # listing it fails next, and is reported
        parents = Path(os.path.abspath(folder)).parents
        return any(os.path.samefile(folder, above) for above in parents)
    return False


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")


def path_of(shown: str) -> str:
    """The path that `utf8_name` shows so: with the escapes as bytes, if there is such a file."""
    if ESCAPE.search(os.fsencode(shown)) and not os.path.lexists(shown):
        unescaped = ESCAPE.sub(lambda byte: bytes([int(byte[1], 16)]), os.fsencode(shown))
        if os.path.lexists(unescaped):
            return os.fsdecode(unescaped)
    return shown


def utf8_name(name: str) -> str:
    """A file name as UTF-8, with backslash escapes for other bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
