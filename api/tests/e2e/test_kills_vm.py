"""Kills at fault points, as in test_kills.py, of a gateway with real guests, in their jails and with networks. One gateway, where its
monitors run; keeper.py sits there and looks at what is left outside the gateway's home."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from botocore.exceptions import BotoCoreError
from conftest import ROOT, THAW, is_native, link_images
from test_kills import EVENT, GATEWAY, RELEASE, Mortal, until

KEEPER = ROOT / "api/tests/e2e/keeper.py"
NETWORK = '[network]\nallow = ["internet"]\n'


class Kept(Mortal):
    """A gateway that a keeper starts."""

    def __init__(self, home):
        super().__init__(home)
        command = [GATEWAY, "--home", self.home, "--port", str(self.port), "--vmm", RELEASE / "thaw-vmm"]
        command += ["--agent", RELEASE / "guest/thaw-agent", "--egress", RELEASE / "thaw-egress"]
        root = [] if os.geteuid() == 0 else ["sudo"]
        place = root if is_native() else [THAW, "--home", self.home, "lab", "-p", str(self.port), "--"]
        self.log = open(self.home / "log", "wb")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen([*place, sys.executable, "-IS", KEEPER, *command], **pipes)
        self.before = self.tell("look")

    def tell(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("keeper: "):
                return json.loads(line.removeprefix("keeper: "))
        raise AssertionError((self.home / "log").read_text()[-3000:])

    def start(self, point="never"):
        self.tell(f"start {point}")
        return self

    def is_dead(self):
        return self.tell("dead") is not None

    def monitors(self):
        return self.tell("look")["processes"]

    def dies(self, point):
        """At that point, and takes along every process and network of its own."""
        until(self.is_dead, f"{point} is reached", 120)
        assert self.tell("dead") == -signal.SIGKILL
        left = ("processes", "networks", "links", "named networks", "mounts")

        def is_clean():
            found = self.tell("look")
            return all(found[what] == self.before[what] for what in left)

        until(is_clean, lambda: f"after {point} these stay: {self.tell('look')}, before: {self.before}")

    def invoke(self, name):
        assert self.lambda_.invoke(FunctionName=name, Payload=EVENT)["Payload"].read() == EVENT

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture
def kept(home):
    own = home / "mortal"
    shutil.rmtree(own, ignore_errors=True)
    gateway = Kept(link_images(home, own))
    yield gateway
    gateway.end()
    shutil.rmtree(own, ignore_errors=True)


def test_a_gateway_that_is_killed_with_real_guests_leaves_nothing_and_keeps_its_word(kept, tmp_path):
    (tmp_path / "app.py").write_text("def handler(e, c): return e")
    (tmp_path / "thaw.toml").write_text('name = "kept"\nruntime = "python3.11"\nhandler = "app.handler"\ntimeout = 30\n' + NETWORK)
    kept.start().until_served()
    kept.cli("deploy", tmp_path)
    kept.functions["kept"] = {"memory": {128}, "versions": set(), "alias": None}
    kept.invoke("kept")
    kept.tell("end thaw-egress")
    kept.invoke("kept")  # which starts it again
    kept.tell("arm freeze.saved")
    with pytest.raises((BotoCoreError, OSError)):
        kept.create("late")  # acknowledged, then killed while the new function's monitor is there
        raise AssertionError("freeze.saved is not reached")
    kept.functions["late"] = {"memory": {128}, "versions": set(), "alias": None}
    kept.dies("freeze.saved")
    for point in ("claim.shell-made", "deploy.pool-opened"):  # it dies on its way up, "late" being deployed again
        kept.start(point)
        kept.dies(point)
    for point in ("invoke.handed-over", "rewind.begun"):
        kept.start().until_served()
        kept.invoke("kept")  # while "late" is made again
        kept.tell(f"arm {point}")
        with pytest.raises((BotoCoreError, OSError)):
            while True:  # who had an answer before the rewind had it
                kept.invoke("kept")
        kept.dies(point)
    kept.start().until_served()
    kept.check()
    kept.tell("arm deploy.function-removed")
    with pytest.raises((BotoCoreError, OSError)):
        kept.delete("late")
    kept.dies("deploy.function-removed")
    planted = kept.plant()
    kept.start("gc.clean-removed")
    kept.dies("gc.clean-removed")
    kept.start().until_served()
    kept.check()
    assert [path for path in planted if path.exists()] == []
    until(lambda: kept.tell("look")["cells"], "monitors are in their cells")
    until(lambda: kept.tell("look")["empty cells"] == [], lambda: f"cells of nobody stay: {kept.tell('look')}")
    assert len(kept.tell("look")["trees"]) == 1
    assert kept.tell("stop") == 0
    until(lambda: kept.tell("look") == kept.before, lambda: f"{kept.tell('look')} is not {kept.before}")
