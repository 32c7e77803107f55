"""Mixed load on a gateway of its own, with faults among it, for as long as is asked: is any answer wrong, and is anything left?

    thaw lab --writable DIR -- python3 loadtest/soak/soak.py --thaw target/release/thaw --home DIR/home --minutes 30   (as root)

or without `thaw lab --` on a machine whose own KVM is good. DIR/home holds a home's images already, or they are made. Standard library alone.

Every answer carries a digest of its request and a nonce that its VM drew. An answer with another digest, a nonce that was seen before, or one that comes
from a VM in which something ran before, is *wrong*, and one is too many. An answer that says that it failed, or a connection that breaks, while something is
being killed, is a *failure*: counted, and told apart by whether a fault had been injected within the seconds before. What the gateway and its monitors hold
is written down every few seconds (soak.csv, soak.svg); at the end, when the load is over, it must be what it was before.
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

FUNCTION = '''
import hashlib, json, os, secrets, time
seen = 0

def handler(event, context):
    global seen
    seen += 1
    if event.get("raise"):
        raise ValueError(event["raise"])
    if event.get("sleep"):
        time.sleep(event["sleep"])
    if event.get("write"):
        with open("/tmp/litter", "ab") as file:
            assert file.tell() == 0, "somebody was here"
            file.write(os.urandom(event["write"]))
    data = event.get("data", "")
    return {"digest": hashlib.sha256(data.encode()).hexdigest(), "nonce": secrets.token_hex(16), "seen": seen}
'''
# After a fault, failures are its own for so long: a killed gateway opens its pools anew, a stopped monitor meets its function's time.
FAULT_SECONDS = 45
FUNCTIONS = ("soak-a", "soak-b", "soak-large")
SAMPLE_SECONDS = 5
# What may differ at the end from what was before the load: logs, the database's own free pages, an allocator's.
GROWTH = {"gateway_rss_kib": 40_000, "gateway_fds": 16, "monitors": 0, "cgroups": 0, "net_namespaces": 0, "disk_kib": 60_000}


def zip_of(code):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("app.py", code)
    return out.getvalue()


def processes(name):
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if pathlib.Path(f"/proc/{entry}/comm").read_text().strip() == name:
                    yield int(entry)
            except OSError:
                pass


class Gateway:
    def __init__(self, options):
        self.options, self.port, self.process = options, free_port(), None
        self.lock = threading.Lock()

    def start(self):
        command = [self.options.thaw, "--home", self.options.home, "up", "--in-lab", "--listen", f"127.0.0.1:{self.port}", "--keep-alive", "20"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 300
        while self.ask("GET", "/healthz")[0] != 200:
            assert self.process.poll() is None, "the gateway ended"
            assert time.monotonic() < deadline, "the gateway does not serve"
            time.sleep(0.2)

    def ask(self, method, path, body=None, headers=None, timeout=120):
        """Status and body; 0 where there is no answer."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode(), {}
        finally:
            connection.close()

    def json(self, method, path, document):
        status, body, _ = self.ask(method, path, json.dumps(document), {"content-type": "application/json"})
        assert 200 <= status < 300, (path, status, body)
        return json.loads(body)

    def deploy(self, name, code):
        zipped = base64.b64encode(zip_of(code)).decode()
        if self.ask("GET", f"/2015-03-31/functions/{name}")[0] == 200:
            self.json("PUT", f"/2015-03-31/functions/{name}/code", {"ZipFile": zipped})
        else:
            memory = 256 if name.endswith("large") else 128
            document = {
                "FunctionName": name, "Runtime": "python3.11", "Handler": "app.handler", "Role": "arn:aws:iam::000000000000:role/soak",
                "Code": {"ZipFile": zipped}, "Timeout": 20, "MemorySize": memory, "ThawNetwork": {"allow": ["192.0.2.0/24"]} if name.endswith("b") else {},
            }  # fmt: skip
            if name.endswith("b"):
                document["ThawNetwork"] = {"allow": [{"cidr": "192.0.2.0/24"}]}
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


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.nonces, self.wrong, self.unexplained = set(), [], []
        self.last_fault, self.faults = 0.0, collections.Counter()

    def fault(self, kind):
        with self.lock:
            self.last_fault = time.monotonic()
            self.faults[kind] += 1

    def right(self, nonce, request):
        with self.lock:
            if nonce in self.nonces:
                self.wrong.append(f"nonce {nonce} came twice: {request}")
            self.nonces.add(nonce)
            self.counts["right"] += 1

    def failed(self, what, began):
        with self.lock:
            if began - self.last_fault < FAULT_SECONDS or time.monotonic() - self.last_fault < FAULT_SECONDS:
                self.counts["failed beside a fault"] += 1
            else:
                self.counts["failed without a fault"] += 1
                self.unexplained.append(what)

    def bad(self, what):
        with self.lock:
            self.wrong.append(what)


def client(gateway, tally, seed, stop):
    dice = random.Random(seed)
    while not stop.is_set():
        name = dice.choices(FUNCTIONS, (6, 3, 1))[0]
        kind = dice.choices(("plain", "big", "raise", "sleep", "write"), (60, 8, 10, 12, 10))[0]
        data = dice.randbytes(400_000 if kind == "big" else dice.randrange(200)).hex()
        event = {"data": data}
        if kind == "raise":
            event["raise"] = data[:40] or "nothing"
        if kind == "sleep":
            event["sleep"] = dice.uniform(0.05, 1.0)
        if kind == "write":
            event["write"] = dice.randrange(1, 3_000_000)
        began = time.monotonic()
        path = f"/2015-03-31/functions/{name}/invocations"
        status, body, headers = gateway.ask("POST", path, json.dumps(event))
        told = f"{name} {kind}: {status} {body[:200]!r}"
        if status != 200:
            tally.failed(told, began)
            time.sleep(dice.uniform(0.05, 0.5))
            continue
        answer = json.loads(body)
        if error := headers.get("x-amz-function-error") or headers.get("X-Amz-Function-Error"):
            if kind == "raise" and answer.get("errorMessage") == event["raise"]:
                tally.right(f"error {began} {seed}", told)
            elif kind != "raise" and answer.get("errorType") == "ValueError" or "somebody was here" in str(answer):
                tally.bad(told)
            else:  # a killed monitor, a function's time
                tally.failed(f"{told} {error}", began)
            continue
        if answer["digest"] != hashlib.sha256(data.encode()).hexdigest() or answer["seen"] != 1 or kind == "raise":
            tally.bad(told)
        tally.right(answer["nonce"], told)


def inject(gateway, tally, dice, stop, pause):
    """Faults, one after another, until the end."""
    revision = 0
    while not stop.wait(dice.uniform(0.5 * pause, 1.5 * pause)):
        kind = dice.choices(("kill a monitor", "stop a monitor", "kill the network", "deploy again", "kill the gateway"), (10, 4, 2, 3, 2))[0]
        tally.fault(kind)
        if kind == "deploy again":
            revision += 1
            try:
                gateway.deploy(dice.choice(FUNCTIONS[:2]), FUNCTION + f"# {revision}\n")
            except AssertionError as error:
                tally.bad(f"deploy: {error}")
            tally.fault("deployed")
            continue
        if kind == "kill the gateway":
            gateway.process.kill()
            gateway.process.wait()
            gateway.start()
            tally.fault("gateway is back")
            continue
        name, number = ("thaw-egress", signal.SIGKILL) if kind == "kill the network" else ("thaw-vmm", signal.SIGKILL)
        if kind == "stop a monitor":
            number = signal.SIGSTOP
        if found := list(processes(name)):
            try:
                os.kill(dice.choice(found), number)
            except ProcessLookupError:
                pass


def sample(gateway, home):
    """What there is now."""
    monitors = list(processes("thaw-vmm"))
    pid = gateway.process.pid
    proc = pathlib.Path(f"/proc/{pid}")
    try:
        rss = next(int(line.split()[1]) for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
        fds = len(list((proc / "fd").iterdir()))
    except OSError:
        rss, fds = 0, 0
    namespaces = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                namespaces.add(os.readlink(f"/proc/{entry}/ns/net"))
            except OSError:
                pass
    trees = pathlib.Path("/sys/fs/cgroup").glob("thaw-*/vm-*")
    disk = subprocess.run(["du", "-sk", home], capture_output=True, text=True).stdout.split()
    return {
        "gateway_rss_kib": rss, "gateway_fds": fds, "monitors": len(monitors), "cgroups": len(list(trees)),
        "net_namespaces": len(namespaces), "disk_kib": int(disk[0]) if disk else 0,
    }  # fmt: skip


def settled_sample(gateway, home):
    """When what was made for the load is gone: a keep-alive of 20 s lasts 40 at most."""
    time.sleep(60)
    return sample(gateway, home)


def draw(rows, path):
    """One line for each column, each in a band of its own."""
    columns = [name for name in rows[0] if name != "seconds"]
    band, width, left = 110, 900, 190
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{band * len(columns) + 30}" font-family="sans-serif" font-size="12">']
    end = max(row["seconds"] for row in rows) or 1
    for place, name in enumerate(columns):
        values = [row[name] for row in rows]
        top, most = place * band + 20, max(max(values), 1)
        points = " ".join(f"{left + width * row['seconds'] / end:.1f},{top + 80 - 76 * row[name] / most:.1f}" for row in rows)
        parts.append(f'<text x="8" y="{top + 40}">{name}</text><text x="8" y="{top + 56}" fill="#666">at most {most}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="82" fill="none" stroke="#ddd"/><polyline points="{points}" fill="none" stroke="#06c"/>')
    parts.append(f'<text x="{left}" y="{band * len(columns) + 20}">0 to {end / 60:.0f} minutes</text></svg>')
    path.write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thaw", required=True, help="the program")
    parser.add_argument("--home", required=True, type=pathlib.Path, help="a state folder of the soak's own")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=60, help="seconds between two faults, on the average")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    gateway, tally, stop = Gateway(options), Tally(), threading.Event()
    gateway.start()
    for name in FUNCTIONS:
        gateway.deploy(name, FUNCTION)
        assert gateway.ask("POST", f"/2015-03-31/functions/{name}/invocations", "{}")[0] == 200
    before = settled_sample(gateway, options.home)
    print("before:", before, flush=True)
    rows, began = [], time.monotonic()
    threads = [threading.Thread(target=client, args=(gateway, tally, options.seed * 1000 + n, stop)) for n in range(options.clients)]
    calm = threading.Event()
    faults = threading.Thread(target=inject, args=(gateway, tally, random.Random(options.seed), calm, options.pause))
    for thread in [*threads, faults]:
        thread.start()
    while (now := time.monotonic() - began) < options.minutes * 60:
        rows.append({"seconds": round(now), **sample(gateway, options.home), "right": tally.counts["right"]})
        if len(rows) % 12 == 0:
            print(f"{now / 60:.0f} min:", dict(tally.counts), dict(tally.faults), rows[-1], flush=True)
        time.sleep(SAMPLE_SECONDS)
    calm.set()
    faults.join()
    stop.set()
    for thread in threads:
        thread.join()
    # A monitor that was stopped while it was idle is found by the watchdog.
    time.sleep(60)
    after = settled_sample(gateway, options.home)
    gateway.process.send_signal(signal.SIGTERM)
    ended = gateway.process.wait(timeout=120)
    left = {"monitors": list(processes("thaw-vmm")), "egress": list(processes("thaw-egress"))}
    with open(options.home.parent / "soak.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.home.parent / "soak.svg")
    grown = {name: (before[name], after[name]) for name, most in GROWTH.items() if after[name] > before[name] + most}
    print("after:", after)
    print("answers:", dict(tally.counts), "faults:", dict(tally.faults), "nonces:", len(tally.nonces))
    print("failures without a fault:", tally.unexplained[:20])
    print("wrong:", tally.wrong[:20])
    print("grown:", grown, "left:", left, "gateway ended with", ended)
    return 1 if tally.wrong or tally.unexplained or grown or any(left.values()) or ended else 0


if __name__ == "__main__":
    sys.exit(main())
