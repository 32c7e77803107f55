"""One gateway for the whole run (or for each of pytest-xdist's workers), started as a user starts it; functions are made and removed by the tests."""

import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile

import boto3
import botocore.config
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
THAW = ROOT / "target/release/thaw"
ROLE = "arn:aws:iam::000000000000:role/test"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Where the gateway looks for code in S3, and how it signs; a test serves it.
S3_PORT, S3_KEY, S3_SECRET = free_port(), "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def processes_of(home):
    """Processes whose command line names this state folder, and monitors."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if command and (str(home).encode() in b" ".join(command) or command[0].endswith(b"/thaw-vmm")):
            found.append((int(entry.name), b" ".join(command).decode(errors="replace")))
    return found


def is_native():
    """Whether sandboxes are on this machine, not in the lab."""
    return '"native"' in subprocess.run([THAW, "--json", "doctor"], capture_output=True, text=True).stdout


def zip_of(**files):
    """A zip of these files; an executable one is named bootstrap."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name if name == "bootstrap" else name + ".py")
            info.external_attr = (0o755 if name == "bootstrap" else 0o644) << 16
            archive.writestr(info, text)
    return buffer.getvalue()


def impatient(get_waiter):
    """Waiters that look five times a second and give up when the SDK's own do, which look every second or every fifth."""

    def get(name):
        waiter = get_waiter(name)
        waiter.config.max_attempts *= waiter.config.delay * 5
        waiter.config.delay = 0.2
        return waiter

    return get


class Gateway:
    def __init__(self, home, *options):
        self.home, self.options, self.process = pathlib.Path(home), options, None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [THAW, "--home", self.home, "up", "--listen", f"127.0.0.1:{self.port}", *self.options]
        key = {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_REGION": "us-east-1"}
        environment = os.environ | key | {"THAW_S3_ENDPOINT": f"http://127.0.0.1:{S3_PORT}"}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
        deadline = time.monotonic() + 900  # the first start makes images
        while True:
            assert self.process.poll() is None, "thaw up ended before it served"
            assert time.monotonic() < deadline, "thaw up does not serve"
            try:
                with urllib.request.urlopen(self.url + "/healthz", timeout=5) as answer:
                    assert answer.status == 200
                    return self
            except OSError:
                time.sleep(0.2)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def client(self, **config):
        defaults = {"read_timeout": 120, "retries": {"total_max_attempts": 1}}
        client = boto3.client(
            "lambda",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
            config=botocore.config.Config(**(defaults | config)),
        )
        client.get_waiter = impatient(client.get_waiter)
        return client

    def cli(self, *arguments, check=True, **options):
        command = [THAW, "--home", self.home, "--endpoint", self.url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=check, timeout=300, **options)

    def get(self, path, data=None, headers=None, method=None):
        request = urllib.request.Request(self.url + path, data=data, headers=headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()


@pytest.fixture(scope="session")
def home():
    path = pathlib.Path(os.environ["THAW_TEST_HOME"])
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        return link_images(path, path / worker)
    path.mkdir(parents=True, exist_ok=True)
    return path


def link_images(home, own):
    """Another state folder with the images that are in `home` already: they are replaced, never written to."""
    for folder in ("cache", "images", "initramfs", "kernel", "lab", "overlay"):
        if (home / folder).exists() and not (own / folder).exists():
            shutil.copytree(home / folder, own / folder, symlinks=True, copy_function=os.link)
    own.mkdir(parents=True, exist_ok=True)
    return own


@pytest.fixture(scope="session")
def gateway(home):
    gateway = Gateway(home).start()
    for function in gateway.client().list_functions()["Functions"]:  # an earlier run was cut off
        gateway.client().delete_function(FunctionName=function["FunctionName"])
    yield gateway
    gateway.stop()
    assert processes_of(home) == []


@pytest.fixture(scope="session")
def client(gateway):
    return gateway.client()


@pytest.fixture(scope="session")
def deploy(client):
    """deploy(name, zip, …) makes a function and waits until it is active; all are removed at the end."""
    made = []

    def deploy(name, code, runtime="python3.11", handler="app.handler", timeout=30, **more):
        made.append(name)
        client.create_function(
            FunctionName=name, Runtime=runtime, Handler=handler, Role=ROLE, Code={"ZipFile": code}, Timeout=timeout, **more
        )
        client.get_waiter("function_active_v2").wait(FunctionName=name)
        return name

    yield deploy
    for name in made:
        try:
            client.delete_function(FunctionName=name)
        except client.exceptions.ResourceNotFoundException:
            pass


@pytest.fixture(scope="session")
def invoke(client):
    def invoke(name, event=None, **more):
        answer = client.invoke(FunctionName=name, Payload=json.dumps(event if event is not None else {}), **more)
        return json.loads(answer["Payload"].read()), answer

    return invoke


@pytest.fixture(scope="session")
def hello(deploy):
    code = (ROOT / "examples/hello/app.py").read_text()
    return deploy("hello", zip_of(app=code), Environment={"Variables": {"GREETING": "hi"}})
