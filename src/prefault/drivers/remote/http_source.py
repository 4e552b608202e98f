"""A source behind HTTP: range requests straight into the frames, each answer checked against the mapped version.

fsspec's ``cat_file`` would hide the status and the headers of an answer: an answer of another version, or a server that
ignores ranges, would not be noticed. See RFC 9110, sections 13 (preconditions) and 14 (ranges).
"""

from __future__ import annotations

import email.utils
import errno
import functools
import http.client
import re
import ssl
import time
import urllib.parse
from typing import NamedTuple, NoReturn

from prefault._version import __version__
from prefault.drivers.remote.http_connections import (
    DeadlineResponse,
    HttpAnswer,
    Origin,
    acquire_pool,
    authorization,
    release_pool,
)
from prefault.drivers.remote.source import (
    CHUNK,
    TRANSIENT_STATUSES,
    Attempts,
    Patience,
    Source,
    SourceError,
    SourceMissingError,
    TransientError,
    Version,
)

_REDIRECTS = (301, 302, 303, 307, 308)
_FORBIDDEN = (401, 403, 407)
_MISSING = (404, 410)
_MOST_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
_WEAK = "W/"


class _ContentRange(NamedTuple):
    first: int | None
    last: int | None
    total: int | None


def _content_range(text: str | None) -> _ContentRange | None:
    match = _CONTENT_RANGE.fullmatch(text.strip()) if text else None
    if match is None:
        return None
    first, last, total = match.groups()
    return _ContentRange(
        None if first is None else int(first), None if last is None else int(last), None if total == "*" else int(total)
    )


def redacted_url(url: str) -> str:
    """Return a URL for messages: without user, password and query, which may be a signature."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "..." if parts.query else "", ""))


def _redacted_target(url: str) -> str:
    try:
        return redacted_url(url)[:200]
    except ValueError:  # not a URL; a query in it may be secret all the same
        return url.partition("?")[0][:200]


def _retry_after(text: str | None) -> float:
    """Return the seconds that a Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); 0 if it has neither."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _origin(parts: urllib.parse.SplitResult) -> Origin:
    return Origin(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def _is_trusted(origin: Origin, named: Origin) -> bool:
    """Return whether credentials may go to ``origin``: the named origin, or its host with encryption, a common redirect."""
    upgraded = Origin("https", named.host, 443) if (named.scheme, named.port) == ("http", 80) else named
    return origin in (named, upgraded)


class HttpSource(Source):
    """An http or https URL whose server answers range requests.

    Args:
        url: redirects are followed; after a target has expired (403, 404 ...), ``url`` is asked again.
        headers: headers that are sent with each request, but never to another host than that of ``url``.
        patience: limits of retries and time.
        version: the version to read; None: the current one.
    """

    def __init__(self, url: str, headers: dict[str, str], patience: Patience, version: Version | None = None) -> None:
        super().__init__(redacted_url(url), patience)
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"{self.name!r} names no host")
        self._url = url
        self._headers = authorization(parts, "Authorization") | headers
        for header, value in self._headers.items():
            # http.client would raise with the value, which may be secret: a token from a file ends in a newline.
            if set("\r\n") & set(f"{header}{value}"):
                raise ValueError(f"{self.name}: a line break in the header {header.strip()!r}")
        self._origin = _origin(parts)
        self._target = url  # of the last redirect
        self._connections = acquire_pool()
        self._closed = False
        try:
            attempts = Attempts(patience, self.name)
            self.version = version or attempts.retry(lambda: self._probe(attempts))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the connections back, which other sources of this process may use. Idempotent."""
        if not self._closed:
            self._closed = True
            release_pool(self._connections)

    # --- one request

    def _send(self, attempts: Attempts, extra: dict[str, str]) -> HttpAnswer:
        """Send a request, follow redirects, and return the answer, whose body is not read yet."""
        url = self._target
        remembered = url != self._url
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                answer = self._send_to(url, attempts, extra)
            except TransientError:
                self._target = self._url
                raise
            status = answer.response.status
            if status in _REDIRECTS:
                location = answer.response.headers.get("Location")
                answer.drop()
                if not location:
                    raise SourceError(errno.EIO, f"{self.name}: a redirect ({status}) without a target")
                url = self._redirected(url, location)
                continue
            if remembered and status in (*_FORBIDDEN, *_MISSING):
                # Targets are often signed, and expire: ask the URL for a fresh one, once.
                answer.drop()
                url, remembered = self._url, False
                continue
            self._target = url
            return answer
        raise SourceError(errno.ELOOP, f"{self.name}: more than {_MOST_REDIRECTS} redirects")

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urllib.parse.urljoin(url, location)
            parts = urllib.parse.urlsplit(target)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable, target = False, location
        if not usable:
            raise SourceError(
                errno.EIO, f"{self.name}: redirected to {_redacted_target(target)!r}, which is not an HTTP URL"
            )
        return target

    def _send_to(self, url: str, attempts: Attempts, extra: dict[str, str]) -> HttpAnswer:
        parts = urllib.parse.urlsplit(url)
        origin = _origin(parts)
        host = parts.netloc.rpartition("@")[2]
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        headers = {"User-Agent": f"prefault/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
        if _is_trusted(origin, self._origin):  # credentials are for this host alone, and never sent with less encryption
            headers |= self._headers
        headers |= extra
        proxy = self._connections.proxy(origin)
        if proxy is not None and origin.scheme == "http":
            path = f"http://{host}{path}"
            headers |= authorization(urllib.parse.urlsplit(proxy), "Proxy-Authorization")
        connection, used = self._connections.take(origin, attempts.timeout_s)
        connection.response_class = functools.partial(DeadlineResponse, lambda: attempts.timeout_s)  # type: ignore[assignment]
        try:
            connection.request("GET", path, headers=headers)
            return HttpAnswer(connection.getresponse(), connection, origin)
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            if isinstance(error, SourceError):
                raise
            if isinstance(error, ssl.SSLCertVerificationError):
                raise SourceError(errno.EACCES, f"{self.name}: {error}") from error
            # A server closes idle connections; the client notices at the next request.
            stale = used and isinstance(error, ConnectionError | http.client.RemoteDisconnected)
            raise TransientError(f"{type(error).__name__}: {error}", at_once=stale) from error
        except BaseException:
            connection.close()
            raise

    def _refuse(self, answer: HttpAnswer, what: str) -> NoReturn:
        """Raise the error of an answer whose status is neither 200 nor 206."""
        response = answer.response
        status, reason = response.status, f"HTTP {response.status} {response.reason}".strip()
        headers = response.headers
        answer.drop()
        if status in _MISSING:
            raise SourceMissingError(errno.ENOENT, f"{self.name}: {reason}: there is no such file, or no longer")
        if status in _FORBIDDEN:
            raise SourceError(errno.EACCES, f"{self.name}: {reason}: give headers=, or ask its owner")
        if status == 412:
            raise self.changed(f"{reason}: the server has another version")
        if status == 416:
            says = _content_range(headers.get("Content-Range"))
            if says is not None and says.total is not None and says.total != self.length:
                raise self.changed(f"it had {self.length} bytes and has {says.total} now")
            raise SourceError(errno.EIO, f"{self.name}: {reason}: the server does not return {what}")
        if status in TRANSIENT_STATUSES:
            raise TransientError(reason, after_s=_retry_after(headers.get("Retry-After")))
        raise SourceError(errno.EIO, f"{self.name}: {reason} to a request for {what}")

    def _version_of(self, response: http.client.HTTPResponse, length: int) -> Version:
        return Version(length, response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))

    # --- what is there

    def _probe(self, attempts: Attempts) -> Version:
        """Ask for the version."""
        # GET and not HEAD: signed URLs are often good for GET only, and the answer proves that ranges work.
        answer = self._send(attempts, {"Range": "bytes=0-0"})
        response = answer.response
        says = _content_range(response.headers.get("Content-Range"))
        total = None if says is None else says.total
        if response.status == 204 or (response.status in (206, 416) and total == 0):
            answer.drop()
            return self._version_of(response, 0)
        if response.status == 200:
            length = response.headers.get("Content-Length")
            if not self._has_body(answer, attempts):
                return self._version_of(response, 0)
            raise self._ignores_ranges(f"all {length} bytes" if length else "the whole file")
        if response.status == 416 or (response.status == 206 and total is None and response.length == 0):
            answer.drop()
            if total is None and self._is_empty(attempts):
                return self._version_of(response, 0)
            raise SourceError(
                errno.EIO, f"{self.name}: HTTP {response.status} {response.reason}: the server does not return byte 0 of"
                f" {'a file that is not empty' if total is None else f'{total} bytes'}: it answers range requests wrongly",
            )  # fmt: skip
        if response.status != 206:
            self._refuse(answer, "byte 0")
        self._check_encoding(answer)
        if says is None or says.total is None or (says.first, says.last) != (0, 0):
            answer.drop()
            raise SourceError(
                errno.EIO, f"{self.name}: the server does not tell the length (Content-Range:"
                f" {response.headers.get('Content-Range')!r})",
            )  # fmt: skip
        version = self._version_of(response, says.total)
        self._finish(answer)
        return version

    def _is_empty(self, attempts: Attempts) -> bool:
        """Request the whole file, and return whether it is empty: servers answer in many ways a request for its byte 0."""
        answer = self._send(attempts, {})
        if answer.response.status in (200, 204):
            return not self._has_body(answer, attempts)
        if answer.response.status in (206, 416):
            answer.drop()
            raise SourceError(
                errno.EIO,
                f"{self.name}: HTTP {answer.response.status} {answer.response.reason} also to a request for the whole file:"
                " it may be empty (0 bytes cannot be mapped), or the server is broken",
            )
        return self._refuse(answer, "the whole file")

    def _has_body(self, answer: HttpAnswer, attempts: Attempts) -> bool:
        """Return whether the body has at least one byte, and close the connection."""
        try:
            if answer.response.length is not None:
                return answer.response.length > 0
            return answer.read_into(memoryview(bytearray(1)), attempts.timeout_s) > 0
        except (http.client.HTTPException, OSError) as error:
            raise TransientError(f"{type(error).__name__}: {error} before the first byte") from error
        finally:
            answer.drop()

    def _ignores_ranges(self, what: str) -> SourceError:
        return SourceError(
            errno.EOPNOTSUPP,
            f"{self.name}: the server ignores range requests (it answered 200 with {what}): download the file, or use a"
            " server that supports them",
        )

    def _check_encoding(self, answer: HttpAnswer) -> None:
        encoding = answer.response.headers.get("Content-Encoding", "")
        if encoding.strip().lower() not in ("", "identity"):
            answer.drop()
            raise SourceError(
                errno.EIO,
                f"{self.name}: the server answers with Content-Encoding {encoding!r} though identity was requested",
            )

    def _finish(self, answer: HttpAnswer) -> bool:
        """Keep the connection after the body was read; return False if the body was longer than announced."""
        # Only a further read shows a byte too many; after Content-Length bytes http.client returns none.
        more = (
            bool(answer.response.read(CHUNK if answer.response.length else 1)) if not answer.response.isclosed() else False
        )
        if answer.response.will_close or not answer.response.isclosed():
            answer.drop()
        else:
            self._connections.give(answer.origin, answer.connection)
        return not more

    # --- bytes

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:
        last = offset + len(target) - 1
        condition = {"Range": f"bytes={offset}-{last}"}
        if self.version.tag and not self.version.tag.startswith(_WEAK):  # weak ones never match (RFC 9110, 13.1.1)
            condition["If-Match"] = self.version.tag
        elif self.version.modified:
            condition["If-Unmodified-Since"] = self.version.modified
        answer = self._send(attempts, condition)
        self._check(answer, offset, last)
        done = 0
        try:
            while done < len(target):
                with target[done:] as rest:
                    count = answer.read_into(rest, attempts.timeout_s)
                if not count:
                    raise TransientError(f"the answer ended after {done} of {len(target)} bytes", done=done)
                done += count
            if not self._finish(answer):
                raise SourceError(errno.EIO, f"{self.name}: the answer to a request for {len(target)} bytes was longer")
        except (http.client.HTTPException, OSError) as error:
            answer.drop()
            if isinstance(error, SourceError):
                raise
            raise TransientError(
                f"{type(error).__name__}: {error} after {done} of {len(target)} bytes", done=done
            ) from error
        except BaseException:
            answer.drop()
            raise

    def _check(self, answer: HttpAnswer, first: int, last: int) -> None:
        """Check that the answer is these bytes of the mapped version; raise before a byte is read if it is not."""
        response = answer.response
        if response.status not in (200, 206):
            self._refuse(answer, f"bytes {first} to {last}")
        self._check_encoding(answer)
        announced = response.headers.get("Content-Length")
        problem: SourceError | None = None
        total = self.length
        if response.status == 200:
            whole = (first, last) == (0, self.length - 1)
            if whole and announced is not None and announced.isdecimal():
                total = int(announced)
            elif not whole:
                problem = self._ignores_ranges(f"{announced} bytes" if announced else "the whole file")
        else:
            says = _content_range(response.headers.get("Content-Range"))
            if says is None:
                problem = SourceError(errno.EIO, f"{self.name}: a partial answer that does not tell its bytes")
            else:
                total = says.total if says.total is not None else total
                if total == self.length and (says.first, says.last) != (first, last):
                    problem = SourceError(
                        errno.EIO,
                        f"{self.name}: asked for bytes {first} to {last}, answered with {says.first} to {says.last}",
                    )
        difference = self._difference(self._version_of(response, total))
        if difference:
            problem = self.changed(difference)
        elif problem is None and announced is not None and announced != str(last - first + 1):
            problem = SourceError(errno.EIO, f"{self.name}: asked for {last - first + 1} bytes, answered with {announced}")
        if problem is not None:
            answer.drop()
            raise problem

    def _difference(self, now: Version) -> str:
        pinned = self.version
        if now.length == pinned.length and pinned.told_apart and not now.told_apart:
            return "the answer does not tell its version"
        # Some proxies leave one of the two out of partial answers; the other one must agree.
        return pinned.change(
            now._replace(tag=now.tag or (pinned.tag if now.modified else ""),
                         modified=now.modified or (pinned.modified if now.tag else ""))
        )  # fmt: skip
