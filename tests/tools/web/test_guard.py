from __future__ import annotations

import asyncio
import ipaddress

import pytest
from tests.tools.web.addresses import NOT_PUBLIC, PUBLIC
from tests.tools.web.site import Names

from ossia.tools.web.fetch import Fetcher
from ossia.tools.web.guard import Domains, Guard, RefusedError, is_public, read_url

# URLs that must not be asked for, whatever a resolver says: it knows the names below, and says they are private.
HOSTILE = [
    "http://127.0.0.1/",
    "http://127.0.0.1:80/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://localhost.localdomain/",
    "http://127.1/",
    "http://127.0.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://0x7F.1/",
    "http://127.0.0.1./",
    "http://127.000.000.001/",
    "http://0/",
    "http://0.0.0.0/",
    "http://1/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.1/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.7/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://192.88.99.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:8.8.8.8]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::808:808]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:53aa:64c::1]/",
    "http://[2001:db8::1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[fec0::1]/",
    "http://[100::1]/",
    "http://[2600:1900::5efe:7f00:1]/",
    "http://[3fff::1]/",
    "http://127。0。0。1/",
    "http://１２７.０.０.１/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127．0．0．1/",
    "http://loc\xadalhost/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "http://user:pass@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1@example.com/",
    "http://@example.com/",
    "http://example.com:22/",
    "http://example.com:8080/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:-80/",
    "http://example.com:٨٠/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_x",
    "data:text/html,x",
    "javascript:alert(1)",
    "dict://127.0.0.1:11211/",
    "ldap://127.0.0.1/",
    "jar:http://example.com!/",
    "about:blank",
    "//example.com/",
    "example.com",
    "http://",
    "http:///",
    "http:example.com",
    "http://?x",
    "http://.com/",
    "http://-example.com/",
    "http://exa$mple.com/",
    "http://example..com/",
    "http://[::1",
    "http://::1/",
    "http://[v1.a]/",
    "http://metadata.google.internal/",
    "http://router/",
    "http://printer.local/",
    "http://nas.lan/",
    "http://x.home.arpa/",
    "http://foo.onion/",
    "http://secret.internal./",
    "http://private.site.org/",
    "http://both.site.org/",
    "http://mapped.site.org/",
    "http://nat64.site.org/",
    "http://unknown.site.org/",
    "http://link.site.org/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\t/",
    "http://exa mple.com/",
    "http://example.com/\r\nHost: x",
    "http://example.com\x00.evil.org/",
    "http://\u200b127.0.0.1/",
    "http://" + "a" * 64 + ".org/",
    "http://" + "a." * 150 + "org/",
    "http://example.com/" + "a" * 9000,
    "http://example.com/\ud800",
    "",
    " ",
]

NAMES = {
    "private.site.org": ["10.1.2.3"],
    # One good address does not make up for a bad one.
    "both.site.org": ["93.184.216.34", "192.168.0.7"],
    "mapped.site.org": ["::ffff:169.254.169.254"],
    "nat64.site.org": ["64:ff9b::a00:1"],
    "link.site.org": ["fe80::1"],
}


def test_there_are_more_than_a_hundred_hostile_urls():
    assert len(set(HOSTILE)) == len(HOSTILE) > 100


@pytest.mark.parametrize(
    "url", HOSTILE, ids=lambda url: url[:40].encode("ascii", "backslashreplace").decode() or "empty"
)
def test_a_hostile_url_is_refused_before_anything_is_connected_to(url, monkeypatch):
    async def connect(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr("ossia.tools.web.fetch._connect", connect)
    with pytest.raises(RefusedError) as met:
        asyncio.run(Fetcher(Names(NAMES)).get(url, Domains()))
    assert met.value.message


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://Example.COM", "https://example.com/"),
        ("https://example.com:443/a?b=c#d", "https://example.com/a?b=c"),
        ("http://example.com./x", "http://example.com/x"),
        ("http://exämple.com/ü?q=ä", "http://xn--exmple-cua.com/%C3%BC?q=%C3%A4"),
        ("http://93.184.216.34/", "http://93.184.216.34/"),
        ("http://[2606:2800:220:1::1]/", "http://[2606:2800:220:1::1]/"),
        ("https://a_b.example.com/%20/%zz", "https://a_b.example.com/%20/%zz"),
        ("http://example.com:/", "http://example.com/"),
        ("https://example.com/a(b)'c'?x=[1]&y={2}", "https://example.com/a(b)'c'?x=[1]&y={2}"),
    ],
)
def test_an_ordinary_url_is_read_and_escaped(text, read):
    assert str(read_url(text)) == read


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_leads_elsewhere_is_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


def test_an_allowed_address_is_allowed_with_its_port_alone():
    guard = Guard(allowed=[("127.0.0.1", 8080)])
    assert guard.ports == {80, 443, 8080}
    assert asyncio.run(guard.resolve(read_url("http://127.0.0.1:8080/", ports=guard.ports)))
    with pytest.raises(RefusedError, match="not a public one"):
        asyncio.run(guard.resolve(read_url("http://127.0.0.1/", ports=guard.ports)))


@pytest.mark.parametrize(
    ("allowed", "blocked", "host", "is_open"),
    [
        ((), (), "example.com", True),
        (("example.com",), (), "example.com", True),
        (("example.com",), (), "www.example.com", True),
        (("example.com",), (), "badexample.com", False),
        (("example.com",), (), "example.com.evil.org", False),
        (("https://Example.com/path",), (), "example.com", True),
        (("*.example.com",), (), "a.example.com", True),
        (("exämple.com",), (), "xn--exmple-cua.com", True),
        ((), ("example.com",), "www.example.com", False),
        ((), ("example.com",), "example.org", True),
        (("example.com",), ("secret.example.com",), "secret.example.com", False),
        (("", " "), (), "example.org", True),
    ],
)
def test_domains_are_matched_by_whole_labels(allowed, blocked, host, is_open):
    assert Domains.read(allowed, blocked).has(host) is is_open


def test_the_domains_of_a_request_only_narrow_those_of_the_server():
    server = Domains.read(["example.com", "python.org"], ["bad.org"])
    within = server.within(Domains.read(["docs.python.org", "evil.com"]))
    assert within.allowed == ("docs.python.org",) and within.blocked == ("bad.org",)
    assert not server.within(Domains.read(["evil.com"])).has("evil.com")
    assert not server.within(Domains.read(["evil.com"])).has("example.com")
