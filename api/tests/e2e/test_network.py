"""What functions reach: what thaw.toml allows, from each clone and each life of it, and nothing else."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import subprocess
import threading
import uuid

import pytest
from conftest import free_port, is_native

HANDLER = '''
import os, socket, urllib.request

def tried(host, port):
    # "connected" is what comes after the network's own answer: a denied connection is accepted by the slot's kernel, and reset.
    try:
        with socket.create_connection((host, port), timeout=20) as connection:
            connection.sendall(b"hello")
            connection.recv(1)
    except (ConnectionResetError, ConnectionRefusedError, BrokenPipeError):
        return "refused"
    return "connected"

def handler(event, context):
    if "interfaces" in event:
        return sorted(os.listdir("/sys/class/net"))
    host, port = event["host"], event["port"]
    with urllib.request.urlopen(f"http://{host}:{port}/{event['id']}", timeout=20) as answer:
        body = answer.read().decode()
    return {
        "body": body,
        "metadata": tried("169.254.169.254", 80),
        "other port": tried(host, event["other"]),
    }
'''


class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"you asked for {self.path}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def sudo(*command):
    subprocess.run([*([] if os.geteuid() == 0 else ["sudo"]), *command], check=True)


@pytest.fixture
def neighbour():
    """(address, port, other port) of a web server that is neither this machine nor on the internet: the lab's own gateway leads
    to this machine's loopback; where sandboxes are on this machine, a network namespace beside it is another host."""
    other = free_port()
    if not is_native():
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "10.0.2.2", server.server_port, other
        server.shutdown()
        return
    name, address = f"thaw-{uuid.uuid4().hex[:6]}", "10.231.77.2"
    sudo("ip", "netns", "add", name)
    try:
        sudo("ip", "link", "add", name[:12], "type", "veth", "peer", "name", "eth0", "netns", name)
        sudo("ip", "addr", "add", "10.231.77.1/30", "dev", name[:12])
        sudo("ip", "link", "set", name[:12], "up")
        sudo("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "eth0")
        sudo("ip", "-n", name, "link", "set", "eth0", "up")
        program = (
            "import http.server, sys; sys.path.insert(0, sys.argv[1]); from test_network import Echo; "
            "server = http.server.ThreadingHTTPServer((sys.argv[2], 0), Echo); print(server.server_port, flush=True); "
            "server.serve_forever()"
        )
        prefix = [] if os.geteuid() == 0 else ["sudo"]
        command = [*prefix, "ip", "netns", "exec", name, os.sys.executable, "-c", program, os.path.dirname(__file__), address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield address, int(process.stdout.readline()), other
            finally:
                process.kill()
    finally:
        sudo("ip", "netns", "del", name)


def test_a_function_reaches_what_its_project_allows_and_nothing_else(gateway, neighbour, tmp_path):
    host, port, other = neighbour
    name = "network"
    root = tmp_path / name
    root.mkdir()
    (root / "app.py").write_text(HANDLER)
    allowed = f'[network]\nallow = ["{host}:{port}"]\n'
    (root / "thaw.toml").write_text(f'name = "{name}"\ntimeout = 60\n{allowed}')
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: gateway.cli("rm", name))
        assert "is frozen" in gateway.cli("deploy", root).stdout
        assert "nothing changes" in gateway.cli("deploy", root).stdout

        def ask(number):
            event = {"host": host, "port": port, "other": other, "id": f"request-{number}"}
            return json.loads(gateway.cli("invoke", name, "-d", json.dumps(event)).stdout)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, range(6)))
        for number, answer in enumerate(answers):
            assert answer["body"] == f"you asked for /request-{number}", answer
            assert answer["metadata"] == answer["other port"] == "refused", answer
        log = gateway.cli("logs", name, "-n", "400").stdout
        assert "thaw: network: denied 169.254.169.254:80" in log, log
        assert f"thaw: network: denied {host}:{other}" in log, log
        assert "lo" in ask_interfaces(gateway, name) and "eth0" in ask_interfaces(gateway, name)
        (root / "thaw.toml").write_text(f'name = "{name}"\ntimeout = 60\n')
        assert "- network" in gateway.cli("deploy", root).stdout
        assert ask_interfaces(gateway, name) == ["lo"]


def ask_interfaces(gateway, name):
    return json.loads(gateway.cli("invoke", name, "-d", '{"interfaces": true}').stdout)


TRUSTING = """
import ssl

def handler(event, context):
    found = ssl.create_default_context().get_ca_certs()
    return [value for certificate in found for part in certificate["subject"] for name, value in part if name == "commonName"]
"""


def test_a_function_with_a_secret_trusts_who_puts_it_in_and_others_do_not(gateway, tmp_path):
    secret = '[[network.secrets]]\nhost = "api.example.com"\nheader = "Authorization"\nenvironment = "THAW_TEST_TOKEN"\n'
    trusted = {}
    with contextlib.ExitStack() as stack:
        for name, network in (("trusting", secret), ("others", '[network]\nallow = ["internet"]\n')):
            root = tmp_path / name
            root.mkdir()
            (root / "app.py").write_text(TRUSTING)
            (root / "thaw.toml").write_text(f'name = "{name}"\ntimeout = 60\n{network}')
            stack.callback(lambda name=name: gateway.cli("rm", name))
            assert "is frozen" in gateway.cli("deploy", root, env=os.environ | {"THAW_TEST_TOKEN": "Bearer hush"}).stdout
            trusted[name] = set(json.loads(gateway.cli("invoke", name, "-d", "{}").stdout))
    assert trusted["trusting"] - trusted["others"] == {"Thaw egress"}
    assert len(trusted["others"]) > 50
