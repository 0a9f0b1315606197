"""Media by URL: http and https alone, within a time and a size, however the server behaves."""

import http.server
import io
import socket
import threading
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from rediprune.inputs_download import _redirected, download
from tiny import grey_video, random_image, tiny_processor, write_video

FOREVER = threading.Event()  # never set


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what the test has put under the path: bytes, or a function that writes the answer."""

    def do_GET(self):
        self.server.seen.append(self.path)
        answer = self.server.answers[self.path]
        try:
            if callable(answer):
                return answer(self)
            self.start(200, {"Content-Length": len(answer)})
            self.wfile.write(answer)
        except OSError:  # the client went away
            pass

    def start(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.block_on_close = True, False
    running.answers, running.seen = {}, []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=[0.01], daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "grey.mp4", grey_video(12))


def redirect(place):
    return lambda handler: handler.start(302, {"Location": place, "Content-Length": 0})


def stalls(handler):
    FOREVER.wait(20)


def drips_headers(handler):
    while not FOREVER.wait(0.05):
        handler.wfile.write(b"X")


def drips_a_body(handler):
    handler.start(200, {"Content-Length": 10**6})
    while not FOREVER.wait(0.05):
        handler.wfile.write(b"X")


def endless(handler):
    handler.start(200, {})
    while True:
        handler.wfile.write(bytes(2**16))


def continues(handler):
    while not FOREVER.wait(0.05):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_a_video_by_url_is_the_video_of_the_file(processor, server, mp4):
    server.answers["/grey.mp4"] = mp4.read_bytes()
    server.answers["/moved"] = redirect("/grey.mp4")
    expected = processor(text="<video>", videos=mp4)["pixel_values_videos"]
    for name in ("grey.mp4", "moved"):
        url = f"{server.url}/{name}"
        assert torch.equal(processor(text="<video>", videos=url)["pixel_values_videos"], expected)
        chat = [{"role": "user", "content": [{"type": "video", "url": url}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], expected)


def test_an_image_by_url_is_the_image_of_the_file(processor, server, tmp_path):
    path = tmp_path / "image.png"
    random_image().save(path)
    server.answers["/image.png"] = path.read_bytes()
    expected = processor(text="<image>", images=str(path))["pixel_values"]
    assert torch.equal(processor(text="<image>", images=f"{server.url}/image.png")["pixel_values"], expected)
    frames = [[[f"{server.url}/image.png"] * 2]]
    assert processor(text="<video>", videos=frames)["pixel_values_videos"].shape[1] == 2


def test_names_with_spaces_and_other_alphabets(server):
    server.answers["/two%20words%C3%A9.mp4?a=%20b"] = b"content"
    assert download(f"{server.url}/two wordsé.mp4?a=%20b", 5, 100) == b"content"


def test_a_body_in_chunks(server):
    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.start(200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    server.answers["/chunked"] = chunked
    assert download(f"{server.url}/chunked", 5, 100) == b"abcde"
    with pytest.raises(ValueError, match="has more bytes, but at most 4 are downloaded; raise download_max_bytes"):
        download(f"{server.url}/chunked", 5, 4)


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [stalls, drips_headers, drips_a_body, continues], ids=lambda answer: answer.__name__)
def test_a_server_that_does_not_come_to_an_end(processor, server, answer):
    server.answers["/x"] = answer
    message = f"'{server.url}/x' was not downloaded within 0.3 seconds; .* raise download_timeout"
    with pytest.raises(TimeoutError, match=message):
        processor(text="<video>", videos=f"{server.url}/x", download_timeout=0.3)
    with pytest.raises(TimeoutError, match=message):
        processor(text="<image>", images=f"{server.url}/x", download_timeout=0.3)


def test_the_time_is_that_of_all_redirects_together(server):
    for number in range(4):

        def late(handler, place=f"/{number + 1}"):
            FOREVER.wait(0.3)
            redirect(place)(handler)

        server.answers[f"/{number}"] = late
    server.answers["/4"] = b"content"
    with pytest.raises(TimeoutError):
        download(f"{server.url}/0", 0.7, 100)
    assert "/4" not in server.seen


def test_addresses_that_do_not_answer_share_the_time(monkeypatch):
    """The standard library would wait the whole time for each, and a name can have any number."""
    given = []

    def connect(connection):
        given.append(connection.timeout)
        raise TimeoutError

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [None] * 10)
    monkeypatch.setattr("http.client.HTTPConnection.connect", connect)
    with pytest.raises(TimeoutError, match="was not downloaded within 20 seconds"):
        download("http://many.invalid/", 20, 100)
    assert len(given) == 1 and 0 < given[0] <= 2


def test_a_file_that_is_too_large(processor, server, mp4):
    size = mp4.stat().st_size
    server.answers["/grey.mp4"] = mp4.read_bytes()
    server.answers["/endless"] = endless
    with pytest.raises(
        ValueError, match=f"has {size} bytes, but at most {size - 1} are downloaded; raise download_max_bytes"
    ):
        processor(text="<video>", videos=f"{server.url}/grey.mp4", download_max_bytes=size - 1)
    for key in ("images", "videos"):
        with pytest.raises(ValueError, match="has more bytes, but at most 100000 are downloaded"):
            processor(text=f"<{key[:-1]}>", **{key: f"{server.url}/endless"}, download_max_bytes=100_000)
    assert processor(text="<video>", videos=f"{server.url}/grey.mp4", download_max_bytes=size)


def test_a_length_that_is_not_true(server):
    def shorter(handler):
        handler.start(200, {"Content-Length": 10})
        handler.wfile.write(b"abc")

    def longer(handler):
        handler.start(200, {"Content-Length": 3})
        handler.wfile.write(b"abcdef")

    server.answers |= {"/shorter": shorter, "/longer": longer}
    with pytest.raises(OSError, match="cannot be downloaded: it ends after 3 of 10 bytes"):
        download(f"{server.url}/shorter", 5, 100)
    assert download(f"{server.url}/longer", 5, 100) == b"abc"


def test_limits_are_attributes_and_arguments(server, tmp_path):
    processor = tiny_processor()
    server.answers["/x"] = bytes(50)
    processor.download_max_bytes = 49
    with pytest.raises(ValueError, match="at most 49 are downloaded"):
        processor(text="<video>", videos=f"{server.url}/x")
    with pytest.raises(ValueError, match="cannot be decoded as a video|has no frames"):
        processor(text="<video>", videos=f"{server.url}/x", download_max_bytes=50)
    processor.download_timeout = 0.2
    server.answers["/x"] = stalls
    with pytest.raises(TimeoutError, match="within 0.2 seconds"):
        processor(text="<video>", videos=f"{server.url}/x")
    processor.save_pretrained(tmp_path)  # a repository does not set limits of those who load it
    assert not any("download_" in path.read_text() for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True])
@pytest.mark.parametrize("limit", ["download_timeout", "download_max_bytes"])
def test_limits_that_are_none(processor, limit, value):
    with pytest.raises(ValueError, match=f"{limit} is {value!r}, but must be a positive number"):
        processor(text="<video>", videos="http://127.0.0.1:9/x.mp4", **{limit: value})


def test_nothing_is_downloaded_for_a_prompt_that_is_refused(processor, server):
    with pytest.raises(ValueError, match="2 <video> placeholders, but 1 videos"):
        processor(text="<video> <video>", videos=f"{server.url}/x")
    assert server.seen == []


# -- where it leads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "rtmp://127.0.0.1/x", "data:,x"]
)
def test_redirects_to_other_schemes_are_refused(processor, server, place):
    server.answers["/x"] = redirect(place)
    with pytest.raises(
        ValueError, match=f"'{server.url}/x' redirects to '{place}', which is not followed: only http and https is"
    ):
        processor(text="<video>", videos=f"{server.url}/x")


def test_a_redirect_away_from_https_is_refused():
    assert _redirected("https://a/x", "https://a/x", "https://b/y") == "https://b/y"
    assert _redirected("http://a/x", "http://a/x", "https://b/y") == "https://b/y"
    with pytest.raises(ValueError, match="redirects to 'http://b/y', which is not followed: only https is"):
        _redirected("https://a/x", "https://a/x", "http://b/y")


def test_redirects_in_a_circle_and_without_end(server):
    def large_redirect(handler):
        handler.start(302, {"Location": "/x"})
        while True:
            handler.wfile.write(bytes(2**16))

    for answer in (redirect("/x"), large_redirect):
        server.answers["/x"] = answer
        server.seen.clear()
        with pytest.raises(OSError, match=f"'{server.url}/x' cannot be downloaded: more than 5 redirects"):
            download(f"{server.url}/x", 10, 100)
        assert len(server.seen) == 6


def test_what_cannot_be_reached(processor, server):
    server.answers["/gone"] = lambda handler: handler.start(404, {"Content-Length": 0})
    server.answers["/nowhere"] = redirect("http://[")
    server.answers["/mute"] = lambda handler: None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    places = [
        "/gone",
        "/nowhere",
        "/mute",
        f"http://127.0.0.1:{closed}/x",
        "http://",
        "http://[::1",
        "http://" + "a" * 70 + ".de",
    ]
    for place in places:
        url = place if place.startswith("http") else server.url + place
        with pytest.raises(OSError, match="cannot be downloaded: ") as caught:
            processor(text="<video>", videos=url)
        assert repr(url) in str(caught.value)


def test_a_page_is_no_medium(processor, server):
    server.answers["/page"] = b"<html>not here</html>"
    with pytest.raises(ValueError, match=f"'{server.url}/page' cannot be decoded as a video"):
        processor(text="<video>", videos=f"{server.url}/page")
    with pytest.raises(ValueError, match=f"image 0 is '{server.url}/page', but must be the path of an image"):
        processor(text="<image>", images=f"{server.url}/page")


@contextmanager
def port_that_nobody_may_call():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize(
    "scheme", ["rtmp", "rtsp", "tcp", "udp", "ftp", "gopher", "mmsh", "concat:http", "cache:http", "HTTP+X"]
)
def test_other_schemes_are_refused_before_anything_is_opened(processor, scheme):
    with port_that_nobody_may_call() as port:
        url = f"{scheme}://127.0.0.1:{port}/x.mp4"
        for key in ("images", "videos"):
            with pytest.raises(
                ValueError, match="is neither a path nor an http or https URL.*for a local file pass its path"
            ) as caught:
                processor(text=f"<{key[:-1]}>", **{key: url})
            assert url in str(caught.value)


def test_a_file_by_url_is_refused(processor, mp4):
    with pytest.raises(ValueError, match=f"'file://{mp4}' is neither a path nor .* for a local file pass its path"):
        processor(text="<video>", videos=f"file://{mp4}")


@pytest.mark.parametrize(
    "form", ["concat:{0}", "concat:{0}|{0}", "pipe:0", "fd:0", "subfile,,start,0,end,0,,:{0}", "file:{0}"]
)
def test_what_ffmpeg_would_open_is_only_a_path(processor, mp4, form):
    with pytest.raises(FileNotFoundError, match="no video file at"):
        processor(text="<video>", videos=form.format(mp4))


ENDINGS = {"live": "m3u8", "ended": "m3u8", "concat": "ffconcat", "sdp": "sdp"}


def playlists(place):
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:30\n#EXTINF:1,\n{place}\n"
    return {
        "live": hls,
        "ended": hls + "#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {place}\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("kind", ["live", "ended", "concat", "sdp"])
@pytest.mark.parametrize(
    "place", ["stream.ts", "{folder}/stream.ts", "file://{folder}/stream.ts", "{url}/stream.ts", "concat:stream.ts"]
)
def test_a_playlist_leads_nowhere(processor, server, tmp_path, monkeypatch, kind, place):
    """Neither to a file beside it, nor to another host; as a file, as bytes and as a download."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "stream.ts", grey_video(4))
    assert processor(text="<video>", videos="stream.ts")
    content = playlists(place.format(folder=tmp_path, url=server.url))[kind].encode()
    server.answers |= {"/list": content, "/stream.ts": (tmp_path / "stream.ts").read_bytes()}
    path = tmp_path / f"list.{ENDINGS[kind]}"
    path.write_bytes(content)
    for video in (path, content, io.BytesIO(content), f"{server.url}/list"):
        with pytest.raises(ValueError, match="cannot be decoded as a video"):
            processor(text="<video>", videos=video)
    assert server.seen == ["/list"]


@pytest.mark.parametrize("kind", ["live", "ended", "concat", "sdp"])
def test_the_message_for_a_playlist(processor, tmp_path, kind):
    path = tmp_path / f"list.{ENDINGS[kind]}"
    path.write_text(playlists("stream.ts")[kind])
    with pytest.raises(ValueError, match="A playlist or a list of other files is not followed; pass the video itself"):
        processor(text="<video>", videos=path)


@pytest.mark.parametrize("kind", ["ended", "concat"])
def test_a_format_that_nobody_knew_to_refer_to_others_leads_nowhere_either(processor, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("rediprune.inputs_video.REFERRING_FORMATS", set())
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "stream.ts", grey_video(4))
    path = tmp_path / f"list.{ENDINGS[kind]}"
    path.write_text(playlists("stream.ts")[kind])
    with pytest.raises(ValueError, match="cannot be decoded as a video"):
        processor(text="<video>", videos=path)


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.answers["http://nowhere.invalid/x"] = b"through the proxy"
    assert download("http://nowhere.invalid/x", 5, 100) == b"through the proxy"


def test_an_image_of_a_stranger(processor, server):
    """A header that announces more pixels than Pillow opens."""
    bomb = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(bomb, "PNG")
    content = bytearray(bomb.getvalue())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    server.answers["/bomb.png"] = bytes(content)
    with pytest.raises(ValueError, match="image 0, .* cannot be read as an image: Image size"):
        processor(text="<image>", images=f"{server.url}/bomb.png")
