"""A model behind a URL as a black box.

The protocol, which a server of a few lines can speak:

* Request: ``POST URL``, ``Content-Type: application/x-npy``; the body is a NumPy ``.npy`` file of float32,
  (N, C, H, W), pixels in [0, 1].
* Answer: status 200 and scores (N, K), either a ``.npy`` file (recognised by its first bytes) or JSON: nested lists, or
  an object with them under ``scores``, ``logits`` or ``probabilities``.
* Status 408, 425, 429 and 5xx, time-outs and lost connections are tried again; any other status ends the work.
"""

from __future__ import annotations

import http.client
import io
import json
import math
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

_KEYS = ("scores", "logits", "probabilities")
_AGAIN = (408, 425, 429)
_LARGEST = 2**28
"""Bytes of an answer that are read at most."""
_LONGEST = 60.0
"""Seconds between two attempts at most."""


class _Lost(Exception):
    """An attempt that may be made again, and how long the server asked to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET without its images: it is told instead."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Never follow."""
        return


class HttpScores(BlackBox):
    """A server as a black box; see the module for what is sent and what is expected back.

    One object may be used by several threads. A request that was sent again counts its images once for the budget;
    how often that happened stands in ``retried``.

    Args:
        url: ``http://…`` or ``https://…``.
        timeout: seconds without a byte after which an attempt is given up.
        retries: attempts after the first one, for each request.
        pause: seconds before the first of them; doubled before each next, up to a minute. A longer ``Retry-After`` of
            the server is kept to, up to a minute too.
        headers: sent with every request, such as an ``Authorization``.
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
        if not (timeout > 0 and retries >= 0 and pause >= 0):
            raise UserError(f"timeout = {timeout}, retries = {retries}, pause = {pause}: expected none below 0")
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
            return self._answer(self._insist(body.getvalue()))
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began

    def _insist(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            try:
                return self._attempt(body)
            except _Lost as lost:
                if attempt == self.retries:
                    raise UserError(
                        f"{self.title} gave no answer in {attempt + 1} attempts (the last: {lost}): see to the server, "
                        "or allow more retries or a longer timeout"
                    ) from None
                time.sleep(min(_LONGEST, max(self.pause * 2**attempt, lost.wait)))
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers=self.headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content: bytes = response.read(_LARGEST + 1)
                status = response.status
        except urllib.error.HTTPError as error:
            with error:
                told = _words(error)
            if error.code >= 500 or error.code in _AGAIN:
                raise _Lost(f"status {error.code}{told}", _wait(error.headers)) from None
            raise UserError(
                f"{self.title} refused the images with status {error.code}{told}: see what it expects; "
                "POST of a .npy file, float32 (N, C, H, W), was sent"
            ) from None
        except TimeoutError:
            raise _Lost(f"no answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Lost(f"no answer within {self.timeout:g} s") from None
            raise _Lost(str(error.reason)) from None
        except (http.client.HTTPException, OSError) as error:
            raise _Lost(f"{type(error).__name__}: {error}") from None
        if status != 200 or len(content) > _LARGEST:
            raise UserError(f"{self.title} answered status {status} and {len(content)} bytes: expected 200 and scores")
        return content

    def _answer(self, content: bytes) -> Any:
        expected = "expected scores (N, K) as a .npy file, as nested lists in JSON, or under `scores` in JSON"
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
