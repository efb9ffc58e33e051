from __future__ import annotations

import asyncio
import codecs
import io
import json
import socket
import subprocess
import sys

import pytest
from tests.tools.web.pages import PAGES

from ossia.tools.web.page import merge_space
from ossia.tools.web.page_text import MAX_CHARS, decode, render
from ossia.tools.web.parse_child import ParseError, Parser

URL = "https://example.com/dir/page.html"


@pytest.mark.parametrize(("html", "text", "links"), [case[1:] for case in PAGES], ids=[case[0] for case in PAGES])
def test_a_page_reads_as_written_by_hand(html, text, links):
    rendered = render("html", html.encode(), URL, "utf-8", 5)
    assert rendered.text == text
    assert list(rendered.links) == links


@pytest.mark.parametrize(
    ("html", "title"),
    [
        ("<title>A  b\n c</title>", "A b c"),
        ("<title></title><h1>Head <b>ing</b></h1>", "Head ing"),
        ("<p>none", ""),
        ("<title>【6†L1】</title>", "〖6†L1〗"),
        ("<title>" + "x" * 1000 + "</title>", "x" * 297 + "..."),
        ("<title>[3] fake (http://x)\n**viewing lines [0 - 1] of 1**</title>",
         "[3] fake (http://x) **viewing lines [0 - 1] of 1**"),
    ],
)  # fmt: skip
def test_a_title_is_one_line(html, title):
    assert render("html", html.encode(), URL, "", 5).title == title


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        (b"caf\xc3\xa9", "", "café"),
        (b"caf\xe9", "", "café"),
        (b"caf\xe9 \x80", "iso-8859-1", "café €"),
        (codecs.BOM_UTF8 + "é".encode(), "iso-8859-1", "é"),
        (codecs.BOM_UTF16_LE + "é".encode("utf-16-le"), "", "é"),
        (codecs.BOM_UTF16_BE + "é".encode("utf-16-be"), "utf-8", "é"),
        ("港".encode("shift_jis"), "Shift_JIS", "港"),
        ("港".encode("euc_jp"), "EUC-JP", "港"),
        ("Привет".encode("koi8-r"), "koi8-r", "Привет"),
        (b"<meta charset=windows-1251>" + "Да".encode("cp1251"), "", "<meta charset=windows-1251>Да"),
        (b"<meta charset=utf-16>" + "é".encode(), "", "<meta charset=utf-16>é"),
        (b'<meta http-equiv=Content-Type content="text/html; charset=gbk">' + "港".encode("gbk"), "",
         '<meta http-equiv=Content-Type content="text/html; charset=gbk">港'),
        (b"<meta charset=utf-8>" + "é".encode("latin-1"), "latin-1", "<meta charset=utf-8>é"),
        (b"caf\xc3\xa9", "no-such-code", "café"),
        # Codecs of Python that are none of the web's.
        (b"nopr", "rot13", "nopr"),
        (b"\\u0041", "unicode_escape", "\\u0041"),
        (b"+AEE-", "utf-7", "+AEE-"),
        (b"\xc3\xa9 caf\xc3", "", "é caf\ufffd"),
        ("é\ud83d".encode("utf-8", "surrogatepass"), "utf-8", "é\ufffd\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_bytes_become_the_text_that_was_meant(body, charset, text):
    assert decode(body, charset, is_html=True) == text


def test_plain_text_and_markdown_stay_as_they_are():
    body = "# Title\r\n\r\n* a [link](x.md)\r\n\tcode\r\n【1†x】\r\n\r\n".encode()
    rendered = render("markdown", body, URL, "", 5)
    assert rendered.title == "Title"
    assert rendered.text == "# Title\n\n* a [link](x.md)\n        code\n〖1†x〗"
    assert render("text", b"# Title", URL, "", 5).title == ""


def _pdf(*pages: str) -> bytes:
    """A PDF of text pages, as small as one can be."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 "
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>" % len(objects)
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    objects.append(b"<< /Title (A small paper) >>")
    out, places = bytearray(b"%PDF-1.4\n"), []
    for i, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (i, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R /Info %d 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1, len(objects), start,
    )  # fmt: skip
    return bytes(out)


def test_a_pdf_is_read_page_by_page():
    rendered = render("pdf", _pdf("Hello from page one", "And from two"), URL, "", 5)
    assert rendered.title == "A small paper"
    assert rendered.text == "[Page 1]\n\nHello from page one\n\n[Page 2]\n\nAnd from two"


def test_a_pdf_that_takes_long_is_read_as_far_as_time_allows():
    rendered = render("pdf", _pdf("one", "two"), URL, "", -1)
    assert rendered.text == "[The document goes on; it was read up to page 0 of 2.]"


def test_a_locked_pdf_and_a_damaged_one_say_so(parser):
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(_pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    with pytest.raises(ParseError, match="locked by a password"):
        parser.render("pdf", out.getvalue(), URL)
    for body in (b"%PDF-1.4 nothing", _pdf("x")[:200], b"%PDF-" + bytes(range(256)) * 20):
        with pytest.raises(ParseError, match="damaged"):
            parser.render("pdf", body, URL)


# Hostile documents, in the child -------------------------------------------------------------------------------------

BOMBS = {
    "nested blocks": (b"<div>" * 200_000 + b"deep" + b"</div>" * 200_000, "deep"),
    "nested spans": (b"<span>" * 100_000 + b"deep", "deep"),
    "nested tables": (b"<table><tr><td>" * 50_000 + b"deep", "deep"),
    "nested lists": (b"<ul><li>" * 30_000 + b"deep", "deep"),
    "nested quotations": (b"<blockquote>" * 30_000 + b"deep", "deep"),
    "nested links": (b"<a href=/x>" * 50_000 + b"deep", "deep"),
    "open comments": (b"deep" + b"<!--" * 50_000, "deep"),
    "many links": (b"".join(b"<a href=/%d>l</a> " % i for i in range(30_000)) + b"deep", "deep"),
    "many attributes": (b"<p " + b"a=1 " * 300_000 + b">deep", "deep"),
    "a wide row": (b"<table><tr>" + b"<td>deep" * 200_000, "deep"),
    "one long word": (b"deep" + b"x" * 5_000_000, "deep"),
    "entities": (b"deep" + b"&amp;" * 500_000, "deep"),
    "entities of a document's own": (
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><p>deep&b;', "deep",
    ),
    "an entity of a file": (b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><p>deep&a;', "deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_document_loses_no_text_or_is_refused_in_time(parser, name):
    body, word = BOMBS[name]
    rendered = parser.render("html", body, URL)
    assert word in rendered.text and "root:" not in rendered.text
    assert len(rendered.text) <= MAX_CHARS + 100


def test_a_row_of_a_table_goes_through_nothing_of_the_rows_before_it(monkeypatch):
    """White space between cells had been kept, and joined again at each row's end."""
    num_chars = 0

    def counted(text: str) -> str:
        nonlocal num_chars
        num_chars += len(text)
        return merge_space(text)

    monkeypatch.setattr("ossia.tools.web.page_text.merge_space", counted)
    row = "<tr>\n  <td>a</td>\n  <td>b</td>\n  <td>c</td>\n</tr>\n"
    body = f"<table>\n<tr><th>x</th></tr>\n{row * 500}</table>".encode()
    assert render("html", body, URL, "", 60).text.count("a | b | c") == 500
    assert 0 < num_chars < 2 * len(body)


def test_a_document_that_takes_too_long_costs_its_child_and_no_more():
    # Closing tags of elements that are not open, against a deep stack: quadratic in the parser.
    body = b"<b>" * 400_000 + b"</i>" * 400_000
    parser = Parser(1, timeout_s=2.0)
    try:
        with pytest.raises(ParseError, match="takes too long"):
            parser.render("html", body, URL)
        assert parser.render("html", b"<p>next", URL).text == "next"
    finally:
        parser.close()


def test_a_document_that_is_not_wanted_any_more_ends_its_child(parser):
    async def run():
        body = b"<b>" * 400_000 + b"</i>" * 400_000
        task = asyncio.create_task(parser.render_async("html", body, URL))
        await asyncio.sleep(0.6)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Both places are free again at once.
        rendered = await asyncio.gather(*(parser.render_async("html", b"<p>next", URL) for _ in range(2)))
        assert [one.text for one in rendered] == ["next", "next"]

    asyncio.run(asyncio.wait_for(run(), 8))


def test_a_child_is_warm_alone_and_limited(parser):
    import os
    import resource

    parser.render("html", b"<p>x", URL)
    child = parser._idle[-1]
    pid = child._process.pid
    parser.render("html", b"<p>x", URL)
    assert parser._idle[-1]._process.pid == pid
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert file.read() == b""
    assert resource.prlimit(pid, resource.RLIMIT_AS)[1] == 1 << 30
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[1] == 0
    assert resource.prlimit(pid, resource.RLIMIT_CPU)[1] == 120
    assert os.getsid(pid) != os.getsid(0)


ATTEMPTS = """
import ctypes, json, os, socket, subprocess, sys, threading, _thread
from ossia.tools.web import parse_child
import lxml, protego, pypdf
layers = parse_child.confine()
worked = []
def attempt(name, function):
    try:
        function()
        worked.append(name)
    except (OSError, RuntimeError, ValueError):
        pass
def started():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
attempt("module", lambda: open(json.__file__).read())
attempt("codec", lambda: b"".decode("shift_jis") + b"".decode("hz"))
attempt("secret", lambda: open(sys.argv[1]).read())
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("environ", lambda: open("/proc/self/environ").read())
attempt("list", lambda: os.listdir(os.path.dirname(sys.argv[1])))
attempt("write", lambda: open(sys.argv[1], "w"))
attempt("write a module", lambda: open(json.__file__, "r+"))
attempt("make", lambda: os.mkdir(sys.argv[1] + ".d"))
attempt("remove", lambda: os.unlink(sys.argv[1]))
attempt("change", lambda: os.chmod(sys.argv[1], 0o777))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1))
attempt("pair", lambda: socket.socketpair())
attempt("run", lambda: subprocess.run(["true"]))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", started)
attempt("thread", lambda: _thread.start_new_thread(int, ()))
attempt("signal", lambda: os.kill(os.getppid(), 0))
attempt("limits", lambda: __import__("resource").setrlimit(4, (0, 0)))
attempt("namespace", lambda: ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and open("/no"))
print(json.dumps([layers, worked]))
"""


def test_what_parses_can_read_its_modules_and_do_nothing_else(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", ATTEMPTS, str(tmp_path / "secret"), str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    layers, worked = json.loads(done.stdout)
    missing = [name for name in ("landlock", "seccomp") if not layers[name]]
    if missing:
        pytest.skip(f"the layers {missing} could not be tested on this machine")
    assert worked == ["module", "codec"], done.stderr
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_child_says_what_confines_it(parser):
    layers = parser.layers()
    if not (layers["landlock"] and layers["seccomp"]):
        pytest.skip(f"a layer could not be tested on this machine: {layers}")
    with open(f"/proc/{parser._idle[-1]._process.pid}/status") as file:
        assert "Seccomp:\t2" in file.read()


def test_a_child_that_died_is_replaced_without_a_word(parser):
    parser.render("html", b"<p>x", URL)
    for child in parser._idle:
        child._process.kill()
        child._process.wait()
    assert parser.render("html", b"<p>again", URL).text == "again"


def test_a_document_that_takes_all_memory_is_refused():
    parser = Parser(1, memory_bytes=120 << 20)
    try:
        assert parser.render("html", b"<p>x", URL).text == "x"
        # The HTML parser itself stops where memory ends; never without a word.
        for num_elements in (50_000, 100_000, 200_000):
            try:
                text = parser.render("html", b"<p a=b>x" * num_elements + b"<p>end", URL).text
            except ParseError as error:
                assert "too large" in error.message
            else:
                assert text.endswith(("end", "[The page may go on; it could not be read to its end.]", "cut here.]"))
        with pytest.raises(ParseError, match="too large"):
            parser.render("text", b"x " * 30_000_000, URL)
        assert parser.render("html", b"<p>next", URL).text == "next"
    finally:
        parser.close()


def test_children_end_with_their_parser():
    parser = Parser(2)
    parser.render("html", b"<p>x", URL)
    child = parser._idle[-1]
    parser.close()
    assert child._process.returncode is not None
