"""Shards behind http(s), by the standard library."""

import contextlib
import http.client
import re
import socket
import string
import urllib.parse
import urllib.request
from collections.abc import Generator
from email.message import Message
from functools import partial
from typing import Any

from diptych.data.transfers import PIECE, Line, Opened

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Http:
    """A shard behind http(s). Goes on by a range request, where server and file are still what they were."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = urllib.parse.quote(url, safe=string.punctuation), timeout

    def __call__(self, line: Line) -> Generator[Opened | bytes]:
        """The file from where the line broke off, or from zero."""
        yield from self._read(line, line.have)

    def _read(self, line: Line, have: int) -> Generator[Opened | bytes]:
        with self._open(line, have) as response:
            opened = _opened(response, have, line.before)
            if opened is None and not have:
                raise OSError("the server sent a range that was not asked for")
            if opened is None:
                response.close()
                yield from self._read(line, 0)
                return
            yield opened
            at = opened.offset
            while data := response.read1(PIECE):
                yield data
                at += len(data)
        if opened.total is not None and at != opened.total:
            raise OSError(f"connection ended after {at} of {opened.total} bytes")

    def _open(self, line: Line, have: int) -> http.client.HTTPResponse:
        headers = _range(have, line.before) if have else {}
        request = urllib.request.Request(self._url, headers=headers)
        connections = _Noting(line)
        try:
            return urllib.request.build_opener(connections).open(request, timeout=self._timeout)
        except Exception as error:
            connections.close()
            if have and getattr(error, "code", 0) == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self._open(line, 0)
            raise


def _range(have: int, before: Opened) -> dict[str, str]:
    etag, modified = before.version
    headers = {"Range": f"bytes={have}-"}
    if etag and _STRONG_ETAG.fullmatch(etag):
        headers["If-Range"] = etag
    elif modified and modified.isascii() and modified.isprintable():
        headers["If-Range"] = modified
    return headers


def _opened(response: http.client.HTTPResponse, have: int, before: Opened) -> Opened | None:
    """What the response brings; None where it does not go on with what is there."""
    headers = response.headers
    version = (headers.get("ETag"), headers.get("Last-Modified"))
    if response.status != http.client.PARTIAL_CONTENT:
        return Opened(0, version, _length(headers))
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if not have or found is None or int(found[1]) != have:
        return None
    total = None if found[2] == "*" else int(found[2])
    if _differ((*version, total), (*before.version, before.total)):
        return None
    return Opened(have, before.version, total if before.total is None else before.total)


def _differ(ours: tuple[object, ...], theirs: tuple[object, ...]) -> bool:
    """Whether something that both know is not the same."""
    return any(a is not None and b is not None and a != b for a, b in zip(ours, theirs, strict=True))


def _length(headers: Message) -> int | None:
    text = headers.get("Content-Length")
    if text is None or headers.get("Transfer-Encoding") is not None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the server sent Content-Length {text!r}")
    return int(text)


class _Noting(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections whose sockets are shut down when the line is left: a time limit per read ends no trickle."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line
        self._response: http.client.HTTPResponse | None = None

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._note(_Plain, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._note(_Secure, req)

    def close(self) -> None:
        """Closes the last response, which a senseless redirection leaves open."""
        if self._response is not None:
            self._response.close()

    def _note(self, connection: Any, request: urllib.request.Request) -> http.client.HTTPResponse:
        response = self.do_open(connection, request, line=self._line)
        self._response = response
        return response


class _Plain(http.client.HTTPConnection):
    def __init__(self, host: str, *, timeout: float, line: Line) -> None:
        super().__init__(host, timeout=timeout)
        self._line = line

    def connect(self) -> None:
        super().connect()
        self._line.on_leave(partial(_shut, self.sock))


class _Secure(_Plain, http.client.HTTPSConnection):
    """The same, encrypted: `super()` leads from one to the other."""


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # past the encryption, which the other thread is using
