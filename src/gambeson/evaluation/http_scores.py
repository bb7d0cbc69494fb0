"""A model behind a URL as a black box.

The protocol, which a server of a few lines can speak:

* Request: ``POST URL``, ``Content-Type: application/x-npy``; the body is a NumPy ``.npy`` file of float32,
  (N, C, H, W), pixels in [0, 1].
* Answer: status 200 and scores (N, K), either a ``.npy`` file (recognised by its first bytes) or JSON: nested lists, or
  an object with them under ``scores``, ``logits`` or ``probabilities``; or, where only the top class is told, integers
  (N,), in an object under ``classes``.
* Status 408, 425, 429 and 5xx, time-outs and lost connections are tried again; any other status ends the work.
"""

from __future__ import annotations

import http.client
import io
import json
import math
import socket
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
import torch

from gambeson.base import UserError
from gambeson.evaluation.black_box import BlackBox

_KEYS = ("scores", "logits", "probabilities", "classes")
_TURNED_AWAY = (408, 425, 429, 503)
"""Tried again without being counted: the server says that it has not looked at the images."""
_LARGEST = 2**28
"""Bytes of an answer that are read at most."""
_LONGEST = 60.0
"""Seconds between two attempts at most."""


class _Lost(Exception):
    """An attempt that may be made again, how long the server asked to wait, and whether it may have been answered."""

    def __init__(self, reason: str, wait: float = 0.0, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.answered = wait, answered


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET without its images: it is told instead."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Never follow."""
        return


class HttpScores(BlackBox):
    """A server as a black box; see the module for what is sent and what is expected back.

    One object may be used by several threads. Each attempt that the server may have answered counts its images for the
    budget: a time-out, a connection that was lost, a status 5xx other than 503. What surely was not answered counts
    nothing: no connection, status 408, 425, 429, 503, or a refusal.

    Args:
        url: ``http://…`` or ``https://…``.
        timeout: seconds after which an attempt is given up: for a connection, for the first byte, and for the whole
            answer from then on.
        retries: attempts after the first one, for each request.
        pause: seconds before the first of them; doubled before each next, up to a minute. A longer ``Retry-After`` of
            the server is kept to, up to a minute too.
        headers: sent with every request, such as an ``Authorization``.
        workers: requests at once.
        keywords: see :class:`BlackBox`; ``batch`` is 64 unless given.

    Attributes:
        requests: attempts made, lost ones included.
        retried: attempts that were made again.
        seconds: time spent in requests and pauses, over all threads.

    Raises:
        UserError: not such a URL. From ``forward``: the server refused (status 3xx or 4xx), answered something else,
            or did not answer after all retries, with their number.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        pause: float = 0.5,
        headers: dict[str, str] | None = None,
        workers: int = 4,
        **keywords: Any,
    ) -> None:
        super().__init__(**{"batch": 64} | keywords)
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{url!r} is no address of a server: write http://HOST:PORT/PATH")
        if not (timeout > 0 and retries >= 0 and pause >= 0 and workers >= 1):
            raise UserError(
                f"timeout = {timeout}, retries = {retries}, pause = {pause}, workers = {workers}: expected none below "
                "0, and one worker at least"
            )
        self.workers = workers
        self.url, self.timeout, self.retries, self.pause = url, timeout, retries, pause
        self.headers = {"Content-Type": "application/x-npy", "Accept": "application/json, application/x-npy"}
        self.headers |= headers or {}
        self.requests = 0
        self.retried = 0
        self.seconds = 0.0
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")  # a proxy cannot reach this machine's own servers
        proxies = [urllib.request.ProxyHandler({})] if here else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def title(self) -> str:
        """What messages call the box: the URL without user name, password and query."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{(parts.netloc or '').rpartition('@')[2]}{parts.path}"

    def _ask(self, images: torch.Tensor) -> Any:
        body = io.BytesIO()
        np.lib.format.write_array(body, images.contiguous().numpy(), allow_pickle=False)
        began = time.monotonic()
        try:
            return self._answer(self._insist(body.getvalue(), len(images)))
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began

    def _insist(self, body: bytes, count: int) -> bytes:
        for attempt in range(self.retries + 1):
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            try:
                return self._attempt(body)
            except UserError:
                self._release(count)  # refused
                raise
            except _Lost as lost:
                if attempt == self.retries:
                    if not lost.answered:
                        self._release(count)
                    raise UserError(
                        f"{self.title} gave no answer in {attempt + 1} attempts (the last: {lost}): see to the server, "
                        "or allow more retries or a longer timeout"
                    ) from None
                if lost.answered:
                    self._claim(count)
                time.sleep(min(_LONGEST, max(self.pause * 2**attempt, lost.wait)))
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers=self.headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content, status = self._received(response), response.status
        except urllib.error.HTTPError as error:
            with error:
                told = _words(error)
            if error.code >= 500 or error.code in _TURNED_AWAY:
                answered = error.code not in _TURNED_AWAY
                raise _Lost(f"status {error.code}{told}", _wait(error.headers), answered=answered) from None
            raise UserError(
                f"{self.title} refused the images with status {error.code}{told}: see what it expects; "
                "POST of a .npy file, float32 (N, C, H, W), was sent"
            ) from None
        except TimeoutError:
            raise _Lost(f"no answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Lost(f"no answer within {self.timeout:g} s") from None
            never = isinstance(error.reason, ConnectionRefusedError | socket.gaierror)
            raise _Lost(str(error.reason), answered=not never) from None
        except (http.client.HTTPException, OSError) as error:
            raise _Lost(f"{type(error).__name__}: {error}") from None
        if status != 200 or len(content) > _LARGEST:
            raise UserError(f"{self.title} answered status {status} and {len(content)} bytes: expected 200 and scores")
        return content

    def _received(self, response: http.client.HTTPResponse) -> bytes:
        """Read an answer, which may not trickle in for longer than the time-out."""
        latest, content = time.monotonic() + self.timeout, bytearray()
        while len(content) <= _LARGEST and (piece := response.read1(2**16)):
            content += piece
            if time.monotonic() > latest:
                raise TimeoutError
        if response.length and len(content) <= _LARGEST:
            raise http.client.IncompleteRead(bytes(content[:0]), response.length)
        return bytes(content)

    def _answer(self, content: bytes) -> Any:
        expected = (
            "expected scores (N, K) as a .npy file, nested lists in JSON, or under `scores` in JSON; or `classes` (N,)"
        )
        try:
            if content.startswith(b"\x93NUMPY"):
                return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            found = json.loads(content)
        except (ValueError, UnicodeDecodeError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.title} answered what is neither JSON nor .npy ({reason}): {expected}") from None
        if isinstance(found, dict):
            key = next((key for key in _KEYS if key in found), None)
            if key is None:
                raise UserError(f"{self.title} answered JSON with the keys {', '.join(found) or 'none'}: {expected}")
            found = found[key]
        return found


def _words(error: urllib.error.HTTPError) -> str:
    try:
        text = " ".join(error.read(200).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        text = ""
    return f", {text!r}" if text else ""


def _wait(headers: Message) -> float:
    try:
        seconds = float(headers.get("Retry-After", "0"))
    except (TypeError, ValueError):  # a date is allowed too; the usual pause does then
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
