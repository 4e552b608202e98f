"""Locations of remote files: URLs, chains of URLs, and paths; what lies beside them, and the sources that they name."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Iterator
from typing import Any

from prefault.drivers.remote.archives import open_member
from prefault.drivers.remote.file_sources import FsspecSource, LocalSource
from prefault.drivers.remote.http_source import HttpSource, redacted_url
from prefault.drivers.remote.source import Patience, Source, Version, printable

_COPYING = ("simplecache", "filecache")
"""File systems of fsspec that keep copies of whole files, and do not check that they are current."""


@contextlib.contextmanager
def closed_on_failure(source: Source) -> Iterator[None]:
    """Close a source if the block inside of the ``with`` raises."""
    try:
        yield
    except BaseException:
        source.close()
        raise


def open_plain(
    url: str, headers: dict[str, str], options: dict[str, Any], patience: Patience, version: Version | None = None
) -> Source:
    """Open the source of a URL or path, without unpacking it."""
    protocol, _, rest = url.partition("://")
    if "::" in url and protocol == "zip":
        member, _, inner = rest.partition("::")
        within = options.get(inner.partition("://")[0], {}) if "::" not in inner else options
        archive = open_plain(inner, headers, within, patience)
        with closed_on_failure(archive):
            return open_member(archive, member, redacted_chain(url), version)
    if _is_whole(url):
        if protocol in ("http", "https"):
            if options:
                raise ValueError(
                    f"http and https are read without fsspec: storage_options ({', '.join(options)}) do not apply, but"
                    " headers= does"
                )
            return HttpSource(url, headers, patience, version)
        return LocalSource(_local_path(url), patience, version)
    chain = url.split("::")
    for part in chain:
        if part.partition("://")[0] in _COPYING:
            raise ValueError(
                f"{part.partition('://')[0]}:: returns copies of any version: leave it out, and give cache_dir="
            )
    if chain[-1].startswith("file://"):
        chain[-1] = f"file://{_local_path(chain[-1])}"  # fsspec does not decode it
    return FsspecSource("::".join(chain), options, redacted_chain(url), patience, version)


def redacted_chain(url: str) -> str:
    """Return a URL, or a chain of URLs, for messages: without its secrets."""
    if "://" not in url:
        return url
    if _is_whole(url):
        return redacted_url(url)
    first, separator, inner = url.partition("::")
    return (redacted_url(first) if "://" in first else first) + separator + redacted_chain(inner)


def _is_whole(url: str) -> bool:
    """Return whether ``::`` belongs to a name and does not chain URLs: in a path, and in file and http URLs."""
    protocol, separator, _ = url.partition("://")
    return not separator or protocol in ("file", "local", "http", "https")


def name_of(url: str) -> str:
    """Return the part of a URL or path that ends in the suffix of the file name."""
    first = url if _is_whole(url) else url.partition("::")[0]
    return urllib.parse.urlsplit(first).path if first.startswith(("http://", "https://")) else first


def sibling(url: str, name: str) -> str:
    """Return the URL or path of the file with this name in the same directory.

    A query stays, since it may be a signature for the directory. In an archive (``zip://a::https://...``) the file is a
    member of the same archive.
    """
    first, separator, inner = (url, "", "") if _is_whole(url) else url.partition("::")
    protocol = first.partition("://")[0] if "://" in first else ""
    if protocol in ("http", "https"):
        parts = urllib.parse.urlsplit(first)
        directory = parts.path.rpartition("/")[0]
        return urllib.parse.urlunsplit(parts._replace(path=f"{directory}/{urllib.parse.quote(name)}", fragment=""))
    if protocol == "file":
        name = urllib.parse.quote(name)
    directory, slash, _ = first.rpartition("/")
    return f"{directory}{slash}{name}{separator}{inner}"


def _local_path(url: str) -> str:
    """Return the path of a ``file://`` URL, percent-decoded (RFC 8089); a path, also behind ``local://``, is left alone."""
    protocol, separator, path = url.partition("://")
    if protocol != "file" or not separator:
        return path if separator else url
    path = path.removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"{printable(url)}: a file:// URL of this machine has three slashes: file:///path")
    return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(path)))
