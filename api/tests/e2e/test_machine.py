"""The product as its operator uses it: command line, restart, kill, disk full, load."""

import base64
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from botocore.exceptions import ClientError
from conftest import ROLE, ROOT, THAW, Gateway, is_native, link_images, processes_of, zip_of


def test_the_command_line_deploys_invokes_lists_logs_and_removes(gateway):
    deployed = gateway.cli("deploy", ROOT / "examples/hello", "--name", "by-hand", "--timeout", "30")
    assert "/fn/by-hand/" in deployed.stdout and "boot" in deployed.stderr.lower()
    assert json.loads(gateway.cli("invoke", "by-hand", "-d", '{"name": "cli"}').stdout)["greeting"] == "Hello, cli!"
    assert "by-hand" in gateway.cli("ls").stdout
    listed = json.loads(gateway.cli("--json", "ls").stdout)
    assert [function["state"] for function in listed["functions"] if function["name"] == "by-hand"] == ["Active"]
    assert "for by-hand" in gateway.cli("logs", "by-hand").stdout
    gateway.cli("rm", "by-hand")
    assert "by-hand" not in gateway.cli("ls").stdout
    failed = gateway.cli("invoke", "by-hand", check=False)
    assert failed.returncode == 1 and "by-hand" in failed.stderr


def test_deploying_again_replaces_the_code(gateway, tmp_path):
    (tmp_path / "app.py").write_text("def handler(e, c): return 'one'")
    gateway.cli("deploy", tmp_path, "--name", "again", "--timeout", "30")
    (tmp_path / "app.py").write_text("def handler(e, c): return 'two'")
    gateway.cli("deploy", tmp_path, "--name", "again", "--timeout", "30")
    assert gateway.cli("invoke", "again").stdout.strip() == '"two"'
    gateway.cli("rm", "again")


def test_deploying_a_function_that_fails_at_import_says_so(gateway, tmp_path):
    (tmp_path / "app.py").write_text("import nonsense_that_is_not_there")
    done = gateway.cli("deploy", tmp_path, "--name", "cannot-import", check=False)
    assert done.returncode == 1 and "nonsense_that_is_not_there" in done.stderr
    gateway.cli("rm", "cannot-import")


def test_logs_follow_what_comes(gateway, hello, invoke):
    command = [THAW, "--endpoint", gateway.url, "logs", hello, "-f", "-n", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as follower:
        deadline = time.monotonic() + 60
        os.set_blocking(follower.stdout.fileno(), False)
        seen = b""
        while b"for hello" not in seen:
            assert time.monotonic() < deadline, seen
            invoke(hello)
            seen += follower.stdout.read() or b""
        follower.kill()


def test_snapshots_are_listed_inspected_and_verified(gateway, hello):
    assert hello in gateway.cli("snapshot", "ls").stdout
    about = json.loads(gateway.cli("--json", "snapshot", "inspect", hello).stdout)
    assert about["memoryMiB"] >= 128 and about["memoryStoredBytes"] > 1 << 20 and about["runtime"] == "python3.11"
    assert "every byte" in gateway.cli("snapshot", "verify", hello).stdout
    damaged = gateway.home / "damaged.thaw"
    shutil.copyfile(about["path"], damaged)
    with open(damaged, "r+b") as file:
        file.seek(os.path.getsize(damaged) // 2)
        file.write(b"\x55")
    done = gateway.cli("snapshot", "verify", damaged, check=False)
    damaged.unlink()
    assert done.returncode == 1 and "damaged" in done.stderr


def test_a_function_learns_its_working_set_from_its_first_request(gateway, deploy, invoke):
    name = deploy("learner", zip_of(app="def handler(e, c): return {'sum': sum(e['numbers'])}"))

    def about():
        return json.loads(gateway.cli("--json", "snapshot", "inspect", name).stdout)

    frozen = about()
    assert frozen["workingSet"] is None
    deadline = time.monotonic() + 60
    while not (learned := about())["workingSet"]:
        assert time.monotonic() < deadline, "nothing is learned"
        assert invoke(name, {"numbers": [3, 5]})[0] == {"sum": 8}
    assert learned["contentDigest"] == frozen["contentDigest"] and learned["digest"] != frozen["digest"]
    working_set = learned["workingSet"]
    print(working_set)
    assert 0 < working_set["writtenPages"] < working_set["pages"] < learned["memoryMiB"] * 256 / 2
    assert "every byte" in gateway.cli("snapshot", "verify", name).stdout
    for number in range(5):
        assert invoke(name, {"numbers": [number]})[0] == {"sum": number}
    assert about()["digest"] == learned["digest"]
    assert [path.name for path in pathlib.Path(learned["path"]).parent.iterdir() if "tmp" in path.name] == []


def test_a_snapshot_is_built_without_a_gateway(home, tmp_path):
    (tmp_path / "app.py").write_text("def handler(e, c): return 1")
    command = [THAW, "--home", home, "snapshot"]
    shutil.rmtree(home / "snapshots/alone", ignore_errors=True)
    subprocess.run([*command, "build", tmp_path, "--name", "alone"], check=True, timeout=300)
    assert "alone" in subprocess.run([*command, "ls"], check=True, capture_output=True, text=True).stdout
    subprocess.run([*command, "verify", "alone"], check=True)
    subprocess.run([*command, "rm", "alone"], check=True)


def test_20_clients_call_numpy_10_times_each(gateway, deploy, tmp_path):
    wheels = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", "-t", tmp_path]
    subprocess.run([*wheels, "--python-version", "3.11", "-r", ROOT / "examples/numpy/requirements.txt"], check=True)
    shutil.copy(ROOT / "examples/numpy/app.py", tmp_path)
    packed = shutil.make_archive(str(tmp_path / "../numpy"), "zip", tmp_path)
    name = deploy("numpy", pathlib.Path(packed).read_bytes(), timeout=60, MemorySize=256)
    load = [ROOT / "target/release/thaw-loadtest", "--json", "--clients", "20", "-n", "10", "--timeout", "300"]
    load += ["--data", '{"vector": [3, 5]}', "--expect", "solution", f"{gateway.url}/fn/{name}/"]
    done = subprocess.run(load, capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert (report["good"], report["errors"]) == (200, {}), report
    print(report)


@pytest.fixture
def second(home, tmp_path):
    """A gateway of the test's own, on images that the first one made."""
    own = home / "second"
    shutil.rmtree(own, ignore_errors=True)
    link_images(home, own)
    gateway = Gateway(own)
    yield gateway
    if gateway.process and gateway.process.poll() is None:
        gateway.process.kill()
        gateway.process.wait()
    shutil.rmtree(own, ignore_errors=True)


def create(client, name, code="def handler(e, c): return 'here'"):
    client.create_function(
        FunctionName=name, Runtime="python3.11", Handler="app.handler", Role=ROLE, Timeout=30, Code={"ZipFile": zip_of(app=code)}
    )


def gone(home, seconds=10):
    deadline = time.monotonic() + seconds
    while [found for found in processes_of(home) if str(home) in found[1]]:
        assert time.monotonic() < deadline, processes_of(home)
        time.sleep(0.1)


def emulators_of(gateway):
    """QEMU processes that a gateway's `thaw up` started."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(") ") if entry.name.isdigit() else ("", "", "")
        except OSError:
            continue
        if "(qemu-system" in name and rest.split()[0] != "Z" and rest.split()[1] == str(gateway.process.pid):
            found.append(int(entry.name))
    return found


def is_served(gateway):
    try:
        return gateway.get("/healthz")[0] == 200
    except OSError:
        return False


def test_functions_survive_ctrl_c_and_kill_9_and_nothing_stays_behind(second):
    client = second.start().client()
    create(client, "durable")
    client.get_waiter("function_active_v2").wait(FunctionName="durable")
    assert second.stop(signal.SIGINT) == 0
    gone(second.home)
    client = second.start().client()
    assert client.invoke(FunctionName="durable")["Payload"].read() == b'"here"'
    create(client, "cut-off")  # killed while it is frozen
    second.stop(signal.SIGKILL)
    gone(second.home)
    [snapshot] = (second.home / "functions/durable").glob("*/snapshot.thaw")
    with open(snapshot, "r+b") as file:  # as if it came from another machine: its tag is another one's
        file.seek(4095)
        tag = file.read(1)[0]
        file.seek(4095)
        file.write(bytes([tag ^ 1]))
    refused = second.cli("snapshot", "verify", "durable", check=False)
    assert refused.returncode == 1 and f"{snapshot} " in refused.stderr and "thaw snapshot trust" in refused.stderr, refused
    # Its retries are as boto3's own: two freezes at once may outlast the gateway's wait for one on a busy machine (429).
    client = second.start().client(retries={"total_max_attempts": 5})
    assert client.invoke(FunctionName="durable")["Payload"].read() == b'"here"'
    assert "made here" in second.cli("snapshot", "verify", "durable").stdout  # frozen again
    client.get_waiter("function_active_v2").wait(FunctionName="cut-off")
    assert client.invoke(FunctionName="cut-off")["Payload"].read() == b'"here"'
    if not is_native():
        labs = emulators_of(second)
        os.kill(labs[0], signal.SIGKILL)
        deadline = time.monotonic() + 120
        while emulators_of(second) in ([], labs) or not is_served(second):  # by a lab that is started again
            assert second.process.poll() is None and time.monotonic() < deadline, "the lab is not started again"
            time.sleep(0.2)
        for name in ["durable", "cut-off"]:
            assert client.invoke(FunctionName=name)["Payload"].read() == b'"here"'
        assert len(emulators_of(second)) == 1
    assert second.stop() == 0
    gone(second.home)
    leftovers = [path for path in second.home.rglob("*") if ".thaw-tmp-" in path.name]
    assert leftovers == []
    assert [path for path in (second.home / "staging").iterdir() if path.is_dir()] == []


def test_fifty_acknowledged_events_all_run_though_the_gateway_is_killed_among_them(second):
    client = second.start().client()
    create(client, "worker")
    create(client, "sink", "def handler(event, context): print('got', event['requestPayload']['n'], flush=True)")
    for name in ["worker", "sink"]:
        client.get_waiter("function_active_v2").wait(FunctionName=name)
    sink = client.get_function_configuration(FunctionName="sink")["FunctionArn"]
    destination = {"OnSuccess": {"Destination": sink}}
    client.put_function_event_invoke_config(FunctionName="worker", DestinationConfig=destination)
    for number in range(50):
        payload = json.dumps({"n": number})
        assert client.invoke(FunctionName="worker", InvocationType="Event", Payload=payload)["StatusCode"] == 202
        if number == 40:
            reached = second.cli("logs", "sink").stdout.count("got ")
    second.stop(signal.SIGKILL)
    gone(second.home)
    second.start()
    seen, deadline = set(), time.monotonic() + 240
    while seen != set(range(50)):
        assert time.monotonic() < deadline, f"{50 - len(seen)} events did not run; {reached} had before the kill"
        lines = second.cli("logs", "sink", "--tail", "1000").stdout.splitlines()
        seen = {int(line.split()[1]) for line in lines if line.startswith("got ")}
        time.sleep(0.2)
    assert second.stop() == 0
    gone(second.home)


def test_a_full_disk_while_deploying_is_told_and_harms_nothing(second, tmp_path):
    root = [] if os.geteuid() == 0 else ["sudo"]
    functions = second.home / "functions"
    functions.mkdir()
    options = f"size=24m,mode=700,uid={os.geteuid()},gid={os.getegid()}"
    subprocess.run([*root, "mount", "-t", "tmpfs", "-o", options, "tmpfs", functions], check=True)
    try:
        client = second.start().client()
        create(client, "too-large")
        with pytest.raises(Exception):
            client.get_waiter("function_active_v2").wait(FunctionName="too-large")
        state = client.get_function(FunctionName="too-large")["Configuration"]
        assert state["State"] == "Failed" and "no space left" in state["StateReason"], state
        with pytest.raises(ClientError) as error:
            client.invoke(FunctionName="too-large")
        assert error.value.response["Error"]["Code"] != "404"
        client.delete_function(FunctionName="too-large")
        assert [path for path in functions.rglob("*") if path.is_file() and path.suffix == ".thaw"] == []
        assert second.stop() == 0
        gone(second.home)
    finally:
        subprocess.run([*root, "umount", "-l", functions], check=True)
