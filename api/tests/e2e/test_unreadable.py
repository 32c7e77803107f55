"""A disk that cannot be read any more, for a while: a layer below the gateway (unreadable.c) has reads fail with EIO. Monitors are played, as in test_kills.py."""

import subprocess

import pytest
from botocore.exceptions import ClientError
from conftest import ROOT, link_images
from test_kills import EVENT, Mortal, until


class Ailing(Mortal):
    """A gateway on a disk of which something cannot be read."""

    def __init__(self, home):
        super().__init__(home)
        self.unreadable = self.home / "unreadable"
        layer = self.home / "unreadable.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", layer, ROOT / "api/tests/e2e/unreadable.c", "-ldl"], check=True)
        self.environment = {"RUST_BACKTRACE": "0", "LD_PRELOAD": str(layer), "UNREADABLE": str(self.unreadable)}

    def lose(self, path):
        written = self.home / "unreadable.new"
        written.write_text(str(path))
        written.rename(self.unreadable)

    def recover(self):
        self.unreadable.unlink()

    def restart(self):
        self.process.kill()
        self.process.wait()
        return self.start()

    def answer(self, name):
        return self.lambda_.invoke(FunctionName=name, Payload=EVENT)["Payload"].read()

    def files(self):
        return {path for path in (self.home / "functions").rglob("*") if path.is_file() and path.name != "log"}


@pytest.fixture
def ailing(home, tmp_path):
    link_images(home, tmp_path)
    gateway = Ailing(tmp_path)
    try:
        gateway.start()
        gateway.create("ill")
        gateway.create("well")
        gateway.publish("ill")
        yield gateway
    finally:
        gateway.process.kill()


def test_code_that_cannot_be_read_fails_its_update_alone_and_is_there_afterwards(ailing):
    ailing.lose("/code.zip")
    ailing.lambda_.update_function_configuration(FunctionName="ill", MemorySize=256)

    def told():
        found = ailing.lambda_.get_function_configuration(FunctionName="ill")
        return found if found["LastUpdateStatus"] != "InProgress" else None

    until(told, "the update has ended")
    found = told()
    assert found["LastUpdateStatus"] == "Failed" and "nput/output error" in found["LastUpdateStatusReason"], found
    assert ailing.answer("well") == EVENT
    assert ailing.answer("ill") == EVENT  # the revision before it
    ailing.recover()
    ailing.lambda_.update_function_configuration(FunctionName="ill", MemorySize=256)
    ailing.functions["ill"]["memory"].add(256)
    ailing.settled("ill")
    ailing.check()
    assert ailing.stop() == 0


def test_a_snapshot_that_cannot_be_read_harms_its_own_function_alone_and_nothing_is_removed(ailing):
    ailing.settled("ill", Qualifier="1")
    before = ailing.files()
    ailing.lose(ailing.home / "functions/ill")
    ailing.restart()
    assert ailing.answer("well") == EVENT
    with pytest.raises(ClientError) as refused:
        ailing.answer("ill")
    assert "nput/output error" in str(refused.value)
    assert ailing.answer("well") == EVENT
    assert before <= ailing.files()
    ailing.recover()
    ailing.restart().check()
    assert ailing.stop() == 0


def test_a_version_that_could_not_be_made_for_want_of_its_code_is_made_at_the_next_start(ailing):
    ailing.create("late")
    ailing.lose("/code.zip")
    version = ailing.publish("late")

    def state():
        return ailing.lambda_.get_function_configuration(FunctionName="late", Qualifier=version)["State"]

    until(lambda: state() == "Failed", "it cannot be made")
    ailing.restart()
    assert state() == "Failed"
    ailing.recover()
    ailing.restart()
    until(lambda: state() == "Active", "it is made")
    ailing.check()
    assert ailing.stop() == 0


def test_a_database_that_cannot_be_read_is_told_and_left_as_it_is(ailing):
    ailing.lose("thaw.db")
    ailing.process.kill()
    ailing.process.wait()
    ailing.launch()
    until(ailing.is_dead, "it does not serve without its database")
    said = (ailing.home / "log").read_text()[-2000:]
    assert "cannot open the database" in said and "I/O error" in said, said
    ailing.recover()
    ailing.start().check()
    # While it serves: what is acknowledged is kept, whatever can be read of the rest.
    ailing.lose("thaw.db")
    for number in range(5):
        try:
            ailing.create(f"new{number}", until_settled=False)
        except ClientError as refused:
            assert refused.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
        assert ailing.answer("well") == EVENT
    ailing.recover()
    for name in [name for name in ailing.functions if name.startswith("new")]:
        ailing.settled(name)
    ailing.restart().check()
    assert ailing.stop() == 0
