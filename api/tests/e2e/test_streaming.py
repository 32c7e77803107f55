"""Streamed answers, SnapStart's hooks and the size of /tmp: unmodified boto3 outside, real guests inside."""

import http.client
import json
import time
import urllib.parse

import pytest
from conftest import zip_of

# Ten pieces, one each 100 ms, by curl's own chunked upload. The first is written when curl reads: what is written while an
# emulated guest still loads it would arrive as one.
TEN = r"""#!/bin/sh
set -eu
api="http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation"
headers=$(mktemp)
pipe=$headers.pipe
mkfifo "$pipe"
while :; do
    curl -sS -o /dev/null -D "$headers" "$api/next"
    id=$(sed -n 's/^lambda-runtime-aws-request-id: *//Ip' "$headers" | tr -d '\r')
    curl -sS -o /dev/null -X POST -T "$pipe" -H 'Expect:' -H 'Content-Type: text/plain' \
        -H 'Lambda-Runtime-Function-Response-Mode: streaming' "$api/$id/response" &
    for number in 0 1 2 3 4 5 6 7 8 9; do echo "piece $number"; sleep 0.1; done >"$pipe"
    wait
done
"""
PIECES = "".join(f"piece {number}\n" for number in range(10))


@pytest.fixture(scope="module")
def ten(deploy):
    return deploy("ten", zip_of(bootstrap=TEN), runtime="provided.al2023", handler="any")


def spread(times):
    """Pieces came one after another, not all at once: the emulated guest is late at times, never early."""
    told = [round(moment - times[0], 3) for moment in times]
    print("arrived after", told)
    assert len(times) >= 8 and times[-1] - times[0] > 0.6, told
    assert sum(later - earlier > 0.02 for earlier, later in zip(times, times[1:])) >= 6, told


def test_ten_pieces_arrive_as_they_are_written(client, ten):
    answer = client.invoke_with_response_stream(FunctionName=ten, Payload=b"{}", LogType="Tail")
    assert answer["ExecutedVersion"] == "$LATEST"
    times, text, end = [], b"", None
    for event in answer["EventStream"]:
        if "PayloadChunk" in event:
            times.append(time.monotonic())
            text += event["PayloadChunk"]["Payload"]
        else:
            end = event["InvokeComplete"]
    assert text.decode() == PIECES and "ErrorCode" not in end and end["LogResult"]
    spread(times)


def test_a_buffered_caller_gets_the_whole(client, ten):
    assert client.invoke(FunctionName=ten)["Payload"].read().decode() == PIECES


def test_a_streaming_url_sends_each_piece_at_once(client, ten):
    made = client.create_function_url_config(FunctionName=ten, AuthType="NONE", InvokeMode="RESPONSE_STREAM")
    url = urllib.parse.urlsplit(made["FunctionUrl"])
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    connection.request("GET", url.path)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/plain"
    times, text = [], b""
    while piece := answer.read1():
        times.append(time.monotonic())
        text += piece
    assert text.decode() == PIECES
    spread(times)


def test_a_function_that_fails_ends_its_stream_with_the_error(client, deploy):
    name = deploy("fails-in-stream", zip_of(app="def handler(event, context): raise ValueError('no')"))
    events = list(client.invoke_with_response_stream(FunctionName=name)["EventStream"])
    end = events[-1]["InvokeComplete"]
    assert end["ErrorCode"] == "Unhandled" and json.loads(end["ErrorDetails"])["errorType"] == "ValueError"


HOOKS = """
import os, time
from snapshot_restore_py import register_after_restore, register_before_snapshot
seen = []
register_before_snapshot(lambda: seen.append("before"))
def after():
    seen.append("after")
    if os.environ.get("FAIL") == "raise":
        raise ValueError("no network yet")
    if os.environ.get("FAIL") == "hang":
        time.sleep(600)
register_after_restore(after)
def handler(event, context):
    return [seen, os.environ["AWS_LAMBDA_INITIALIZATION_TYPE"], os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize >> 20]
"""


def test_snapstart_runs_its_hooks_around_the_snapshot_of_a_version(client, deploy, invoke):
    storage, snap_start = {"Size": 1024}, {"ApplyOn": "PublishedVersions"}
    name = deploy("hooks", zip_of(app=HOOKS), EphemeralStorage=storage, SnapStart=snap_start)
    version = client.publish_version(FunctionName=name)
    assert version["SnapStart"] == {"ApplyOn": "PublishedVersions", "OptimizationStatus": "Off"}
    client.get_waiter("published_version_active").wait(FunctionName=name, Qualifier="1")
    ready = client.get_function_configuration(FunctionName=name, Qualifier="1")
    assert ready["SnapStart"]["OptimizationStatus"] == "On" and ready["EphemeralStorage"] == storage
    for _ in range(2):
        body, answer = invoke(name, Qualifier="1")
        assert answer["ExecutedVersion"] == "1" and body[:2] == [["before", "after"], "snap-start"]
        assert 900 < body[2] <= 1024, "the disk of /tmp, less what the file system takes"
    assert invoke(name)[0][1] == "on-demand"


def test_a_hook_that_fails_or_hangs_after_the_restore_is_snapstarts_error(client, deploy):
    environment = {"Variables": {"FAIL": "raise"}}
    name = deploy("badhooks", zip_of(app=HOOKS), SnapStart={"ApplyOn": "PublishedVersions"}, Environment=environment)
    client.publish_version(FunctionName=name)
    client.update_function_configuration(FunctionName=name, Environment={"Variables": {"FAIL": "hang"}}, Timeout=1)
    client.get_waiter("function_updated_v2").wait(FunctionName=name)
    client.publish_version(FunctionName=name)
    for version in "12":
        client.get_waiter("published_version_active").wait(FunctionName=name, Qualifier=version)
    with pytest.raises(client.exceptions.SnapStartException, match="no network yet"):
        client.invoke(FunctionName=name, Qualifier="1")
    began = time.monotonic()
    with pytest.raises(client.exceptions.SnapStartTimeoutException, match="within the timeout limit"):
        client.invoke(FunctionName=name, Qualifier="2")
    assert time.monotonic() - began > 9, "hooks have 10 s, whatever the function has"
