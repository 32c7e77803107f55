"""External extensions: programs of a layer beside the runtime, in real guests."""

import json
import time

from conftest import zip_of
from test_layers import publish, tree  # noqa: F401 (publish is a fixture)

# Tells each event and what it learned at registration, on its standard output.
WATCHER = """#!/usr/bin/python3
import json, os, urllib.request
API = "http://%s/2020-01-01/extension/" % os.environ["AWS_LAMBDA_RUNTIME_API"]
def call(path, body=None, **headers):
    headers = {"Lambda-Extension-" + name.replace("_", "-"): value for name, value in headers.items()}
    return urllib.request.urlopen(urllib.request.Request(API + path, body, headers))
body = json.dumps({"events": ["INVOKE", "SHUTDOWN"]}).encode()
registered = call("register", body, Name=os.path.basename(__file__), Accept_Feature="accountId")
identifier = registered.headers["Lambda-Extension-Identifier"]
told = json.load(registered)
seen = 0
while True:
    event = json.load(call("event/next", Identifier=identifier))
    seen += 1
    print("watcher saw", seen, json.dumps(event | {"told": told, "handler": os.environ.get("_HANDLER")}), flush=True)
    if event["eventType"] == "SHUTDOWN":
        break
"""

HANDLER = """
import os, time
def handler(event, context):
    if event.get("sleep"):
        time.sleep(event["sleep"])
    if event.get("exit"):
        os._exit(3)
    return {"id": context.aws_request_id}
"""


def log_of(gateway, name):
    return gateway.cli("logs", name).stdout


def events_in(gateway, name, request_id):
    """The events of the sandbox that ran this request; they come after its answer."""
    deadline = time.monotonic() + 60
    while True:
        lines = [line.split(" ", 3) for line in log_of(gateway, name).splitlines() if line.startswith("watcher saw ")]
        events = [(int(number), json.loads(event)) for _, _, number, event in lines]
        for place, (_, event) in enumerate(events):
            if event.get("requestId") == request_id and place + 1 < len(events):
                return events[place : place + 2]
        assert time.monotonic() < deadline, log_of(gateway, name)
        time.sleep(0.2)


def test_an_extension_is_told_of_the_invocation_and_of_its_end_and_each_clone_begins_anew(gateway, client, deploy, invoke, publish):  # noqa: F811
    layer = publish("watcher", tree(extensions__watcher=WATCHER))
    name = deploy("watched", zip_of(app=HANDLER), Layers=[layer["LayerVersionArn"]], timeout=20)
    for _ in range(2):
        body, answer = invoke(name)
        assert "FunctionError" not in answer
        (first, invocation), (last, end) = events_in(gateway, name, body["id"])
        # The second request's clone has not seen the first one's.
        assert (first, last) == (1, 2)
        assert invocation["eventType"] == "INVOKE" and invocation["invokedFunctionArn"].endswith(":function:watched")
        assert invocation["deadlineMs"] > 1_700_000_000_000 and invocation["tracing"]["type"] == "X-Amzn-Trace-Id"
        told = {"functionName": name, "functionVersion": "$LATEST", "handler": "app.handler", "accountId": "000000000000"}
        assert invocation["told"] == told and invocation["handler"] is None
        assert end["eventType"] == "SHUTDOWN" and end["shutdownReason"] == "spindown"
        assert end["deadlineMs"] <= invocation["deadlineMs"] + 2000

    body, answer = invoke(name, {"exit": True})
    assert answer["FunctionError"] and body["errorType"] == "Runtime.ExitError"
    request_id = answer["ResponseMetadata"]["RequestId"]
    assert events_in(gateway, name, request_id)[1][1]["shutdownReason"] == "failure"

    client.update_function_configuration(FunctionName=name, Timeout=2)
    client.get_waiter("function_updated_v2").wait(FunctionName=name)
    body, answer = invoke(name, {"sleep": 60})
    assert answer["FunctionError"] and body["errorType"] == "Sandbox.Timedout"
    request_id = answer["ResponseMetadata"]["RequestId"]
    assert events_in(gateway, name, request_id)[1][1]["shutdownReason"] == "timeout"


def test_an_extension_that_exits_at_init_fails_each_invocation_and_says_why(gateway, deploy, invoke, publish):  # noqa: F811
    layer = publish("broken", tree(extensions__broken="#!/bin/sh\necho no licence\nexit 4\n"))
    name = deploy("unwatched", zip_of(app=HANDLER), Layers=[layer["LayerVersionArn"]])
    body, answer = invoke(name)
    assert answer["FunctionError"] and body["errorType"] == "Extension.Crash"
    request_id = answer["ResponseMetadata"]["RequestId"]
    assert body["errorMessage"] == f"RequestId: {request_id} Error: exit status 4"
    log = log_of(gateway, name)
    assert "no licence\n" in log
    assert "EXTENSION\tName: broken\tState: Exited\tEvents: []\tError Type: Extension.Crash\n" in log
