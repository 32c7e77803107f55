"""A gateway is killed at each of its fault points (thaw-runtime's src/points.rs) and started again: the real gateway, database, files
and runtime; only monitors are played, by the bench's that answers at once. And what else ends well: no descriptors, no disk."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from conftest import ROLE, ROOT, Gateway, zip_of

RELEASE = ROOT / "target/release"
GATEWAY = RELEASE / "examples/faulty-gateway"
POINTS = subprocess.run([GATEWAY, "--points"], capture_output=True, text=True, check=True).stdout.split()
CODE = {"ZipFile": zip_of(app="def handler(e, c): return e")}
EVENT = b'{"a": 1}'


class Sink:
    """A destination: ids of the events whose records came."""

    def __init__(self):
        ids = self.ids = set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                record = json.loads(self.rfile.read(int(self.headers["content-length"])))
                ids.add(record["requestContext"]["requestId"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Mortal(Gateway):
    """A gateway that can be told where to die, and what it has acknowledged."""

    def __init__(self, home):
        super().__init__(home)
        self.trigger, self.vmm, self.environment = self.home / "trigger", self.home / "thaw-vmm", {}
        shutil.copy(RELEASE / "thaw-bench", self.vmm)
        self.sink = Sink()
        # Of each function: the sizes that it may have, versions, and what its alias names.
        self.functions, self.layers, self.keys, self.events, self.gone = {}, set(), set(), set(), set()

    def launch(self):
        command = [GATEWAY, "--home", self.home, "--port", str(self.port), "--vmm", self.vmm]
        command += ["--agent", RELEASE / "guest/thaw-agent", "--trigger", self.trigger]
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=os.environ | self.environment)

    def start(self):
        self.launch()
        return self.until_served()

    def until_served(self):
        until(lambda: self.is_dead() or self.is_healthy(), "the gateway serves")
        assert not self.is_dead(), (self.home / "log").read_text()[-3000:]
        self.lambda_ = self.client()
        return self

    def is_healthy(self):
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False

    def is_dead(self):
        return self.process.poll() is not None

    def monitors(self):
        """Process ids of all monitors, whosever they are."""
        found = set()
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cmdline").read_bytes().split(b"\0")[0] == str(self.vmm).encode():
                    found.add(int(entry.name))
            except OSError:
                pass
        return found

    def create(self, name, until_settled=True, **more):
        self.gone.discard(name)
        arguments = dict(FunctionName=name, Runtime="python3.11", Handler="app.handler", Role=ROLE, Timeout=30, Code=CODE)
        self.lambda_.create_function(**(arguments | more))
        self.functions[name] = {"memory": {128}, "versions": set(), "alias": None}
        if until_settled:
            self.settled(name)

    def settled(self, name, **which):
        def is_settled():
            found = self.lambda_.get_function_configuration(FunctionName=name, **which)
            states = (found["State"], found.get("LastUpdateStatus"))
            assert "Failed" not in states, found
            return states == ("Active", "Successful")

        until(is_settled, f"{name} is deployed")

    def send_event(self, name):
        sent = self.lambda_.invoke(FunctionName=name, InvocationType="Event", Payload=EVENT)
        self.events.add(sent["ResponseMetadata"]["RequestId"])

    def publish(self, name):
        version = self.lambda_.publish_version(FunctionName=name)["Version"]
        self.functions[name]["versions"].add(version)
        return version

    def delete(self, name):
        """Not acknowledged, it may be there or not."""
        self.functions.pop(name, None)
        self.lambda_.delete_function(FunctionName=name)
        self.gone.add(name)

    def work(self, number):
        """One of each thing that a client can change, each noted when it is acknowledged."""
        client, name = self.lambda_, f"f{number}"
        layer = client.publish_layer_version(LayerName=f"layer{number}", Content=CODE)
        self.layers.add((f"layer{number}", 1))
        key = json.loads(self.get("/thaw/v1/keys", b'{"allow": "invoke"}', {"content-type": "application/json"})[2])
        self.keys.add(key["access_key_id"])
        self.create(name, Layers=[layer["LayerVersionArn"]])
        for _ in range(2):
            assert client.invoke(FunctionName=name, Payload=EVENT)["Payload"].read() == EVENT
        on_success = {"OnSuccess": {"Destination": self.sink.url}}
        client.put_function_event_invoke_config(FunctionName=name, DestinationConfig=on_success)
        for _ in range(3):
            self.send_event(name)
        one = self.publish(name)
        client.create_alias(FunctionName=name, Name="live", FunctionVersion=one)
        self.functions[name]["alias"] = one
        memory = 129 + number  # another base, and shells of its size
        self.functions[name]["memory"].add(memory)
        client.update_function_configuration(FunctionName=name, MemorySize=memory)
        self.functions[name]["memory"] = {memory}
        self.settled(name)
        client.update_function_code(FunctionName=name, ZipFile=zip_of(app=f"# {number}"))
        self.settled(name)
        two = self.publish(name)
        self.functions[name]["versions"].discard(two)
        client.delete_function(FunctionName=name, Qualifier=two)
        self.layers.discard((f"layer{number}", 1))
        client.delete_layer_version(LayerName=f"layer{number}", VersionNumber=1)
        self.create("brief")
        self.delete("brief")
        until(lambda: self.events <= self.sink.ids, "all events run")

    def plant(self):
        """What crashes leave, and a base that nothing differs from: all of it is to go."""
        unused, left = self.home / "bases/unused", self.home / "functions/nobody/1"
        build = self.home / "staging/build-dead"
        for folder in (unused, left, build):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "file").write_text("left")
        return [unused, left.parent, build]

    def check(self):
        """What was acknowledged is there and works, and nothing else is left of a crash."""
        client = self.lambda_
        there = {function["FunctionName"] for function in client.list_functions()["Functions"]}
        assert set(self.functions) <= there and not self.gone & there, (self.functions, self.gone, there)
        for name in there:
            self.settled(name)
            known = self.functions.get(name, {"memory": {128}, "versions": set(), "alias": None})
            found = client.get_function_configuration(FunctionName=name)
            assert found["MemorySize"] in known["memory"] or name not in self.functions, (found, known)
            listed = client.list_versions_by_function(FunctionName=name)["Versions"]
            versions = {version["Version"] for version in listed} - {"$LATEST"}
            assert known["versions"] <= versions, (known, versions)
            if known["alias"]:
                alias = client.get_alias(FunctionName=name, Name="live")
                assert alias["FunctionVersion"] == known["alias"]
            for which in [{}, *({"Qualifier": version} for version in versions)]:
                assert client.invoke(FunctionName=name, Payload=EVENT, **which)["Payload"].read() == EVENT
                self.settled(name, **which)
        layers = {(layer["LayerName"], layer["LatestMatchingVersion"]["Version"]) for layer in client.list_layers()["Layers"]}
        assert self.layers <= layers, (self.layers, layers)
        keys = json.loads(self.get("/thaw/v1/keys")[2])["keys"]
        assert self.keys <= {key["access_key_id"] for key in keys}, (self.keys, keys)
        until(lambda: self.events <= self.sink.ids, "each acknowledged event runs")
        until(lambda: self.leftovers() == [], lambda: f"these go: {self.leftovers()}")
        return there

    def leftovers(self):
        client, found = self.lambda_, []
        for folder in ("functions", "layers", "bases", "staging"):
            for path in (self.home / folder).rglob("*"):
                name = path.name
                is_scratch = folder == "staging" and path.is_dir()
                if is_scratch or name.endswith((".tmp", ".partial", ".pending")) or name.startswith(".") or "thaw-tmp" in name:
                    found.append(path)
        functions = {function["FunctionName"] for function in client.list_functions()["Functions"]}
        for folder in (self.home / "functions").iterdir():
            revisions = [path for path in folder.iterdir() if path.is_dir()]
            versions = client.list_versions_by_function(FunctionName=folder.name)["Versions"] if folder.name in functions else []
            found += revisions if len(revisions) != len(versions) else []
        layers = {layer["LayerName"] for layer in client.list_layers()["Layers"]}
        for folder in (self.home / "layers").glob("*"):
            # One whose only version was deleted keeps its number, and its folder.
            found += [] if folder.name in layers else list(folder.iterdir())
        return found


def until(is_so, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def mortal(home, tmp_path_factory):
    own = tmp_path_factory.mktemp("mortal")
    for folder in ("images", "initramfs", "kernel", "overlay"):
        if (home / folder).exists():
            shutil.copytree(home / folder, own / folder, symlinks=True, copy_function=link_or_copy)
    gateway = Mortal(own)
    gateway.launch()
    try:
        gateway.until_served()
        gateway.create("kept")
        gateway.publish("kept")
        yield gateway
        assert gateway.stop() == 0
        until(lambda: not gateway.monitors(), "no monitor outlives its gateway")
    finally:
        gateway.process.kill()


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.mark.parametrize("point", POINTS)
def test_what_was_acknowledged_survives_a_kill_and_nothing_stays_behind(mortal, point):
    if mortal.is_dead():  # an earlier one failed
        mortal.trigger.unlink(missing_ok=True)
        mortal.start()
    number = POINTS.index(point)
    mortal.trigger.write_text(point)
    try:
        if point.startswith("gc."):
            mortal.create(f"f{number}")
        else:
            mortal.work(number)
            until(mortal.is_dead, f"{point} is reached", 15)
    except (BotoCoreError, OSError):
        until(mortal.is_dead, "it does not answer, and lives", 15)
    if point.startswith("gc."):
        assert not mortal.is_dead()
        mortal.process.kill()
        mortal.process.wait()
        planted = mortal.plant()
        mortal.launch()
        until(mortal.is_dead, f"{point} is reached")
    else:
        planted = mortal.plant()
    assert mortal.process.returncode == -signal.SIGKILL
    until(lambda: not mortal.monitors(), "no monitor outlives its gateway")
    mortal.trigger.unlink()
    mortal.start()
    assert [path for path in planted if path.exists()] == []
    there = mortal.check()
    for name in there - {"kept"}:
        mortal.delete(name)
    until(lambda: not any((mortal.home / "functions" / name).exists() for name in there - {"kept"}), "their files go")


def invoke_over(connection, name):
    connection.request("POST", f"/2015-03-31/functions/{name}/invocations", EVENT)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_gateway_without_descriptors_serves_who_is_connected_and_recovers(mortal):
    process = mortal.process.pid
    connected = http.client.HTTPConnection("127.0.0.1", mortal.port, timeout=60)
    assert invoke_over(connected, "kept") == (200, EVENT)
    open_now = len(os.listdir(f"/proc/{process}/fd"))
    usual = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (open_now + 2, usual[1]))
    try:
        silent = [socket.create_connection(("127.0.0.1", mortal.port)) for _ in range(16)]
        for _ in range(20):  # sandboxes can be neither rewound nor made
            status, _ = invoke_over(connected, "kept")
            assert status in (200, 429, 500, 502, 503), status
        assert not mortal.is_dead()
        for connection in silent:
            connection.close()
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, usual)

    def answers():
        try:
            return mortal.get("/2015-03-31/functions/kept/invocations", EVENT)[::2] == (200, EVENT)
        except OSError:
            return False

    until(answers, "it recovers")


@contextlib.contextmanager
def limit_of_processes(process):
    """A function that sets how many processes and threads a process and its children may be, by a cgroup of their own."""
    hierarchy = pathlib.Path("/sys/fs/cgroup")
    version_one = (hierarchy / "pids").is_dir()
    folder = hierarchy / ("pids" if version_one else ".") / f"thaw-test-{process}"
    root = [] if os.geteuid() == 0 else ["sudo"]

    def write(file, value):
        subprocess.run([*root, "tee", file], input=str(value), text=True, stdout=subprocess.DEVNULL, check=True)

    if not version_one:
        write(hierarchy / "cgroup.subtree_control", "+pids")
    subprocess.run([*root, "mkdir", folder], check=True)
    try:
        write(folder / "cgroup.procs", process)
        yield lambda most: write(folder / "pids.max", most)
    finally:
        write(folder / "pids.max", "max")

        def is_gone():
            for pid in (folder / "cgroup.procs").read_text().split():
                subprocess.run([*root, "tee", folder.parent / "cgroup.procs"], input=pid, text=True, capture_output=True)
            return subprocess.run([*root, "rmdir", folder], capture_output=True).returncode == 0

        until(is_gone, f"nothing is left in {folder}")


def test_a_gateway_that_may_make_no_process_answers_and_recovers(mortal):
    connected = http.client.HTTPConnection("127.0.0.1", mortal.port, timeout=60)
    assert invoke_over(connected, "kept") == (200, EVENT)
    with limit_of_processes(mortal.process.pid) as limit:
        assert invoke_over(connected, "kept") == (200, EVENT)
        limit(1)
        for monitor in mortal.monitors():
            os.kill(monitor, signal.SIGKILL)
        answers = [invoke_over(connected, "kept") for _ in range(10)]  # none but new monitors can
        assert any(status != 200 for status, _ in answers), answers
        for status, body in answers:
            assert (status, body) == (200, EVENT) or (status in (429, 500, 502, 503) and json.loads(body)), (status, body)
        assert not mortal.is_dead()
        assert mortal.get("/healthz")[0] == 200
        limit("max")
        until(lambda: invoke_over(connected, "kept") == (200, EVENT), "it recovers")


def test_a_full_disk_refuses_what_it_cannot_keep_and_loses_nothing(home, tmp_path):
    root = [] if os.geteuid() == 0 else ["sudo"]
    options = f"size=96m,mode=700,uid={os.geteuid()},gid={os.getegid()}"
    subprocess.run([*root, "mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=True)
    for folder in ("images", "initramfs", "kernel", "overlay"):
        (tmp_path / folder).symlink_to(home / folder)
    gateway = Mortal(tmp_path)
    gateway.launch()
    try:
        gateway.until_served()
        gateway.create("f")
        to = {"OnSuccess": {"Destination": gateway.sink.url}}
        gateway.lambda_.put_function_event_invoke_config(FunctionName="f", DestinationConfig=to)
        for _ in range(3):
            gateway.send_event("f")
        with open(tmp_path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(1 << 16))
        large = json.dumps("x" * 200_000).encode()
        with pytest.raises(ClientError) as refused:
            for _ in range(100):
                sent = gateway.lambda_.invoke(FunctionName="f", InvocationType="Event", Payload=large)
                gateway.events.add(sent["ResponseMetadata"]["RequestId"])
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
        with pytest.raises(ClientError):
            gateway.create("too-much", Code={"ZipFile": zip_of(app="#" + os.urandom(1 << 20).hex())})
        assert gateway.lambda_.invoke(FunctionName="f", Payload=EVENT)["Payload"].read() == EVENT
        (tmp_path / "filler").unlink()
        gateway.send_event("f")
        until(lambda: gateway.events <= gateway.sink.ids, "each acknowledged event runs")
        gateway.process.kill()
        gateway.process.wait()
        gateway.functions.pop("too-much", None)
        gateway.start().check()
        assert gateway.stop() == 0
    finally:
        gateway.process.kill()
        subprocess.run([*root, "umount", "-l", tmp_path], check=True)
