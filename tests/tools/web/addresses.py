"""Addresses that may be connected to for a stranger, and addresses that may not: one table for whoever connects."""

PUBLIC = (
    "8.8.8.8", "93.184.216.34", "1.1.1.1", "172.32.0.1", "11.0.0.1", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e",
)  # fmt: skip
NOT_PUBLIC = (
    # This network, private, carrier-grade, loopback, link-local with clouds' metadata.
    "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.100.100.200", "127.0.0.1",
    "127.1.2.3", "169.254.169.254", "::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd12::1", "fd00:ec2::254",
    "fec0::1",
    # A cloud's host service, protocol assignments, 6to4 relays.
    "168.63.129.16", "192.0.0.1", "192.0.0.9", "192.0.0.192", "192.88.99.1",
    # Documentation, benchmarks, multicast, reserved, broadcast, discard, segment routing.
    "192.0.2.1", "198.51.100.1", "203.0.113.7", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "2001:db8::1", "3fff::1", "ff02::1", "100::1", "5f00::1",
    # IPv6 with an address of IPv4 in it: mapped, translated, compatible, NAT64, 6to4, Teredo, ISATAP; ORCHID.
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::1", "2001::1", "2001:20::1",
    "2600:1900::5efe:7f00:1", "2600::200:5efe:a00:1",
)  # fmt: skip
