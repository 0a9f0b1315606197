"""Media by URL: one download over http or https, or the content of a data URL, within limits in seconds and bytes."""

import base64
import binascii
import functools
import http.client
import io
import math
import socket
import string
import time
import urllib.error
import urllib.parse
import urllib.request

import transformers

TIMEOUT = 60.0  # seconds
MAX_BYTES = 512 * 2**20
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 2**16  # bytes
SHOWN = 1000  # characters: a longer source is no path, and stays out of messages


def is_url(source: str) -> bool:
    """
    Whether `source` is an http, https or data URL; otherwise it is a path.

    Raises:
        ValueError: it is a URL of another scheme.
    """
    if is_data_url(source):
        return True
    scheme, separator, _ = source.partition("://")
    if not separator:
        return False
    if scheme.lower() not in ("http", "https"):
        raise ValueError(
            f"{shown(source)} is neither a path nor an http or https URL, and nothing else is opened; for a local file "
            "pass its path."
        )
    return True


def is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def shown(source: str) -> str:
    """What a message calls a path, a URL or base64: never the content of a data URL, and of a long text its length."""
    if is_data_url(source):
        return f"a data URL of {len(source)} characters"
    return repr(source) if len(source) <= SHOWN else f"a text of {len(source)} characters"


def download(url: str, timeout: float = TIMEOUT, max_bytes: int = MAX_BYTES) -> bytes:
    """
    What an http or https URL leads to, or what a data URL holds.

    At most `MAX_REDIRECTS` redirects are followed, to http and https alone and never from https back to http; the
    limits hold for all of them together. The proxies of the environment are used, as `urllib` does.

    Args:
        url: an http, https or data URL.
        timeout: seconds until the last byte has to be here. Looking up a name alone has its own limit, the system's.
        max_bytes: how many bytes it may have.

    Raises:
        OSError: it cannot be reached, or ends before its announced length.
        TimeoutError: it took longer than `timeout`.
        ValueError: it is larger than `max_bytes`, it redirects to another scheme, or a limit is not a positive number;
            a `binascii.Error` where a data URL is not in base64.
    """
    for name, limit in (("download_timeout", timeout), ("download_max_bytes", max_bytes)):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
            raise ValueError(f"{name} is {limit!r}, but must be a positive number.")
    if is_data_url(url):
        return _data_url_content(url, max_bytes)
    end = time.monotonic() + timeout
    try:
        return _read(url, end, max_bytes)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise TimeoutError(
                f"{url!r} was not downloaded within {timeout} seconds; download the file yourself, or raise "
                "download_timeout."
            ) from error
        raise OSError(f"{url!r} cannot be downloaded: {error}") from error


def _data_url_content(url: str, max_bytes: int) -> bytes:
    """As in RFC 2397, in base64 alone; the media type is not read, since the content tells it."""
    head, separator, text = url.partition(",")
    if not separator or not head.lower().endswith(";base64"):
        raise binascii.Error(f"{shown(url)} is not in base64; write data:video/mp4;base64, and then the content.")
    text = "".join(text.split())
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > max_bytes:
        raise ValueError(f"{shown(url)} has {size} bytes, but at most {max_bytes} are taken; raise download_max_bytes.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # also that a character is not ASCII
        raise binascii.Error(f"{shown(url)} is not in base64: {error}.") from error


def _read(url: str, end: float, max_bytes: int) -> bytes:
    opener, place = _opener(end), url
    for _ in range(MAX_REDIRECTS + 1):
        request = urllib.request.Request(
            _quoted(place), headers={"User-Agent": f"transformers/{transformers.__version__}"}
        )
        with opener.open(request, timeout=_seconds_left(end)) as response:
            if response.status in REDIRECTS and "Location" in response.headers:
                place = _redirected(url, place, response.headers["Location"])
                continue
            if not 200 <= response.status < 300:
                raise OSError(f"the server answered {response.status} {response.reason}")
            return _body(url, response, max_bytes)
    raise OSError(f"more than {MAX_REDIRECTS} redirects")


def _quoted(place: str) -> str:
    """A URL with its spaces, and what is not ASCII, as HTTP sends them."""
    try:
        urllib.parse.urlsplit(place)
    except ValueError as error:
        raise OSError(f"{place!r} is no URL: {error}") from error
    return urllib.parse.quote(place, safe=string.punctuation, errors="replace")


def _redirected(url: str, place: str, location: str) -> str:
    try:
        target = urllib.parse.urljoin(place, location)
    except ValueError as error:
        raise OSError(f"it redirects to {location!r}: {error}") from error
    allowed = ("https",) if place.lower().startswith("https:") else ("http", "https")
    if urllib.parse.urlsplit(target).scheme not in allowed:
        raise ValueError(f"{url!r} redirects to {target!r}, which is not followed: only {' and '.join(allowed)} is.")
    return target


def _body(url: str, response, max_bytes: int) -> bytes:
    announced, body = response.length, bytearray()
    while announced is None or announced <= max_bytes:
        chunk = response.read(CHUNK)
        if not chunk:
            if announced is not None and len(body) < announced:
                raise OSError(f"it ends after {len(body)} of {announced} bytes")
            return bytes(body)
        body += chunk
        if len(body) > max_bytes:
            break
    size = f"has {announced}" if announced is not None else "has more"
    raise ValueError(f"{url!r} {size} bytes, but at most {max_bytes} are downloaded; raise download_max_bytes.")


def _opener(end: float) -> urllib.request.OpenerDirector:
    """Opens http and https alone, and follows no redirect."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(_timed(http.client.HTTPConnection, end), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(_timed(http.client.HTTPSConnection, end), request)

    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), Http(), Https(), urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    return opener


def _seconds_left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _timed(connection_class, end: float):
    """
    A connection class that gives up at the time `end`.

    The `timeout=` of the standard library is for one step, such as a byte or an address, of which a server can make any
    number.
    """

    class Connection(connection_class):
        response_class = functools.partial(_TimedResponse, end=end)

        def connect(self):
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)  # tried one after the other
            self.timeout = _seconds_left(end) / len(addresses)
            super().connect()

    return Connection


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock, *args, end, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), sock, end))


class _TimedStream(io.RawIOBase):
    """What comes from a socket until the time `end`."""

    def __init__(self, stream, sock, end: float):
        self.stream, self.sock, self.end = stream, sock, end

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(_seconds_left(self.end))
        return self.stream.readinto(buffer)

    def close(self):
        self.stream.close()
        super().close()
