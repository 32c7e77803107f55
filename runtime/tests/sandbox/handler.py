"""A function that does what its event says, for runtime/tests/sandbox.rs."""

import os
import random
import socket
import time
import uuid

calls = 0


def network():
    def read(path):
        with open(path) as file:
            return file.read()

    source = {}
    for peer in ("172.31.255.1", "192.0.2.1"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            source[peer] = probe.getsockname()[0]
    return {
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "mac": read("/sys/class/net/eth0/address").strip(),
        "mtu": read("/sys/class/net/eth0/mtu").strip(),
        "neighbours": read("/proc/net/arp").splitlines()[1:],
        "ipv6": [line.split()[-1] for line in read("/proc/net/if_inet6").splitlines()],
        "resolver": read("/etc/resolv.conf"),
        "source": source,
    }


def handler(event, context):
    global calls
    calls += 1
    act = event["do"]
    print("doing", act, flush=True)
    if act == "greet":
        return {"hello": event["name"], "request": context.aws_request_id, "calls": calls}
    if act == "echo":
        return event
    if act == "identify":
        return {
            "host": socket.gethostname(),
            "uuid": str(uuid.uuid4()),
            "urandom": os.urandom(16).hex(),
            "time": time.time(),
            "remaining_ms": context.get_remaining_time_in_millis(),
        }
    if act == "network":
        return network()
    if act == "write":
        with open("/tmp/mark", "x") as file:
            file.write("used")
        return os.listdir("/tmp")
    if act == "raise":
        raise ValueError("as asked")
    if act == "exit":
        os._exit(3)
    if act == "sleep":
        time.sleep(3600)
    if act == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(4096)) * 256)
    raise KeyError(act)
