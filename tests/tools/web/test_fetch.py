from __future__ import annotations

import asyncio
import datetime
import json
import ssl
import tracemalloc

import pytest
from tests.tools.web.site import Names, page, redirect, serving

from ossia.errors import OssiaError
from ossia.tools.web.fetch import Fetcher, FetchError, FetchLimits, JsonClient
from ossia.tools.web.guard import Domains, Guard, RefusedError

LIMITS = FetchLimits(total_s=1.0, max_bytes=1 << 20)


def get(site, path, *, guard=None, domains=None, limits=LIMITS, **options):
    fetcher = Fetcher(guard or Guard(allowed=[site.address]), limits, **options)
    url = path if "://" in path else site.url + path
    return asyncio.run(fetcher.get(url, domains or Domains()))


def test_a_page_is_fetched_with_where_it_came_from(bad_site):
    fetched = get(bad_site, "/to-a")
    assert (fetched.status, fetched.body, fetched.content_type, fetched.charset) == (
        200, b"<title>A</title><p>I am A", "text/html", "utf-8",
    )  # fmt: skip
    assert fetched.url == bad_site.url + "/a"
    assert fetched.hops == ((bad_site.url + "/to-a", "127.0.0.1"), (bad_site.url + "/a", "127.0.0.1"))


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/loop", FetchError, "led on more than 5 times"),
        ("/ring1", FetchError, "led on more than 5 times"),
        ("/to-metadata", RefusedError, "not a public one"),
        ("/to-loopback", RefusedError, "port 22"),
        ("/to-file", RefusedError, "only http and https"),
        ("/to-data", RefusedError, "only http and https"),
        ("/to-decimal", RefusedError, "in disguise"),
        ("/to-user", RefusedError, "user name"),
        ("/to-bad", FetchError, "not a URL"),
        ("/slow", FetchError, "no complete answer within 1 s"),
        ("/silent", FetchError, "no complete answer within 1 s"),
        ("/many-headers", FetchError, "not proper HTTP"),
        ("/short", FetchError, "not proper HTTP"),
        ("/no-http", FetchError, "not proper HTTP"),
        ("/bad-gzip", FetchError, "cannot be undone"),
        ("/many-gzips", FetchError, "packed in more than 1000 pieces"),
        ("/brotli", FetchError, "which was not asked for"),
    ],
)
def test_a_bad_answer_is_an_error_that_says_what_was_met(bad_site, path, error, said):
    with pytest.raises(error, match=said):
        get(bad_site, path)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chunked", b"<p>one two three"),
        ("/gzip", b"<title>Hello</title><p>Hello there"),
        ("/two-gzips", b"<p>one two"),
        ("/deflate", b"<title>Hello</title><p>Hello there"),
        ("/raw-deflate", b"<title>Hello</title><p>Hello there"),
        ("/to-unicode", b"<p>umlaut"),
        ("/empty", b""),
    ],
)
def test_what_servers_may_do_is_understood(bad_site, path, body):
    fetched = get(bad_site, path)
    assert fetched.body == body and not fetched.is_cut


def test_a_redirect_without_a_place_is_an_answer(bad_site):
    assert get(bad_site, "/to-nowhere").status == 302


@pytest.mark.parametrize("path", ["/endless", "/bomb"])
def test_a_huge_body_is_cut_at_the_bound_without_being_held(bad_site, path):
    tracemalloc.start()
    fetched = get(bad_site, path, limits=FetchLimits(total_s=20, max_bytes=1 << 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fetched.is_cut and len(fetched.body) == 1 << 20
    # The bomb is 256 MiB unpacked.
    assert peak < 24 << 20


def test_a_body_of_countless_pieces_is_cut_and_does_not_hold_the_event_loop(bad_site):
    async def run():
        fetcher = Fetcher(Guard(allowed=[bad_site.address]))
        task = asyncio.create_task(fetcher.get(bad_site.url + "/crumbs", Domains()))
        num_turns = 0
        while not task.done():
            await asyncio.sleep(0)
            num_turns += 1
        return await task, num_turns

    fetched, num_turns = asyncio.run(run())
    assert fetched.is_cut and 10_000 < len(fetched.body) < 20_000 and set(fetched.body) == {ord("a")}
    assert num_turns > 20_000 // 256


def test_endless_headers_before_the_answer_end_with_the_bound(bad_site):
    fetched = get(bad_site, "/endless-1xx", limits=FetchLimits(total_s=20, max_bytes=1000))
    assert fetched.is_cut and fetched.body == b""


def test_the_request_tells_nothing_of_this_machine(bad_site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9/")
    get(bad_site, "/cookie")
    get(bad_site, "/a")
    head = bad_site.last.decode()
    assert f"Host: 127.0.0.1:{bad_site.port}" in head
    names = sorted(line.split(":")[0].lower() for line in head.split("\r\n")[1:] if line)
    assert names == ["accept", "accept-encoding", "accept-language", "connection", "host", "user-agent"]


def test_a_name_is_looked_up_once_so_that_it_cannot_lead_elsewhere_afterwards(bad_site):
    class Rebinding(Names):
        async def look_up(self, host, port):
            found = await super().look_up(host, port)
            # The next look-up would lead to another place.
            self.names = {host: ["10.0.0.1"]}
            return found

    guard = Rebinding({"site.example.org": ["127.0.0.1"]}, bad_site)
    fetched = get(bad_site, bad_site.named("site.example.org") + "/a", guard=guard)
    assert fetched.status == 200 and guard.looked_up == ["site.example.org"]
    assert f"Host: site.example.org:{bad_site.port}".encode() in bad_site.last
    with pytest.raises(RefusedError, match=r"10\.0\.0\.1"):
        get(bad_site, bad_site.named("site.example.org") + "/a", guard=guard)


def test_each_hop_is_checked_against_the_domains(site):
    guard = Names({"good.example.org": ["127.0.0.1"], "evil.example.net": ["127.0.0.1"]}, site)
    site.pages["/go"] = redirect(site.named("evil.example.net") + "/x")
    with pytest.raises(RefusedError, match=r"'evil.example.net' is not among the domains"):
        get(site, site.named("good.example.org") + "/go", guard=guard, domains=Domains.read(["good.example.org"]))
    assert site.asked == ["/go"]


def test_this_machine_under_its_public_address_is_refused(site, monkeypatch):
    monkeypatch.setattr("ossia.tools.web.guard.is_public", lambda address: True)
    guard = Names({"me.example.org": ["127.0.0.1"]})
    monkeypatch.setattr("ossia.tools.web.guard.PORTS", frozenset({site.port}))
    with pytest.raises(RefusedError, match="which is this machine's"):
        get(site, site.named("me.example.org") + "/", guard=guard)
    assert site.asked == []


def test_the_next_address_is_tried_when_one_does_not_answer(site):
    site.pages["/"] = page("here")
    guard = Names({"two.example.org": ["127.0.0.2", "127.0.0.1"]}, site, allowed=[("127.0.0.2", site.port)])
    assert get(site, site.named("two.example.org") + "/", guard=guard).body == b"here"


def test_a_fetch_that_is_cancelled_ends_at_once(bad_site):
    async def run():
        task = asyncio.create_task(Fetcher(Guard(allowed=[bad_site.address])).get(bad_site.url + "/silent", Domains()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


# TLS -----------------------------------------------------------------------------------------------------------------


def _certificate(folder, host):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "site.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return path


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    path = _certificate(tmp_path_factory.mktemp("tls"), "secure.example.org")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(path)
    names = []
    tls.sni_callback = lambda socket, name, context: names.append(name)
    with serving(tls) as site:
        site.pages["/"] = page("<p>secure")
        yield site, ssl.create_default_context(cafile=path), names


def test_a_secure_connection_keeps_the_name_for_sni_and_certificate(secure):
    site, trusting, names = secure
    guard = Names({"secure.example.org": ["127.0.0.1"]}, site)
    fetched = get(site, site.named("secure.example.org") + "/", guard=guard, tls=trusting)
    assert fetched.body == b"<p>secure" and names[-1] == "secure.example.org"


@pytest.mark.parametrize("host", ["secure.example.org", "other.example.org"])
def test_a_bad_certificate_is_refused(secure, host):
    site, trusting, _ = secure
    guard = Names({host: ["127.0.0.1"]}, site)
    # One is not trusted; the other is trusted and of another host.
    tls = None if host == "secure.example.org" else trusting
    with pytest.raises(FetchError, match="certificate is not valid"):
        get(site, site.named(host) + "/", guard=guard, tls=tls)


# A service of the operator's -----------------------------------------------------------------------------------------


def test_a_client_of_a_service_follows_no_redirect_and_tells_no_key(site):
    client = JsonClient(site.url, {"x-api-key": "sk-very-secret"}, name="exa")
    site.pages["/search"] = redirect("http://169.254.169.254/")
    with pytest.raises(FetchError, match="exa answered with status 302"):
        asyncio.run(client.post("/search", {"query": "q"}))
    site.pages["/search"] = page("no such key: sk-very-secret", status="401 Unauthorized")
    with pytest.raises(OssiaError) as met:
        asyncio.run(client.post("/search", {"query": "q"}))
    assert "sk-very-secret" not in met.value.message and "***" in met.value.message
    assert b"x-api-key: sk-very-secret" in site.last


def test_a_service_that_is_busy_is_asked_once_more(site):
    client = JsonClient(site.url, {}, name="brave")
    answers = [page("{}", status="503 Busy"), page(json.dumps({"ok": 1}), "application/json")]

    async def in_turn(writer):
        writer.write(answers.pop(0))

    site.pages["/x"] = in_turn
    assert asyncio.run(client.get("/x", {"q": "a b"})) == {"ok": 1}
    assert site.asked == ["/x?q=a+b", "/x?q=a+b"]


@pytest.mark.parametrize("body", ["<html>", "", "[" * 100_000])
def test_what_is_no_json_is_an_error(site, body):
    site.pages["/x"] = page(body)
    with pytest.raises(FetchError, match="did not answer in JSON"):
        asyncio.run(JsonClient(site.url, {}, name="exa").get("/x", {}))
