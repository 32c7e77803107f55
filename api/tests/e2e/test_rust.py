"""Functions with the official Rust clients, lambda_runtime and lambda_http, unmodified."""

import json
import subprocess
import time

import pytest
from conftest import ROOT, zip_of


@pytest.fixture(scope="module")
def rust(deploy):
    """rust(program) deploys one of the programs in api/tests/e2e/rust."""
    subprocess.run([ROOT / ".ci/guests"], check=True)

    def rust(program, name=None, **settings):
        built = ROOT / "target/guests/x86_64-unknown-linux-gnu/debug" / program
        code = zip_of(bootstrap=built.read_bytes())
        return deploy(f"rust-{name or program}", code, runtime="provided.al2023", handler="any", **settings)

    return rust


def test_lambda_runtime_streams_and_registers_for_the_shutdown(client, rust):
    name = rust("streams")
    times, text = [], b""
    for event in client.invoke_with_response_stream(FunctionName=name, Payload=b"{}")["EventStream"]:
        if "PayloadChunk" in event:
            times.append(time.monotonic())
            text += event["PayloadChunk"]["Payload"]
        else:
            assert "ErrorCode" not in event["InvokeComplete"]
    # This client always writes an HTTP head in front; a function URL would take it off.
    head, _, pieces = text.partition(bytes(8))
    assert json.loads(head)["statusCode"] == 200
    assert pieces.decode() == "".join(f"piece {number}\n" for number in range(10))
    assert len(times) >= 8 and times[-1] - times[0] > 0.6, times
    answer = client.invoke(FunctionName=name, Payload=b'{"fail": true}')
    assert answer["FunctionError"] == "Unhandled"
    assert json.loads(answer["Payload"].read())["errorMessage"] == "the event asked for a failure"


def test_lambda_http_answers_a_function_url(gateway, rust):
    name = rust("web")
    status, headers, body = gateway.get(f"/fn/{name}/a%20b?name=x&name=y", b"posted", {"X-Test": "1"})
    assert (status, headers["set-cookie"]) == (201, "seen=1")
    answer = json.loads(body)
    assert answer["method"] == "POST" and answer["header"] == "1" and answer["body"] == "posted"
    assert (answer["name"], answer["path"]) == ("x", "/a%20b"), answer


def test_snapstarts_hooks_of_lambda_runtime_run_around_the_snapshot(client, rust, invoke):
    on = {"ApplyOn": "PublishedVersions"}
    name = rust("hooks", SnapStart=on)
    failing = rust("hooks", "hooks-that-fail", SnapStart=on, Environment={"Variables": {"FAIL": "cache"}})
    for function in (name, failing):
        client.publish_version(FunctionName=function)
        client.get_waiter("published_version_active").wait(FunctionName=function, Qualifier="1")
    for _ in range(2):
        assert invoke(name, Qualifier="1")[0] == ["before cache", "before pool", "after pool", "after cache"]
    assert invoke(name)[0] == [], "there are no hooks without SnapStart"
    with pytest.raises(client.exceptions.SnapStartException, match="no network yet"):
        client.invoke(FunctionName=failing, Qualifier="1")
