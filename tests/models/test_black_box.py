"""Black boxes: a function, an ONNX file, and a real server under load, with delays, failures and wrong answers."""

from __future__ import annotations

import copy
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import gambeson as gb
from gambeson.auditing import AuditRun, run_audit
from gambeson.base import UserError
from gambeson.evaluation import AttackRun, TransferRun, load_model, run_attack, run_transfer
from gambeson.hardening import HardenRun, run_harden
from gambeson.models.black_box.base import BudgetSpent
from gambeson.models.black_box.http import HttpModel
from gambeson.models.black_box.local import FunctionModel
from gambeson.models.loading import check_source
from gambeson.victim import Victim
from tests.conftest import binary, full, inner_images

SHAPE = (1, 4, 4)


def npy(array):
    body = io.BytesIO()
    np.lib.format.write_array(body, np.asarray(array), allow_pickle=False)
    return body.getvalue()


class BusyServer(ThreadingHTTPServer):
    request_queue_size = 128  # with 5, the system resets connections that wait: requests that the server never sees


class Server:
    """Answers with a net's scores; ``plan`` holds what happens to the next requests instead, one entry each.

    An entry is a status, ``"drop"``, ``"slow"``, ``"drip"`` (a byte now and then), ``"cut"`` (half an answer),
    ``"leave"`` (the connection is closed after the answer, without a word) or a function from the right answer to
    (status, bytes). ``sizes`` holds the number of images of every request, and what
    happened to it.
    """

    def __init__(self, net, **settings):
        self.net, self.plan, self.always, self.connections = net, [], None, set()
        self.seen, self.headers, self.busy, self.most, self.sizes = 0, [], 0, 0, []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with outer.lock:
                    outer.seen += 1
                    outer.busy += 1
                    outer.connections.add(self.client_address)
                    outer.most = max(outer.most, outer.busy)
                    outer.headers.append(dict(self.headers))
                    todo = outer.plan.pop(0) if outer.plan else outer.always
                try:
                    outer.answer(self, body, todo)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer.lock:
                        outer.busy -= 1

            def log_message(self, *_):
                pass

        for name, value in settings.items():
            setattr(Handler, name, value)
        self.server = BusyServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/scores"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, body, todo):
        with self.lock:  # Python 3.11 may fail where several threads parse a header at once
            images = torch.from_numpy(np.lib.format.read_array(io.BytesIO(body), allow_pickle=False))
            self.sizes.append((len(images), todo))
        with torch.no_grad():
            scores = self.net(images)
        status, content, headers = 200, json.dumps({"scores": scores.tolist()}).encode(), {}
        if todo == "drop":
            handler.connection.close()
            return
        if todo == "slow":
            time.sleep(0.5)
        elif isinstance(todo, tuple):
            status, headers = todo
        elif isinstance(todo, int):
            status, content = todo, b"out of order"
        elif callable(todo):
            status, content = todo(scores)
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if todo == "cut":
            handler.wfile.write(content[:-3])
            handler.connection.close()
        elif todo == "drip":
            for byte in content:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.04)
        else:
            handler.wfile.write(content)
        if todo == "leave":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    net, _ = binary(SHAPE)
    made = Server(net)
    yield made
    made.server.shutdown()
    made.server.server_close()


def box(server, **keywords):
    return HttpModel(server.url, **{"timeout": 5.0, "pause": 0.01} | keywords)


def patience(trouble):
    """Seconds to wait for an answer: few where none comes in time; on a busy machine any other may come late."""
    return 0.3 if trouble in ("slow", "drip") else 30.0


def test_scores_are_those_of_the_model_behind_it(server):
    images = inner_images(10, SHAPE)
    asked = box(server, batch=4, headers={"Authorization": "Bearer x", "accept": "text/plain"})
    with torch.no_grad():
        assert torch.allclose(asked(images), server.net(images), atol=1e-6)
    assert (asked.images, asked.requests, asked.retried) == (10, 3, 0)
    assert server.headers[0]["Content-Type"] == "application/x-npy"
    assert server.headers[0]["Authorization"] == "Bearer x"
    assert [value for key, value in server.headers[0].items() if key.lower() == "accept"] == ["text/plain"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda scores: (200, npy(scores.numpy())),
        lambda scores: (200, npy(scores.double().numpy())),
        lambda scores: (200, json.dumps(scores.tolist()).encode()),
        lambda scores: (200, json.dumps({"logits": scores.tolist()}).encode()),
        lambda scores: (200, json.dumps({"probabilities": scores.softmax(1).tolist()}).encode()),
    ],
)
def test_every_documented_answer_is_read(server, answer):
    server.always = answer
    images = inner_images(5, SHAPE)
    with torch.no_grad():
        found, right = box(server)(images), server.net(images)
    assert torch.allclose(found.log_softmax(1), right.log_softmax(1), atol=1e-5)


@pytest.mark.parametrize(
    ("trouble", "again"),
    [(500, 1), (502, 1), ("drop", 1), ("slow", 1), ("drip", 1), ("cut", 1), (503, 0), (429, 0), (408, 0), (425, 0)],
)
def test_what_passes_is_tried_again_and_counts_again_where_it_may_have_been_answered(server, trouble, again):
    server.plan = [trouble, trouble, None, trouble]
    budget = 8 + again * 12
    asked = box(server, timeout=patience(trouble), budget=budget)
    images = inner_images(4, SHAPE)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(asked(images), server.net(images), atol=1e-6)
        assert (asked.images, asked.requests, asked.retried) == (budget, 5, 3)
        with pytest.raises(BudgetSpent, match=f"about {budget} images and was about {budget}: 1 more are too many"):
            asked(images[:1])
    assert server.seen == 5
    assert asked.images == budget


def test_a_retry_that_the_budget_has_no_room_for_is_not_made(server):
    server.always = 500
    asked = box(server, budget=9)
    with pytest.raises(BudgetSpent, match="may be asked about 9 images and was about 8: 4 more are too many"):
        asked(inner_images(4, SHAPE))
    assert (server.seen, asked.images) == (2, 8)


def test_retry_after_is_kept_to(server):
    server.plan = [(503, {"Retry-After": "0.3"}), (429, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})]
    began = time.monotonic()
    box(server)(inner_images(1, SHAPE))
    assert 0.3 <= time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("trouble", "words", "counted"),
    [
        (500, "status 500, 'out of order'", 8),
        ("slow", "no answer within 0.3 s", 8),
        full("drip", "no answer within 0.3 s", 8),
        ("cut", r"peer closed connection without sending complete message body.*", 8),
        (503, "status 503, 'out of order'", 0),
    ],
)
def test_a_server_that_never_recovers_is_told_with_the_count(server, trouble, words, counted):
    server.always = trouble
    asked = box(server, timeout=patience(trouble), retries=3)
    with pytest.raises(UserError, match=rf"gave no answer in 4 attempts \(the last: {words}\)"):
        asked(inner_images(2, SHAPE))
    assert (server.seen, asked.requests, asked.retried, asked.images) == (4, 4, 3, counted)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 302, 301])
def test_a_refusal_is_not_tried_again(server, status):
    server.always = (status, {"Location": server.url})
    asked = box(server)
    with pytest.raises(UserError, match=f"refused the images with status {status}.*float32 .N, C, H, W., was sent"):
        asked(inner_images(2, SHAPE))
    assert (server.seen, asked.retried, asked.images) == (1, 0, 0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            lambda scores: scores[:-1].tolist(),
            r"was given 3 images and returned shape \(2, 2\): expected scores \(3, K\)",
        ),
        (lambda scores: scores[:, :1].tolist(), r"returned shape \(3, 1\).*K of at least 2"),
        (lambda scores: scores[0].tolist(), r"returned shape \(2,\)"),
        (lambda scores: [[1.0, 2.0], [1.0], [2.0, 1.0]], r"returned list: expected scores"),
        (lambda scores: [["a", "b"]] * 3, r"returned list: expected scores"),
        (lambda scores: [[None, 1.0]] * 3, r"returned list: expected scores"),
        (lambda scores: [[float("nan"), 1.0]] * 3, r"NaN or infinite scores"),
        (lambda scores: {"colour": [1, 2, 3]}, r"JSON with the keys colour: expected scores"),
        (lambda scores: {"classes": [1, 0, 1]}, r"their number is unknown: pass classes=K"),
        (lambda scores: {"classes": [1, 0]}, r"was given 3 images and returned shape \(2,\)"),
        (lambda scores: {"classes": [0.5, 1, 0]}, r"returned shape \(3,\)"),
        (lambda scores: "cat", r"returned str"),
        (lambda scores: None, r"returned NoneType"),
    ],
)
def test_wrong_answers_are_told(server, answer, words):
    server.always = lambda scores: (200, json.dumps(answer(scores)).encode())
    with pytest.raises(UserError, match=words) as told:
        box(server)(inner_images(3, SHAPE))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"\x93NUMPY\x01\x00", b"\xff\xfe", npy(np.zeros(3))[:-5], b"\x80\x04\x95pickle"]
)
def test_bytes_that_are_no_scores(server, content):
    server.always = lambda scores: (200, content)
    with pytest.raises(UserError, match="neither JSON nor .npy"):
        box(server)(inner_images(1, SHAPE))


def test_a_pickled_npy_is_not_opened(server):
    body = io.BytesIO()
    np.save(body, np.array([[{"a": 1}, 2]], dtype=object), allow_pickle=True)
    server.always = lambda scores: (200, body.getvalue())
    with pytest.raises(UserError, match=r"neither JSON nor .npy \(Object arrays cannot be loaded"):
        box(server)(inner_images(1, SHAPE))


def test_classes_may_not_change(server):
    server.plan = [None, lambda scores: (200, npy(np.zeros((2, 3))))]
    asked = box(server)
    asked(inner_images(2, SHAPE))
    with pytest.raises(UserError, match="returned 3 classes after 2 before"):
        asked(inner_images(2, SHAPE))


def test_arrays_are_read_one_at_a_time(server, monkeypatch):
    inside, most = [], []
    read = np.lib.format.read_array

    def slowly(*given, **settings):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return read(*given, **settings)

    monkeypatch.setattr(np.lib.format, "read_array", slowly)
    file = io.BytesIO()
    np.save(file, np.eye(3, dtype=np.float32))
    asked = box(server)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(asked._answer, [file.getvalue()] * 8))
    assert most == [1] * 8
    assert all(np.array_equal(one, np.eye(3)) for one in found)


def test_many_clients_at_once_get_their_own_answers(server):
    """Eight threads, one shared box and boxes of their own; a third of the requests fail first."""
    server.plan = [[500, None, "drop"][k % 3] for k in range(60)]
    shared = box(server, retries=30, batch=3)
    jobs = [(shared if k % 2 else box(server, retries=30, batch=3), inner_images(7, SHAPE, seed=k)) for k in range(24)]

    def work(job):
        asked, images = job
        with torch.no_grad():
            return asked(images)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, jobs))
    with torch.no_grad():
        for (_, images), scores in zip(jobs, found, strict=True):
            assert torch.allclose(scores, server.net(images), atol=1e-6)
    assert server.most > 1  # they really were there together
    boxes = {id(asked): asked for asked, _ in jobs}.values()
    assert shared.images >= 12 * 7
    sent = sum(count for count, _ in server.sizes)
    assert sum(asked.images for asked in boxes) == sent  # every lost attempt here may have been answered
    assert sum(asked.requests for asked in boxes) == server.seen
    assert sum(asked.retried for asked in boxes) == 40


@pytest.mark.parametrize("workers", [1, 4])
def test_one_forward_sends_its_batches_together_and_a_failure_sends_no_more(server, workers):
    asked = box(server, batch=2, workers=workers, retries=0)
    server.always = lambda scores: time.sleep(0.05) or (200, json.dumps(scores.tolist()).encode())
    images = inner_images(16, SHAPE)
    with torch.no_grad():
        assert torch.allclose(asked(images), server.net(images), atol=1e-6)
    assert server.most > 1 if workers > 1 else server.most <= 2  # the last answer may still be leaving
    assert asked.images == 16
    server.always = 500
    before = server.seen
    with pytest.raises(UserError, match="gave no answer in 1 attempts"):
        asked(inner_images(100, SHAPE))
    assert server.seen - before <= 3 * workers
    assert asked.images == 16 + 2 * (server.seen - before)


def test_a_budget_outlives_the_process(server, tmp_path):
    file = tmp_path / "state" / "queries.json"
    first = box(server)
    first(inner_images(3, SHAPE))
    first.hold(1000, file)
    first(inner_images(10, SHAPE))
    assert json.loads(file.read_text())["images"] >= first.asked == 13  # as a cut process would leave it
    assert json.loads(file.read_text())["images"] <= 13 + 5
    first.settle()
    second = box(server)
    second.hold(1000, file)
    assert second.asked == 13
    second(inner_images(980, SHAPE))
    with pytest.raises(BudgetSpent, match="about 1000 images and was about 993: 8 more are too many"):
        second(inner_images(8, SHAPE))
    second(inner_images(7, SHAPE))
    assert json.loads(file.read_text())["images"] == second.asked == 1000
    assert server.seen == sum(1 for _ in server.sizes)
    assert sum(count for count, _ in server.sizes) == 1000


def test_a_box_that_names_the_class_only(server):
    server.always = lambda scores: (200, json.dumps({"classes": scores.argmax(1).tolist()}).encode())
    images = inner_images(20, SHAPE)
    asked = box(server, classes=2)
    with torch.no_grad():
        right = server.net(images).argmax(1)
        found = asked(images)
    assert torch.equal(found, torch.nn.functional.one_hot(right, 2).float() - 1)
    assert asked.decides_only
    server.always = None
    with pytest.raises(UserError, match="scores for some images and classes for others"):
        asked(images)
    server.always = lambda scores: (200, json.dumps([0, 2]).encode())
    with pytest.raises(UserError, match="returned classes from 0 to 2: expected 0 to 1"):
        box(server, classes=2)(images[:2])
    sure = FunctionModel(lambda x: torch.eye(2)[server.net(x).argmax(1)])
    assert not sure.decides_only  # nothing heard yet
    sure(images)
    assert sure.decides_only
    soft = FunctionModel(lambda x: server.net(x))
    soft(images)
    assert not soft.decides_only


def test_a_box_is_recognised_by_its_answers():
    net, _ = binary(SHAPE)
    other, _ = binary(SHAPE, seed=1)
    images = inner_images(4, SHAPE)
    prints = []
    for function in (net, net, other):
        asked = FunctionModel(function)
        asked.recognise(images)
        prints.append(gb.models.fingerprint(asked))
    assert prints[0] == prints[1] != prints[2]


def test_a_budget_holds_over_threads(server):
    asked = box(server, budget=10)

    def work(k):
        try:
            asked(inner_images(3, SHAPE, seed=k))
        except UserError:
            return 0
        return 3

    with ThreadPoolExecutor(6) as pool:
        total = sum(pool.map(work, range(12)))
    assert total == asked.images == 9


def test_no_server_and_no_address(server):
    server.server.shutdown()
    server.server.server_close()
    asked = box(server, retries=1)
    with pytest.raises(UserError, match=r"gave no answer in 2 attempts.*refused"):
        asked(inner_images(1, SHAPE))
    assert asked.images == 0
    for url in ("http://", "ftp://a/b", "http://a:b/", "http://a:0/", "http://a:65536/", "a"):
        with pytest.raises(UserError, match="is no address of a server"):
            HttpModel(url)
    with pytest.raises(UserError, match=r"HttpSettings.retries = -1: .*greater than or equal to 0"):
        HttpModel("http://a/", retries=-1)


def test_a_server_that_does_not_accept_is_not_counted():
    with socket.socket() as full, ExitStack() as others:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # who waits in its queue leaves no room for one more
            waiting = others.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        asked = HttpModel(f"http://127.0.0.1:{full.getsockname()[1]}/", timeout=0.1, retries=1, pause=0.01)
        with pytest.raises(UserError, match="gave no answer in 2 attempts .the last: no answer within 0.1 s"):
            asked(inner_images(3, SHAPE))
    assert (asked.images, asked.requests) == (0, 2)


def test_connections_are_kept_and_one_that_the_server_closed_is_not_missed():
    net, _ = binary(SHAPE)
    server = Server(net, protocol_version="HTTP/1.1")
    server.plan = [None, "leave"]
    asked = box(server)
    images = inner_images(2, SHAPE)
    for _ in range(4):
        asked(images)
        while server.busy:  # the answer is here before the server is done
            time.sleep(0.001)
    assert (asked.images, asked.requests, asked.retried) == (8, 4, 0)
    assert len(server.connections) == 2
    server.server.shutdown()
    server.server.server_close()


def test_no_proxy_stands_before_a_server_of_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = box(server, retries=0)
    asked(inner_images(2, SHAPE))
    assert server.seen == 1
    with pytest.raises(UserError, match="gave no answer in 1 attempts"):  # elsewhere there is one
        HttpModel("http://192.0.2.1/scores", timeout=5, retries=0)(inner_images(2, SHAPE))


def test_an_answer_without_end_is_not_read_to_the_end(server, monkeypatch):
    monkeypatch.setattr("gambeson.models.black_box.http._LARGEST", 10_000)
    server.always = lambda scores: (200, b"[" * 10**7)
    asked = box(server)
    with pytest.raises(UserError, match="answered more than 10000 bytes: expected scores"):
        asked(inner_images(2, SHAPE))
    assert (server.seen, asked.images) == (1, 0)


def test_the_title_keeps_secrets():
    assert HttpModel("http://me:secret@host:1/path?key=secret").title == "http://host:1/path"


@pytest.mark.parametrize(
    "url", ["https://me@host.org/x", "http://me:hush@host.org", "https://host.org/?a=1&api_key=hush"]
)
def test_a_url_with_a_secret_names_no_model_of_a_run(url, tmp_path):
    for run in (
        lambda: run_audit(AuditRun(model=url, data="digits"), tmp_path / "a"),
        lambda: run_attack(AttackRun(model=url, data="digits", attack="square", settings={"eps": 0.1}), tmp_path / "a"),
        lambda: run_transfer(TransferRun(models=(url, "lenet5"), data="digits", eps=0.1), tmp_path / "a"),
        lambda: run_harden(HardenRun(model=url, data="digits"), tmp_path / "a"),
        lambda: load_model(url, "digits"),
    ):
        with pytest.raises(UserError, match=r"host\.org has a(n?) .* in it.*--http token_env=VARIABLE") as told:
            run()
        assert "hush" not in str(told.value)
    assert not (tmp_path / "a").exists()
    check_source("https://host.org/x?version=2")


def test_a_query_attack_keeps_its_budget_through_lost_requests(server):
    images = inner_images(6, SHAPE)
    with torch.no_grad():
        labels = server.net(images).argmax(1)
    attack = gb.attacks.Square(eps=0.2, queries=30)
    server.plan = [500 if k % 4 == 0 else None for k in range(200)]
    asked = box(server)
    found = attack(gb.attacks.Queries(asked), images, labels, seed=1)
    lost = sum(count for count, todo in server.sizes if todo == 500)
    assert lost > 0
    assert asked.images - lost <= 6 * 30
    assert torch.equal(found, attack(server.net, images, labels, seed=1))
    with torch.no_grad():
        assert (server.net(found).argmax(1) != labels).any()


def test_a_black_box_has_no_gradient_and_no_copy():
    net, _ = binary(SHAPE)
    asked = FunctionModel(net, budget=50)
    images = inner_images(2, SHAPE)
    with pytest.raises(UserError, match="is a black box, which has no gradient: choose a query, procedural"):
        gb.attacks.PGD(eps=0.1, steps=2)(asked, images, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="no weights to copy"):
        copy.deepcopy(asked)
    with Victim(asked, fast=True) as victim, torch.no_grad():
        assert torch.allclose(victim(images), net(images))
        assert victim.forwards == 2


def test_functions_may_return_arrays_lists_and_probabilities():
    net, _ = binary(SHAPE)
    images = inner_images(4, SHAPE)
    with torch.no_grad():
        right = net(images)
        for form in (lambda s: s, lambda s: s.numpy(), lambda s: s.tolist(), lambda s: s.double()):
            assert torch.allclose(FunctionModel(lambda x, form=form: form(net(x)))(images), right, atol=1e-6)
        sure = FunctionModel(lambda x: net(x).softmax(1))
        assert torch.allclose(sure(images), right.log_softmax(1), atol=1e-5)
        assert sure.output == "probabilities"
        rounded = FunctionModel(lambda x: 1.0003 * net(x).softmax(1))
        assert torch.allclose(rounded(images), right.log_softmax(1), atol=1e-3)
        assert rounded.output == "probabilities"
        left = FunctionModel(lambda x: net(x).softmax(1), output="logits")
        assert torch.allclose(left(images), right.softmax(1))
        zero = FunctionModel(lambda x: torch.eye(2)[torch.zeros(len(x), dtype=torch.long)])
        assert zero(images).isfinite().all()


def test_label_maps_are_read_as_scores_or_as_classes(server):
    draw = torch.Generator().manual_seed(0)
    images, scores = torch.rand(6, 3, 5, 4, generator=draw), torch.randn(6, 3, 5, 4, generator=draw)
    assert torch.equal(FunctionModel(lambda _: scores)(images), scores)
    sure = FunctionModel(lambda _: scores.softmax(1).numpy())
    assert torch.allclose(sure(images), scores.log_softmax(1), atol=1e-5)
    top = scores.argmax(1)
    named = FunctionModel(lambda _: top.to(torch.uint8), classes=4)
    found = named(images)
    assert named.decides_only
    assert torch.equal(found.argmax(1), top)
    assert torch.equal(found.sum(1), torch.full((6, 5, 4), -3.0))
    server.always = lambda _: (200, json.dumps({"classes": top.tolist()}).encode())
    assert torch.equal(box(server, classes=4)(inner_images(6, SHAPE)), found)
    with pytest.raises(UserError, match=r"returned shape \(6, 5, 4\): expected scores \(6, K\).* or \(6, K, H, W\)"):
        FunctionModel(lambda _: scores[:, 0], classes=4)(images)


def test_a_function_that_writes_into_its_input_changes_nothing():
    images = inner_images(3, SHAPE)
    before = images.clone()
    FunctionModel(lambda x: x.zero_().flatten(1)[:, :2])(images)
    assert torch.equal(images, before)


def test_onnx_files_that_do_not_fit(tmp_path):
    pytest.importorskip("onnxruntime")
    from gambeson.models.black_box.local import OnnxModel

    with pytest.raises(UserError, match="does not exist: name an ONNX file"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        OnnxModel(tmp_path / "bad.onnx")


@pytest.mark.parametrize("batch", [None, 3])
def test_onnx_gives_the_scores_of_its_model(tmp_path, batch):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from gambeson.models.black_box.local import OnnxModel

    net, _ = binary(SHAPE)
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    program = torch.export.export(net.eval(), (torch.rand(batch or 2, *SHAPE),), dynamic_shapes=shapes)
    torch.onnx.export(program, (), str(tmp_path / "m.onnx"), dynamo=True, external_data=False, verbose=False)
    asked = OnnxModel(tmp_path / "m.onnx")
    for count in (1, 3, 8):
        images = inner_images(count, SHAPE)
        with torch.no_grad():
            assert torch.allclose(asked(images), net(images), atol=1e-5)
    with pytest.raises(UserError, match="takes images of 1x4x4, got 3x4x4: choose data"):
        asked(inner_images(2, (3, 4, 4)))


@pytest.mark.parametrize(
    "attack",
    [
        gb.attacks.PGD(eps=0.1),
        gb.attacks.DeepFool(eps=0.1),
        gb.attacks.StochasticPGD(eps=0.1),
        gb.attacks.SGA(eps=0.1),
        gb.attacks.DataFree(eps=0.1),
        gb.attacks.SingularVector(eps=0.1),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_an_attack_that_needs_gradients_asks_a_server_nothing(server, attack):
    images, labels = inner_images(6, SHAPE), torch.arange(6) % 2
    for target in (box(server), [server.net, box(server)]):
        with pytest.raises(UserError, match=rf"{type(attack).__name__} needs gradients, and http.* is a black box"):
            attack.craft(target, (images, labels)) if hasattr(attack, "craft") else attack(target, images, labels)
    assert server.seen == 0
    gb.attacks.PerlinNoise(eps=0.1, patterns=3, images=4, finalists=1).craft(box(server), (images, labels))
    assert server.seen > 0


def test_a_token_comes_from_the_environment_and_is_stored_nowhere(server, monkeypatch):
    from gambeson.models.black_box.http import HttpSettings, StoredHttp

    monkeypatch.setenv("MY_TOKEN", "abc\n")
    asked = box(server, token_env="MY_TOKEN", headers={"X-Api-Key": "v1-${MY_TOKEN}", "X-Plain": "yes"})
    asked(inner_images(2, SHAPE))
    sent = {key.lower(): value for key, value in server.headers[0].items()}
    assert (sent["authorization"], sent["x-api-key"], sent["x-plain"]) == ("Bearer abc", "v1-abc", "yes")
    assert "abc" not in str(asked.settings.plain())
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UserError, match="environment variable MY_TOKEN is not set"):
        box(server, token_env="MY_TOKEN")
    for name, value in (("X-Bad", "a\nb"), ("X Bad", "a"), ("X-Bad", "é")):
        with pytest.raises(UserError, match="has characters that HTTP does not allow"):
            box(server, headers={name: value})

    class Stored(gb.base.Config):
        http: StoredHttp = None

    assert Stored(http={"headers": {"X-Plain": "yes", "Authorization": "Bearer ${T}"}}).http is not None
    for name in ("Authorization", "x-api-key", "Cookie"):
        with pytest.raises(UserError, match=rf"the header {name} would be stored with the run: write {name}="):
            Stored(http=HttpSettings(headers={name: "abc"}))


def test_a_server_that_wants_a_token_says_so_with_the_setting(server):
    server.always = 401
    with pytest.raises(UserError, match=r"status 401.*\(a token: token_env or headers\)"):
        box(server)(inner_images(1, SHAPE))
