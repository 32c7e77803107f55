"""Mixed load on a gateway of its own, with faults among it, for as long as is asked: is any answer wrong, and is anything left?

    thaw lab --writable DIR -- python3 loadtest/soak/soak.py --thaw target/release/thaw --home DIR/home --minutes 30   (as root)

or without `thaw lab --` on a machine whose own KVM is good. DIR/home holds a home's images already, or they are made. Standard library alone.

Every answer carries a digest of its request, a nonce that its VM drew and the revision of its function. An answer with another digest or an older revision than
was deployed, a nonce that was seen before, or one that comes from a VM in which something ran before, is *wrong*, and one is too many. An answer that says that it
failed, or a connection that breaks, is a *failure*: each fault explains as many as it may cause (a killed monitor one, a deploy none), and one more is too many.
What the gateway and its monitors hold is written down every few seconds (soak.csv, soak.svg). The load pauses twice, half way and at the end: then there must be
no more of anything than before it, and no more memory at the end than half way.
"""

import argparse
import base64
import collections
import csv
import hashlib
import http.client
import io
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

# What each function does; its last line, added at each deploy, is its revision.
FUNCTION = '''
import hashlib, os, secrets, time, urllib.request
seen = 0

def handler(event, context):
    global seen
    seen += 1
    if event.get("raise"):
        raise ValueError(event["raise"])
    time.sleep(event.get("sleep", 0))
    if event.get("write"):
        with open("/tmp/litter", "ab") as file:
            assert file.tell() == 0, "somebody was here"
            file.write(os.urandom(event["write"]))
    data = event.get("data", "")
    if event.get("far"):
        with urllib.request.urlopen(event["far"], data.encode(), timeout=15) as answer:
            digest = answer.read().decode()
    else:
        digest = hashlib.sha256(data.encode()).hexdigest()
    return {"digest": digest, "nonce": secrets.token_hex(16), "seen": seen, "revision": REVISION}
'''
FUNCTIONS = ("soak-a", "soak-large", "soak-network")
NETWORKED = "soak-network"
NETWORK = {"allow": [{"cidr": "192.0.2.0/24"}]}
SAMPLE_SECONDS = 5
# How much more there may be at the end than half way, when allocators are warm, and than before the load (logs, the database's free pages).
GROWTH_OF_MEMORY = {"gateway_rss_kib": 10_000, "egress_rss_kib": 2_000}
GROWTH = {
    "gateway_fds": 4, "egress_fds": 4, "monitors": 0, "processes": 0, "cgroups": 0, "net_namespaces": 0, "mounts": 0, "disk_kib": 30_000,
}  # fmt: skip
# Of a gateway that is idle, the ready sandboxes and what belongs to them, after this long.
SETTLE_SECONDS = 60


def zip_file(code):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("app.py", code)
    return {"ZipFile": base64.b64encode(out.getvalue()).decode()}


def comm(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def processes(name):
    return (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and comm(pid) == name)


class Gateway:
    def __init__(self, options):
        self.options, self.port, self.process = options, free_port(), None
        # Each function's newest revision whose deploy was acknowledged.
        self.revisions = dict.fromkeys(FUNCTIONS, 0)

    def start(self, *more):
        command = [self.options.thaw, "--home", self.options.home, "up", "--listen", f"127.0.0.1:{self.port}", "--keep-alive", "20", *more]
        with open(self.options.home.parent / "gateway.log", "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while self.ask("GET", "/healthz")[0] != 200:
            assert self.process.poll() is None, "the gateway ended"
            assert time.monotonic() < deadline, "the gateway does not serve"
            time.sleep(0.2)

    def ask(self, method, path, body=None, headers=None, timeout=120):
        """Status, body and heads by their names in small letters; status 0 where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode(), {}
        finally:
            connection.close()

    def json(self, method, path, document):
        status, body, _ = self.ask(method, path, json.dumps(document), {"content-type": "application/json"})
        assert 200 <= status < 300, (path, status, body)
        return json.loads(body)

    def deploy(self, name):
        revision = self.revisions[name] + 1
        code = f"{FUNCTION}REVISION = {revision}\n"
        if revision > 1:
            self.json("PUT", f"/2015-03-31/functions/{name}/code", zip_file(code))
            self.settled(name)
        else:
            self.create(name, code, memory=256 if name == "soak-large" else 128, network=NETWORK if name == NETWORKED else None)
        self.revisions[name] = revision

    def create(self, name, code, memory=128, timeout=20, network=None):
        document = {
            "FunctionName": name, "Runtime": "python3.11", "Handler": "app.handler", "Role": "arn:aws:iam::000000000000:role/soak", "Code": zip_file(code),
            "Timeout": timeout, "MemorySize": memory,
        }  # fmt: skip
        if network:
            document["ThawNetwork"] = network
        self.json("POST", "/2015-03-31/functions", document)
        self.settled(name)

    def settled(self, name):
        deadline = time.monotonic() + 300
        while True:
            status, body, _ = self.ask("GET", f"/2015-03-31/functions/{name}/configuration")
            known = json.loads(body) if status == 200 else {}
            if known.get("State") == "Active" and known.get("LastUpdateStatus") != "InProgress":
                return
            assert known.get("State") != "Failed", known
            assert time.monotonic() < deadline, (name, known)
            time.sleep(0.5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fault:
    """Something done to the gateway, and the failures that it may cause: so many, of requests that ran while it lasted."""

    def __init__(self, kind, failures, function=None):
        self.kind, self.left, self.function = kind, failures, function
        self.began, self.ended = time.monotonic(), None

    def over(self):
        self.ended = time.monotonic()

    def explains(self, function, began, ended):
        met = ended >= self.began and (self.ended is None or began <= self.ended + 1)
        return met and self.left > 0 and self.function in (None, function)


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.counts, self.kinds, self.faults = collections.Counter(), collections.Counter(), []
        self.nonces, self.wrong, self.unexplained = set(), [], []

    def fault(self, kind, failures, function=None):
        fault = Fault(kind, failures, function)
        with self.lock:
            self.faults.append(fault)
        return fault

    def right(self, kind, nonce, told):
        with self.lock:
            if nonce in self.nonces:
                self.wrong.append(f"nonce {nonce} came twice: {told}")
            self.nonces.add(nonce)
            self.counts["right"] += 1
            self.kinds[kind] += 1

    def failed(self, told, function, began):
        ended = time.monotonic()
        with self.lock:
            cause = next((fault for fault in self.faults if fault.explains(function, began, ended)), None)
            if cause:
                cause.left -= 1
                self.counts["failed by a fault"] += 1
            else:
                self.counts["failed without a fault"] += 1
                self.unexplained.append(f"{ended - began:.1f} s: {told}")
                print("unexplained:", self.unexplained[-1], flush=True)

    def bad(self, told):
        with self.lock:
            self.wrong.append(told)
        print("wrong:", told, flush=True)

    def summary(self):
        with self.lock:
            return f"{dict(self.counts)}, faults {dict(collections.Counter(fault.kind for fault in self.faults))}"


def event_of(dice, name, world):
    """A request: what kind, and its event."""
    kind = dice.choices(("plain", "big", "raise", "sleep", "write"), (60, 8, 10, 12, 10))[0]
    event = {"data": (dice.randbytes(400_000 if kind == "big" else dice.randrange(200))).hex()}
    if kind == "raise":
        event["raise"] = event["data"][:40] or "nothing"
    if kind == "sleep":
        event["sleep"] = dice.uniform(0.05, 1.0)
    if kind == "write":
        event["write"] = dice.randrange(1, 3_000_000)
    if name == NETWORKED and kind in ("plain", "big"):
        kind, event["far"] = f"far {kind}", world
    return kind, event


def client(gateway, tally, world, seed, stop):
    dice = random.Random(seed)
    while not stop.is_set():
        name = dice.choices(FUNCTIONS, (6, 1, 3))[0]
        kind, event = event_of(dice, name, world)
        began, revision = time.monotonic(), gateway.revisions[name]
        status, body, headers = gateway.ask("POST", f"/2015-03-31/functions/{name}/invocations", json.dumps(event))
        told = f"{name} {kind}: {status} {body[:300]!r}"
        if status != 200:
            tally.failed(told, name, began)
            time.sleep(dice.uniform(0.05, 0.5))
            continue
        answer = json.loads(body)
        if "x-amz-function-error" in headers:
            if kind == "raise" and answer.get("errorMessage") == event["raise"]:
                tally.right(kind, f"raised {seed} {began}", told)
            elif answer.get("errorType") in ("ValueError", "AssertionError"):
                tally.bad(told)
            else:  # a killed monitor, a function's time, a network that went
                tally.failed(told, name, began)
            continue
        digest = hashlib.sha256(event["data"].encode()).hexdigest()
        if kind == "raise" or answer["digest"] != digest or answer["seen"] != 1 or answer["revision"] < revision:
            tally.bad(f"{told}, asked at revision {revision}")
        tally.right(kind, answer["nonce"], told)


def inject(gateway, tally, dice, calm, options, deadly):
    """Faults, one after another, until it is calm; the gateway is killed if this is deadly."""
    began = time.monotonic()
    while not calm.wait(dice.uniform(0.5, 1.5) * options.pause):
        kinds = {"kill a monitor": 10, "stop a monitor": 3, "kill the network": 2, "deploy again": 4, "kill the gateway": 3}
        if not deadly:
            del kinds["kill the gateway"]
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        print(f"{time.monotonic() - began:.0f} s of this half: {kind}", flush=True)
        if kind == "deploy again":
            fault = tally.fault(kind, 0)
            try:
                gateway.deploy(dice.choice(FUNCTIONS))
            except AssertionError as error:
                tally.bad(f"deploy: {error}")
        elif kind == "kill the gateway":
            fault = tally.fault(kind, 1_000_000)
            gateway.process.kill()
            gateway.process.wait()
            gateway.start()
        elif kind == "kill the network":
            fault = tally.fault(kind, 1_000_000, NETWORKED)
            before = kill(dice, "thaw-egress", signal.SIGKILL, every=True)
            wait_until(lambda: set(processes("thaw-egress")) - before, 60)
        else:
            fault = tally.fault(kind, 1)
            chosen = kill(dice, "thaw-vmm", signal.SIGKILL if kind == "kill a monitor" else signal.SIGSTOP)
            # A stopped one ends by its invocation's time or by the watchdog.
            wait_until(lambda: not chosen & set(processes("thaw-vmm")), 180) or tally.bad(f"{chosen} stands for 180 s")
        fault.over()


def kill(dice, name, number, every=False):
    """Whom it was sent to."""
    found = sorted(processes(name))
    chosen = set(found if every else dice.sample(found, min(1, len(found))))
    for pid in chosen:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return chosen


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return held


class World:
    """A network beyond this machine's: a namespace with a server in it that answers with the digest of what it is sent."""

    SERVER = """
import hashlib, http.server
class Digest(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = hashlib.sha256(self.rfile.read(int(self.headers["content-length"]))).hexdigest().encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("192.0.2.2", 80), Digest).serve_forever()
"""

    def __init__(self):
        for command in (
            "netns add soak-world", "link add soak0 type veth peer name soak1 netns soak-world", "addr add 192.0.2.1/24 dev soak0", "link set soak0 up",
            "-n soak-world addr add 192.0.2.2/24 dev soak1", "-n soak-world link set soak1 up",
        ):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True)
        self.process = subprocess.Popen(["ip", "netns", "exec", "soak-world", sys.executable, "-c", self.SERVER])
        self.url = "http://192.0.2.2/"

    def close(self):
        self.process.kill()
        self.process.wait()
        subprocess.run(["ip", "netns", "delete", "soak-world"], check=True)


def of_processes(pids):
    """Resident memory, KiB, and open descriptors of all of them."""
    rss = fds = 0
    for pid in pids:
        proc = pathlib.Path(f"/proc/{pid}")
        try:
            rss += next(int(line.split()[1]) for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
            fds += len(list((proc / "fd").iterdir()))
        except (OSError, StopIteration):
            pass
    return rss, fds


def sample(gateway, home):
    """What there is now."""
    rss, fds = of_processes([gateway.process.pid])
    egress_rss, egress_fds = of_processes(processes("thaw-egress"))
    pids, namespaces = [entry for entry in os.listdir("/proc") if entry.isdigit()], set()
    thaws = [name for name in map(comm, pids) if name.startswith("thaw")]
    for pid in pids:
        try:
            namespaces.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            pass
    # `os.walk` passes over what goes while it looks.
    groups = {name for _, folders, _ in os.walk("/sys/fs/cgroup") for name in folders if name.startswith("vm-")}
    disk = subprocess.run(["du", "-sk", home], capture_output=True, text=True).stdout.split()
    return {
        "gateway_rss_kib": rss, "gateway_fds": fds, "egress_rss_kib": egress_rss, "egress_fds": egress_fds, "monitors": thaws.count("thaw-vmm"),
        "processes": len(thaws), "cgroups": len(groups), "net_namespaces": len(namespaces),
        "mounts": len(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()), "disk_kib": int(disk[0]) if disk else 0,
    }  # fmt: skip


def settled_sample(gateway, home):
    """When what was made for the load is gone: a keep-alive lasts twice its time at most."""
    time.sleep(SETTLE_SECONDS)
    return sample(gateway, home)


def draw(rows, tally, path):
    """One line for each column, each in a band of its own; an upright line for each fault."""
    columns = [name for name in rows[0] if name != "seconds"]
    band, width, left = 110, 900, 190
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{band * len(columns) + 30}" font-family="sans-serif" font-size="12">']
    end = max(row["seconds"] for row in rows) or 1
    for place, name in enumerate(columns):
        values = [row[name] for row in rows]
        top, most = place * band + 20, max(max(values), 1)
        points = " ".join(f"{left + width * row['seconds'] / end:.1f},{top + 80 - 76 * row[name] / most:.1f}" for row in rows)
        parts.append(f'<text x="8" y="{top + 40}">{name}</text><text x="8" y="{top + 56}" fill="#666">at most {most}</text>')
        for fault in tally.faults:
            x, colour = left + width * fault.at / end, "#c00" if fault.kind == "kill the gateway" else "#eba"
            parts.append(f'<path d="M{x:.1f} {top}v82" stroke="{colour}"/>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="82" fill="none" stroke="#ddd"/><polyline points="{points}" fill="none" stroke="#06c"/>')
    parts.append(f'<text x="{left}" y="{band * len(columns) + 20}">0 to {end / 60:.0f} minutes; upright: faults, in red where the gateway was killed</text></svg>')
    path.write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thaw", required=True, help="the program")
    parser.add_argument("--home", required=True, type=pathlib.Path, help="a state folder of the soak's own")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=30, help="seconds between two faults, on the average")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    gateway, tally, world = Gateway(options), Tally(), World()
    gateway.start()
    for name in FUNCTIONS:
        gateway.deploy(name)
        status, body, _ = gateway.ask("POST", f"/2015-03-31/functions/{name}/invocations", json.dumps({"far": world.url} if name == NETWORKED else {}))
        assert status == 200 and b"digest" in body, (name, status, body)
    before = settled_sample(gateway, options.home)
    print("before:", before, flush=True)
    rows, began = [], time.monotonic()
    # The gateway is killed in the first half alone: the second shows one process's memory.
    load(gateway, tally, world, options, rows, began, deadly=True)
    middle = settled_sample(gateway, options.home)
    print("half way:", middle, flush=True)
    load(gateway, tally, world, options, rows, began, deadly=False)
    after = settled_sample(gateway, options.home)
    for fault in tally.faults:
        fault.at = fault.began - began
    gateway.process.send_signal(signal.SIGTERM)
    ended = gateway.process.wait(timeout=120)
    world.close()
    # They end when they hear that it has.
    wait_until(lambda: not list(processes("thaw-egress")), 10)
    left = {name: found for name in ("thaw-vmm", "thaw-egress") if (found := list(processes(name)))}
    with open(options.home.parent / "soak.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, tally, options.home.parent / "soak.svg")
    grown = {name: (before[name], after[name]) for name, most in GROWTH.items() if after[name] > before[name] + most}
    grown |= {name: (middle[name], after[name]) for name, most in GROWTH_OF_MEMORY.items() if after[name] > middle[name] + most}
    print("after:", after)
    print("answers:", tally.summary(), "by kind:", dict(tally.kinds), "nonces:", len(tally.nonces))
    print("failures without a fault:", len(tally.unexplained), tally.unexplained[:20])
    print("wrong:", len(tally.wrong), tally.wrong[:20])
    print("grown:", grown, "left:", left, "gateway ended with", ended)
    return 1 if tally.wrong or tally.unexplained or grown or left or ended else 0


def load(gateway, tally, world, options, rows, began, deadly):
    """Half of the load with its faults; what is sampled meanwhile is added to `rows`."""
    stop, calm = threading.Event(), threading.Event()
    seeds = [f"{options.seed} {deadly} {n}" for n in range(options.clients)]
    threads = [threading.Thread(target=client, args=(gateway, tally, world.url, seed, stop)) for seed in seeds]
    faults = threading.Thread(target=inject, args=(gateway, tally, random.Random(f"{options.seed} {deadly}"), calm, options, deadly))
    for thread in [*threads, faults]:
        thread.daemon = True  # else a defect of the sampling would leave the load for ever
        thread.start()
    end = time.monotonic() + options.minutes * 30
    while (now := time.monotonic()) < end:
        rows.append({"seconds": round(now - began), **sample(gateway, options.home), "right": tally.counts["right"]})
        if len(rows) % 12 == 0:
            print(f"{(now - began) / 60:.0f} min: {tally.summary()}", rows[-1], flush=True)
        time.sleep(SAMPLE_SECONDS)
    calm.set()
    faults.join()
    stop.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
