"""What a clone shares with the other clones of its snapshot, and what it must not: shown on 50 of them.

Each invocation runs in a pristine clone. What has to differ is compared with a control: a value of the same kind that
nobody renews is equal in all clones, or the clones are none."""

import base64
import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT, zip_of
from test_node import RUNTIME, node_zip

CLONES = 50

FUNCTION = """
import ctypes, json, mmap, numpy, os, random, secrets, select, socket, ssl, struct, tempfile, threading, time, uuid
from snapshot_restore_py import register_after_restore, register_before_snapshot

libc = ctypes.CDLL(None, use_errno=True)


def read(path):
    with open(path) as file:
        return file.read().strip()


def ids():
    return {
        "host": socket.gethostname(),
        "machine-id": read("/etc/machine-id"),
        "boot-id": read("/proc/sys/kernel/random/boot_id"),
        "generation": generation[:16].hex(),
    }


def draws():
    # Every generator was used before the freeze, so that its state is in the snapshot.
    return {
        "numpy": numpy.random.random(),
        "random": random.random(),
        "getrandbits": random.getrandbits(128),
        "secrets": secrets.token_hex(16),
        "urandom": os.urandom(16).hex(),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "ssl": ssl.RAND_bytes(16).hex(),
    }


def timer(clock, value, interval=0.0):
    fd = libc.timerfd_create(clock, os.O_NONBLOCK)
    assert fd >= 0
    part = lambda seconds: (int(seconds), int(seconds % 1 * 1e9))
    spec = struct.pack("qqqq", *part(interval), *part(value))
    assert libc.timerfd_settime(fd, 0, spec, None) == 0
    return fd


def expirations(fd):
    try:
        return struct.unpack("Q", os.read(fd, 8))[0]
    except BlockingIOError:
        return 0


def ticks():
    # How often the timer fired, and the least and most time that it had for it.
    least = time.monotonic() - armed[1]
    fired = expirations(tick)
    return fired, least, time.monotonic() - armed[0]


def echo(server):
    peer, _ = server.accept()
    while data := peer.recv(100):
        peer.sendall(data.upper())


generation_file = open(os.environ["THAW_GENERATION_FILE"], "rb")
generation = mmap.mmap(generation_file.fileno(), 16, prot=mmap.PROT_READ)
hooks = []
own = random.Random(1)  # nobody renews it
own.random()
before = {**ids(), **draws()}
started = {"time": time.time(), "monotonic": time.monotonic()}
armed = [time.monotonic()]
tick = timer(1, 0.25, 0.25)  # CLOCK_MONOTONIC = 1, with a period
armed.append(time.monotonic())
distant = timer(1, 3600.0)
slept = threading.Event()
threading.Thread(target=lambda: (time.sleep(3600), slept.set()), daemon=True).start()
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=echo, args=(server,), daemon=True).start()
connection = socket.create_connection(server.getsockname())
written = tempfile.NamedTemporaryFile("w", prefix="init-", delete=False)
written.write("before the freeze")
written.flush()


@register_before_snapshot
def freezing():
    started["frozen"] = time.monotonic()


@register_after_restore
def restored():
    hooks.append(random.random())


def handler(event, context):
    monotonic, wall = time.monotonic(), time.time()
    connection.sendall(b"still here")
    found = sorted(os.listdir("/tmp"))
    with open("/tmp/written-by-a-clone", "x") as file:
        file.write(context.aws_request_id)
    with open(written.name, "a") as file:
        file.write(" and after")
    return {
        "before": before,
        "ids": ids(),
        "draws": draws(),
        "hooks": hooks,
        "own": own.random(),
        "request": context.aws_request_id,
        "left-ms": context.get_remaining_time_in_millis(),
        "wall": wall,
        "wall-since-init": wall - started["time"],
        "since-init": monotonic - started["monotonic"],
        "since-freeze": monotonic - started["frozen"],
        "ticks": ticks(),
        "distant": [expirations(distant), slept.is_set()],
        "echo": connection.recv(100).decode(),
        "tmp": found,
        "kept": open(written.name).read(),
    }
"""


def package(folder):
    """The function with numpy beside it."""
    (folder / "app.py").write_text(FUNCTION)
    wheels = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
    wheels += ["--python-version", "3.11", "-t", folder, "-r", ROOT / "examples/numpy/requirements.txt"]
    subprocess.run(wheels, check=True)
    return pathlib.Path(shutil.make_archive(str(folder.parent / "identity"), "zip", folder)).read_bytes()


@pytest.fixture(scope="module")
def clones(deploy, gateway, tmp_path_factory):
    """What 50 clones of one snapshot say, each with the host's clock before and after."""
    code = package(tmp_path_factory.mktemp("code"))
    name = deploy("identity", code, timeout=60, MemorySize=256)

    def invoke(_):
        asked = time.time()
        answer = client.invoke(FunctionName=name)
        told = json.loads(answer["Payload"].read())
        assert "FunctionError" not in answer, told
        told |= {"start": answer["ResponseMetadata"]["HTTPHeaders"]["x-thaw-start"]}
        return told | {"asked": asked, "answered": time.time(), "id": answer["ResponseMetadata"]["RequestId"]}

    client = gateway.client()
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        return list(clients.map(invoke, range(CLONES)))


def distinct(values):
    return len(set(values)) == CLONES


def test_the_clones_are_of_one_snapshot(clones):
    assert len({json.dumps(clone["before"]) for clone in clones}) == 1
    assert len({clone["own"] for clone in clones}) == 1


def test_rewound_machines_are_among_the_clones(clones):
    assert {clone["start"] for clone in clones} >= {"rewound"}


@pytest.mark.parametrize("what", ["random", "getrandbits", "numpy", "secrets", "urandom", "uuid1", "uuid4", "ssl"])
def test_50_clones_draw_different_random_values(clones, what):
    assert distinct(clone["draws"][what] for clone in clones)
    assert clones[0]["before"][what] not in [clone["draws"][what] for clone in clones]


def test_50_clones_time_based_uuids_name_different_nodes(clones):
    assert distinct(clone["draws"]["uuid1"].rsplit("-", 1)[1] for clone in clones)


@pytest.mark.parametrize("what", ["host", "machine-id", "boot-id", "generation"])
def test_50_clones_have_names_and_ids_of_their_own(clones, what):
    assert distinct(clone["ids"][what] for clone in clones)
    assert clones[0]["before"][what] not in [clone["ids"][what] for clone in clones]


def test_ids_have_the_form_that_programs_expect(clones):
    for clone in clones:
        for ids in (clone["before"], clone["ids"]):
            assert len(ids["machine-id"]) == 32 and int(ids["machine-id"], 16)
            assert len(ids["boot-id"]) == 36 and len(ids["boot-id"].split("-")) == 5
            assert len(ids["generation"]) == 32 and int(ids["generation"], 16)


def test_50_clones_run_the_functions_own_hook_once_and_after_the_reseeding(clones):
    assert all(len(clone["hooks"]) == 1 for clone in clones)
    assert distinct(clone["hooks"][0] for clone in clones)


def test_50_clones_answer_requests_of_their_own(clones):
    assert distinct(clone["request"] for clone in clones)
    assert all(clone["request"] == clone["id"] for clone in clones)


def test_50_clones_tell_the_hosts_time(clones):
    for clone in clones:
        assert clone["asked"] - 0.5 <= clone["wall"] <= clone["answered"] + 0.5
        assert 0 < clone["left-ms"] <= 60_000


def test_50_clones_monotonic_clocks_go_on_from_the_freeze(clones):
    last = clones[-1]
    # The host's time went on while the snapshot was written, and from clone to clone; the function's did not.
    frozen = last["wall-since-init"] - last["since-init"]
    assert frozen > 1, frozen
    for clone in clones:
        assert 0 <= clone["since-freeze"] <= clone["answered"] - clone["asked"] + 0.5
        assert clone["since-freeze"] <= clone["since-init"]


def test_timers_of_50_clones_neither_fire_early_nor_in_a_storm(clones):
    for clone in clones:
        assert clone["distant"] == [0, False]
        # One for each quarter of a second that the function has lived, not that the world has.
        fired, least, most = clone["ticks"]
        assert least // 0.25 <= fired <= most // 0.25
        assert most < clone["wall-since-init"], "the world's time went on while the function was frozen"


def test_connections_of_50_clones_live_on(clones):
    assert {clone["echo"] for clone in clones} == {"STILL HERE"}


def test_50_clones_share_what_was_in_tmp_and_nothing_that_another_wrote(clones):
    listings = {json.dumps(clone["tmp"]) for clone in clones}
    assert len(listings) == 1 and "init-" in listings.pop()
    assert all("written-by-a-clone" not in clone["tmp"] for clone in clones)
    assert {clone["kept"] for clone in clones} == {"before the freeze and after"}


FAILING = """
from snapshot_restore_py import register_after_restore


@register_after_restore
def hook():
    raise ValueError("no new connection")


def handler(event, context):
    print("the handler ran")
    return "handled"
"""


def test_a_hook_that_fails_keeps_the_request_from_the_handler(deploy, invoke):
    told, answer = invoke(deploy("hook", zip_of(app=FAILING), timeout=60), LogType="Tail")
    assert answer["FunctionError"] == "Unhandled"
    assert (told["errorType"], told["errorMessage"]) == ("ValueError", "no new connection"), told
    log = base64.b64decode(answer["LogResult"]).decode()
    assert "no new connection" in log and "the handler ran" not in log, log


NEWER = """
import os, random, ssl, sys, uuid


def draws():
    return [random.random(), str(uuid.uuid1()).rsplit("-", 1)[1], str(uuid.uuid4()), ssl.RAND_bytes(16).hex()]


own = random.Random(1)  # nobody renews it
own.random()
before = draws()


def handler(event, context):
    return {"before": before, "draws": draws(), "own": own.random(), "python": sys.version_info[:2], "env": os.environ["AWS_EXECUTION_ENV"]}
"""


def test_clones_on_another_release_of_debian_with_a_newer_python_draw_different_random_values(deploy, invoke):
    name = deploy("newer", zip_of(app=NEWER), runtime="python3.13", timeout=60)
    clones = [invoke(name)[0] for _ in range(3)]
    assert all(clone["python"] == [3, 13] and clone["env"] == "AWS_Lambda_python3.13" for clone in clones)
    assert len({(json.dumps(clone["before"]), clone["own"]) for clone in clones}) == 1
    for drawn in zip(clones[0]["before"], *(clone["draws"] for clone in clones), strict=True):
        assert len(set(drawn)) == 4, drawn


NODE_CLONES = 12

# The other context is the control: its generator is V8's own, which nobody renews.
NODE_FUNCTION = """
import { createContext, runInContext } from 'node:vm';
import crypto, { randomBytes, randomInt, randomUUID } from 'node:crypto';

const other = createContext({});
const draws = () => ({
    random: Math.random(),
    randomInt: randomInt(2 ** 47),
    randomUUID: randomUUID(),
    webcrypto: crypto.webcrypto.randomUUID(),
    getRandomValues: [...crypto.webcrypto.getRandomValues(new Uint32Array(4))].join(),
    randomBytes: randomBytes(16).toString('hex'),
});
// More than once: what has to differ is what a cache holds, too.
const before = [draws(), draws(), draws()];
runInContext('Math.random()', other);
export const handler = async () => ({ before, draws: [draws(), draws()], own: runInContext('Math.random()', other), now: Date.now() });
"""


@pytest.fixture(scope="module")
def node_clones(deploy, client):
    """What clones of one snapshot of a Node.js function say, one after another, so that some are rewound."""
    code = node_zip(index_mjs=NODE_FUNCTION)
    name = deploy("node-identity", code, runtime=RUNTIME, handler="index.handler", timeout=60, MemorySize=256)

    def invoke():
        answer = client.invoke(FunctionName=name)
        told = json.loads(answer["Payload"].read())
        assert "FunctionError" not in answer, told
        return told | {"start": answer["ResponseMetadata"]["HTTPHeaders"]["x-thaw-start"], "answered": time.time()}

    return [invoke() for _ in range(NODE_CLONES)]


def test_node_clones_are_of_one_snapshot_and_some_were_rewound(node_clones):
    assert len({json.dumps(clone["before"]) for clone in node_clones}) == 1
    assert len({clone["own"] for clone in node_clones}) == 1
    assert {clone["start"] for clone in node_clones} >= {"rewound"}
    assert all(abs(clone["now"] / 1000 - clone["answered"]) < 60 for clone in node_clones)


@pytest.mark.parametrize("what", ["random", "randomInt", "randomUUID", "webcrypto", "getRandomValues", "randomBytes"])
def test_node_clones_draw_different_random_values(node_clones, what):
    drawn = [draw[what] for clone in node_clones for draw in clone["draws"]]
    drawn += [draw[what] for draw in node_clones[0]["before"]]
    assert len(set(drawn)) == 2 * NODE_CLONES + 3
