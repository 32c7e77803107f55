"""What goes wrong in a function, as its caller sees it; after each failure the next invocation is unharmed."""

import base64

import pytest

from conftest import zip_of

FAILING = """
import ctypes, json, os, sys, time
def handler(event, context):
    print("about to", event, flush=True)
    if event == "raise":
        raise ValueError("no such thing")
    if event == "exit":
        os._exit(7)
    if event == "exit 0":
        os._exit(0)
    if event == "crash":
        ctypes.string_at(0)
    if event == "sleep":
        time.sleep(60)
    if event == "spin":
        while True: pass
    if event == "eat":
        hoard = []
        while True: hoard.append(bytearray(os.urandom(1 << 20)))
    return "fine"
"""


def check(failing, invoke, event, kind, words, **more):
    body, answer = invoke(failing, event, LogType="Tail", **more)
    assert answer["StatusCode"] == 200 and answer["FunctionError"] == "Unhandled", body
    assert body["errorType"] == kind, body
    assert words in body["errorMessage"], body
    log = base64.b64decode(answer["LogResult"]).decode()
    assert f"about to {event}" in log and "REPORT RequestId" in log
    assert invoke(failing, "work")[0] == "fine"
    return body




@pytest.fixture(scope="module")
def failing(deploy):
    return deploy("failing", zip_of(app=FAILING), timeout=20)


@pytest.fixture(scope="module")
def hasty(deploy):
    return deploy("hasty", zip_of(app=FAILING), timeout=2)


def test_a_handler_that_raises(failing, invoke):
    body = check(failing, invoke, "raise", "ValueError", "no such thing")
    assert any("raise ValueError" in line for line in body["stackTrace"])


def test_a_process_that_exits(failing, invoke):
    check(failing, invoke, "exit", "Runtime.ExitError", "Runtime exited with error: exit status 7")


def test_a_process_that_exits_with_success(failing, invoke):
    check(failing, invoke, "exit 0", "Runtime.ExitError", "Runtime exited without providing a reason")


def test_a_process_that_crashes(failing, invoke):
    check(failing, invoke, "crash", "Runtime.ExitError", "Runtime exited with error: signal: segmentation fault")


def test_a_guest_out_of_memory(failing, invoke):
    check(failing, invoke, "eat", "Runtime.OutOfMemory", "signal: killed")


def test_a_handler_that_sleeps_too_long(hasty, invoke):
    check(hasty, invoke, "sleep", "Sandbox.Timedout", "Task timed out after 2.00 seconds")


def test_a_handler_that_never_yields(hasty, invoke):
    check(hasty, invoke, "spin", "Sandbox.Timedout", "Task timed out after 2.00 seconds")


def test_a_module_that_does_not_exist(deploy, invoke):
    name = deploy("no-module", zip_of(app=""), handler="nowhere.handler")
    body, answer = invoke(name, LogType="Tail")
    assert answer["FunctionError"] == "Unhandled"
    assert body["errorType"] == "Runtime.ImportModuleError" and "nowhere" in body["errorMessage"]


def test_a_handler_that_does_not_exist(deploy, invoke):
    name = deploy("no-handler", zip_of(app="x = 1"), handler="app.nothing")
    body, answer = invoke(name)
    assert answer["FunctionError"] == "Unhandled"
    assert body["errorType"] == "Runtime.HandlerNotFound" and "nothing" in body["errorMessage"]


def test_an_import_that_raises_shows_its_traceback(deploy, invoke, gateway):
    name = deploy("bad-import", zip_of(app="print('before')\nraise RuntimeError('at import')\n"))
    body, answer = invoke(name)
    assert answer["FunctionError"] == "Unhandled"
    assert "at import" in body["errorMessage"]
    assert any("app.py" in line for line in body["stackTrace"]), body
    listing = gateway.cli("ls").stdout
    assert "init error" in listing and "at import" in listing


def test_a_bootstrap_that_does_not_exist(deploy, invoke):
    name = deploy("no-bootstrap", zip_of(app=""), runtime="provided.al2023", handler="any")
    body, answer = invoke(name)
    assert answer["FunctionError"] == "Unhandled" and body["errorType"] == "Runtime.InvalidEntrypoint"
    assert "bootstrap" in body["errorMessage"]
