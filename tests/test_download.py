"""`download` against a real HTTP server that breaks, redirects, refuses and changes its file."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steps import StepCancelled, StepError, StepFailed
from steps._transfer import Transfer
from steps.download import Params, run

BODY = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(BODY).hexdigest()


class Shop:
    """Serves one file; keeps the requests; `troubles` are used up one by one before it behaves."""

    def __init__(self, body=BODY, etag='"v1"', ranges=True):
        self.body, self.etag, self.ranges = body, etag, ranges
        self.troubles, self.requests = [], []

    def __call__(self, handler):
        self.requests.append((handler.path, dict(handler.headers)))
        if self.troubles:
            return self.troubles.pop(0)(handler)
        return self.serve(handler)

    def serve(self, handler, cut=None):
        wanted = handler.headers.get("Range")
        fresh = handler.headers.get("If-Range") in (None, self.etag)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges and fresh else 0
        if start >= len(self.body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.body)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(self.body) - start))
        handler.end_headers()
        handler.wfile.write(self.body[start : None if cut is None else start + cut])
        if cut is not None:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        return None

    def break_after(self, size):
        return lambda handler: self.serve(handler, cut=size)


def status(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


@pytest.fixture
def shop():
    return Shop()


@pytest.fixture
def address(shop, http_site):
    return f"{http_site(shop)}/file.bin"


def transfer(address, context, sha256="", **options):
    return Transfer(address, context.plan_dir / "out.bin", sha256, {}, context, **{"backoff_s": 0.01, **options}).run()


def leftovers(context):
    return [path.name for path in context.plan_dir.iterdir() if path.name.startswith(".")]


def test_writes_the_file_and_tells_about_it(address, step_context):
    context = step_context()
    outputs = run(Params(url=address, output="data/out.bin", sha256=SHA256.upper()), context)
    target = context.plan_dir / "data/out.bin"
    assert outputs == {"path": str(target), "sha256": SHA256, "size": len(BODY), "downloaded": True}
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["out.bin"]
    assert context.progress[-1]["fraction"] == 1
    assert "1.0 MiB of 1.0 MiB" in context.progress[-1]["text"]


def test_a_file_with_the_wanted_hash_is_left_alone(shop, address, step_context):
    context = step_context()
    run(Params(url=address, output="out.bin", sha256=SHA256), context)
    outputs = run(Params(url=address, output="out.bin", sha256=SHA256), context)
    assert outputs["downloaded"] is False and len(shop.requests) == 1


def test_a_wrong_hash_is_final_and_leaves_the_old_file(address, step_context):
    context = step_context()
    (context.plan_dir / "out.bin").write_text("old")
    with pytest.raises(StepError, match="wanted `0000") as caught:
        run(Params(url=address, output="out.bin", sha256="0" * 64), context)
    assert not isinstance(caught.value, StepFailed)
    assert (context.plan_dir / "out.bin").read_text() == "old" and leftovers(context) == []


def test_resumes_within_one_attempt(shop, address, step_context):
    shop.troubles = [shop.break_after(1000), shop.break_after(5000)]
    context = step_context()
    assert transfer(address, context) == SHA256
    assert [headers.get("Range") for _, headers in shop.requests] == [None, "bytes=1000-", "bytes=6000-"]
    assert shop.requests[1][1]["If-Range"] == '"v1"' and leftovers(context) == []


def test_resumes_what_an_earlier_attempt_left(shop, address, step_context):
    shop.troubles = [shop.break_after(70_000)]
    with pytest.raises(StepFailed, match="goes on at byte 70000"):
        transfer(address, step_context(), tries=1)
    assert transfer(address, step_context(key="flow/run/step/2")) == SHA256
    assert shop.requests[-1][1]["Range"] == "bytes=70000-"


def test_a_changed_file_is_not_glued_to_the_old_part(shop, address, step_context):
    shop.troubles = [shop.break_after(70_000)]
    with pytest.raises(StepFailed):
        transfer(address, step_context(), tries=1)
    shop.body, shop.etag = BODY[::-1], '"v2"'
    context = step_context()
    transfer(address, context)
    assert (context.plan_dir / "out.bin").read_bytes() == BODY[::-1]


def test_a_server_that_ignores_if_range_is_seen_through(shop, address, step_context):
    shop.troubles = [shop.break_after(70_000)]
    with pytest.raises(StepFailed):
        transfer(address, step_context(), tries=1)

    def part_of_another(handler):
        handler.send_response(206)
        handler.send_header("ETag", '"v2"')
        handler.send_header("Content-Range", f"bytes 70000-{len(BODY) - 1}/{len(BODY)}")
        handler.send_header("Content-Length", str(len(BODY) - 70_000))
        handler.end_headers()
        handler.wfile.write(b"x" * (len(BODY) - 70_000))

    shop.troubles = [part_of_another]
    assert transfer(address, step_context()) == SHA256


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_validator_it_starts_again(shop, address, step_context, etag):
    shop.etag, shop.troubles = etag, [shop.break_after(1000)]
    assert transfer(address, step_context()) == SHA256
    assert "Range" not in shop.requests[-1][1]


def test_without_a_validator_but_with_a_hash_it_resumes_and_starts_again_when_that_was_wrong(
    shop, address, step_context
):
    shop.etag, shop.troubles = "", [shop.break_after(1000)]
    with pytest.raises(StepFailed):
        transfer(address, step_context(), tries=1)
    context = step_context()
    part = next(context.plan_dir.glob(".out.bin.*.part"))
    part.write_bytes(b"x" * 1000)
    assert transfer(address, context, SHA256) == SHA256
    assert [headers.get("Range") for _, headers in shop.requests] == [None, "bytes=1000-", None]


def test_a_server_that_ignores_range_sends_it_all(shop, address, step_context):
    shop.ranges, shop.troubles = False, [shop.break_after(1000)]
    assert transfer(address, step_context()) == SHA256


def test_a_part_that_is_already_whole_is_used(shop, address, step_context):
    shop.troubles = [lambda handler: shop.serve(handler, cut=len(BODY))]
    assert transfer(address, step_context()) == SHA256
    shop.body = BODY + b"more"
    shop.troubles = [shop.break_after(len(BODY))]
    with pytest.raises(StepFailed):
        transfer(address, step_context(), tries=1)
    shop.body = BODY
    assert transfer(address, step_context()) == SHA256
    assert shop.requests[-1][1]["Range"] == f"bytes={len(BODY)}-"


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(shop, address, step_context, code):
    shop.troubles = [status(code, Retry_After="0")] * 2
    assert transfer(address, step_context(), backoff_s=60) == SHA256
    assert len(shop.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
def test_what_will_not_pass_is_final(shop, address, step_context, code):
    shop.troubles = [status(code)]
    with pytest.raises(StepError, match=f"answered {code}") as caught:
        transfer(address, step_context())
    assert not isinstance(caught.value, StepFailed) and len(shop.requests) == 1


def test_gives_up_after_so_many_fruitless_tries(shop, address, step_context):
    shop.troubles = [status(503)] * 10
    with pytest.raises(StepFailed, match=r"after 3 tries.*answered 503"):
        transfer(address, step_context(), tries_without_progress=3)
    assert len(shop.requests) == 3


def test_a_long_retry_after_ends_the_attempt(shop, address, step_context):
    shop.troubles = [status(429, Retry_After="3600")]
    with pytest.raises(StepFailed, match="asks to wait 3600 s"):
        transfer(address, step_context())


def test_a_server_that_is_not_there_is_tried_again_then_failed(step_context):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StepFailed, match="after 2 tries"):
        transfer(f"http://127.0.0.1:{port}/x", step_context(), tries_without_progress=2)


def test_the_secret_is_sent_but_not_to_where_a_redirect_leads(shop, address, http_site, step_context):
    other = Shop()
    there = http_site(other)
    shop.troubles = [status(302, Location=f"{there}/real.bin")] * 2
    context = step_context(secrets={"KEY": "s3cret"})
    run(Params(url=address, output="a.bin", auth_secret="KEY"), context)
    run(Params(url=address, output="b.bin", auth_secret="KEY", auth_header="X-Api-Key"), context)
    assert shop.requests[0][1]["Authorization"] == "Bearer s3cret"
    assert shop.requests[1][1]["X-Api-Key"] == "s3cret" and "Authorization" not in shop.requests[1][1]
    assert "s3cret" not in json.dumps(other.requests) and "s3cret" not in context.text()


def test_an_undeclared_secret_is_an_error(address, step_context):
    with pytest.raises(StepError, match="secret `KEY` of `auth_secret` is not declared"):
        run(Params(url=address, output="a.bin", auth_secret="KEY"), step_context())


def test_a_key_in_the_address_is_not_logged(shop, address, step_context):
    shop.troubles = [status(503, Retry_After="0"), status(404)]
    context = step_context()
    with pytest.raises(StepError) as caught:
        run(Params(url=f"{address}?signature=hidden", output="a.bin"), context)
    assert "hidden" not in str(caught.value) + context.text()
    assert shop.requests[0][0].endswith("?signature=hidden")


def test_a_redirect_to_a_file_is_refused(shop, address, step_context):
    shop.troubles = [status(302, Location="file:///etc/passwd")]
    with pytest.raises(StepError, match="cannot be followed"):
        transfer(address, step_context())


def test_cancel_ends_a_stalled_wait_and_keeps_the_part(shop, address, step_context):
    shop.troubles = [shop.break_after(1000), status(503)]
    context = step_context()
    ended = []

    def work():
        try:
            transfer(address, context, backoff_s=600, longest_wait_s=1e6)
        except StepCancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    context.wait_for_line("trying again")
    context.cancel()
    thread.join(10)
    assert ended == [True] and any(name.endswith(".part") for name in leftovers(context))


def test_cancel_ends_a_transfer_that_stalls(shop, address, step_context):
    stalled, release = threading.Event(), threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[:10])
        handler.wfile.flush()
        stalled.set()
        release.wait(60)
        handler.close_connection = True

    shop.troubles = [stall]
    context, ended = step_context(), []

    def work():
        try:
            transfer(address, context)
        except StepCancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    assert stalled.wait(20)
    while not context.progress and thread.is_alive():
        stalled.wait(0.01)
    context.cancel()
    thread.join(20)
    release.set()
    assert ended == [True] and len(shop.requests) == 1


def test_too_little_room_is_told_before_the_transfer(shop, address, step_context):
    def promise(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 60))
        handler.end_headers()
        handler.close_connection = True

    shop.troubles = [promise]
    with pytest.raises(StepFailed, match="bytes free, 1152921504606846976 are needed"):
        transfer(address, step_context())


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told(tiny_disk, http_site, step_context):
    def unknown_length(handler):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(BODY)

    with pytest.raises(StepFailed, match=r"the disk of .* is full"):
        run(Params(url=http_site(unknown_length), output=str(tiny_disk / "out.bin")), step_context())


def test_an_output_that_is_a_folder_is_an_error(address, step_context):
    with pytest.raises(StepError, match="is a folder"):
        run(Params(url=address, output="."), step_context())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host/x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(ValidationError, match="wanted a URL that starts with"):
        Params(url=url, output="x")


def test_a_bad_hash_is_refused_and_a_template_is_not():
    with pytest.raises(ValidationError, match="wanted a sha256 of 64"):
        Params(url="http://x", output="x", sha256="abc")
    assert Params(url="${{ params.url }}", output="x", sha256="${{ params.sha }}").sha256


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 3000), max_size=4), size=st.integers(1, 4000))
def test_however_it_breaks_the_bytes_are_right(shop, address, step_context, cuts, size):
    shop.body = os.urandom(size)
    shop.etag = f'"{hashlib.sha256(shop.body).hexdigest()}"'
    shop.troubles = [shop.break_after(cut) for cut in cuts]
    context = step_context()
    transfer(address, context)
    assert (context.plan_dir / "out.bin").read_bytes() == shop.body


def test_through_the_host(address, run_step):
    result = run_step("download", {"url": address, "output": "out.bin", "sha256": SHA256})
    assert result.outcome == "succeeded" and result.outputs["size"] == len(BODY)
