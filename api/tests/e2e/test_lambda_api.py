"""The Lambda API as unmodified boto3 and AWS CLI use it."""

import base64
import json
import os
import subprocess
import sys
import time

import pytest
from botocore.exceptions import ClientError
from conftest import ROLE, zip_of


def code_of(error):
    return error.value.response["Error"]["Code"], error.value.response["ResponseMetadata"]["HTTPStatusCode"]


def test_a_function_is_described_as_lambda_describes_it(client, hello):
    function = client.get_function(FunctionName=hello)
    configuration = function["Configuration"]
    assert configuration["State"] == "Active" and configuration["LastUpdateStatus"] == "Successful"
    assert configuration["FunctionArn"] == f"arn:aws:lambda:us-east-1:000000000000:function:{hello}"
    assert configuration["Environment"]["Variables"] == {"GREETING": "hi"}
    assert function["Code"]["RepositoryType"] == "S3"
    by_arn = client.get_function_configuration(FunctionName=configuration["FunctionArn"])
    assert by_arn["CodeSha256"] == configuration["CodeSha256"]


def test_functions_are_listed_page_by_page_and_a_deleted_one_is_gone(client, deploy, hello):
    name = deploy("short-lived", zip_of(app="def handler(e, c): return 2"))
    pages = client.get_paginator("list_functions").paginate(PaginationConfig={"PageSize": 1})
    names = [function["FunctionName"] for page in pages for function in page["Functions"]]
    assert {hello, name} <= set(names) and len(names) == len(set(names))
    client.delete_function(FunctionName=name)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function(FunctionName=name)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.delete_function(FunctionName=name)


def test_an_invocation_answers_with_payload_version_and_log_tail(hello, invoke):
    body, answer = invoke(hello, {"name": "boto3"}, LogType="Tail")
    assert body["greeting"] == "Hello, boto3!"
    assert answer["StatusCode"] == 200 and "FunctionError" not in answer and answer["ExecutedVersion"] == "$LATEST"
    lines = base64.b64decode(answer["LogResult"]).decode().splitlines()
    request = answer["ResponseMetadata"]["RequestId"]
    assert lines[0] == f"START RequestId: {request} Version: $LATEST"
    assert any(line.startswith(f"request {request}") for line in lines)
    assert f"END RequestId: {request}" in lines and lines[-1].startswith(f"REPORT RequestId: {request}")


PROBE = """
import getpass, os, pathlib, resource, socket, sys, time
seen = []
def lambdas():
    limits = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_CORE, resource.RLIMIT_STACK)
    owned = {path: os.stat(path) for path in ("/var/task", "/opt", "/tmp", "/lambda-entrypoint.sh")}
    return {"path": sys.path, "utf8": sys.flags.utf8_mode, "limits": [resource.getrlimit(one) for one in limits],
            "owned": {path: [of.st_uid, of.st_gid, oct(of.st_mode)] for path, of in owned.items()},
            "read-only": bool(os.statvfs("/var/task").f_flag & os.ST_RDONLY and os.statvfs("/opt").f_flag & os.ST_RDONLY),
            "user": getpass.getuser(), "sandbox": socket.gethostbyname("sandbox.localdomain")}
def handler(event, context):
    mark = pathlib.Path("/tmp/mark")
    found = [mark.exists(), list(seen)]
    mark.write_text("here")
    seen.append(context.aws_request_id)
    return lambdas() | {"found": found, "host": os.uname().nodename, "random": os.urandom(16).hex(),
            "env": dict(os.environ), "uid": os.getuid(), "cwd": os.getcwd(), "time": time.time(),
            "remaining": context.get_remaining_time_in_millis(), "memory": context.memory_limit_in_mb, "arn": context.invoked_function_arn}
"""


# As in Lambda's developer guide: options go between the interpreter and its one argument.
WRAPPER = """#!/bin/bash
set -- "${@:1:$#-1}" -X utf8 "${@: -1}"
WRAPPED="$*" exec "$@"
"""


@pytest.fixture(scope="module")
def probe(deploy):
    variables = {"MINE": "yes", "AWS_LAMBDA_EXEC_WRAPPER": "/var/task/bootstrap"}
    return deploy("probe", zip_of(app=PROBE, bootstrap=WRAPPER), MemorySize=192, Environment={"Variables": variables})


def test_every_invocation_gets_a_pristine_machine(probe, invoke):
    answers = [invoke(probe)[0] for _ in range(4)]
    assert [answer["found"] for answer in answers] == [[False, []]] * 4
    assert len({answer["host"] for answer in answers}) == len({answer["random"] for answer in answers}) == 4


def test_the_environment_is_lambdas(probe, invoke):
    body, _ = invoke(probe)
    env = body["env"]
    assert env["MINE"] == "yes" and env["_HANDLER"] == "app.handler" and env["AWS_LAMBDA_FUNCTION_NAME"] == probe
    assert env["AWS_EXECUTION_ENV"] == "AWS_Lambda_python3.11" and env["TZ"] == ":UTC"
    assert env["PYTHONPATH"] == "/var/runtime" and env["PWD"] == "/var/task" and env["SHLVL"] == "0"
    assert env["AWS_XRAY_CONTEXT_MISSING"] == "LOG_ERROR" and body["utf8"] == 1
    assert env["WRAPPED"] == "/usr/bin/python3.11 -X utf8 /var/runtime/thaw_runtime.py"
    assert body["path"][:4] == ["/var/task", "/opt/python/lib/python3.11/site-packages", "/opt/python", "/var/runtime"]
    assert body["limits"] == [[1024] * 2, [65536] * 2, [10737418240] * 2, [8388608, -1]] and body["user"] == "sbx_user1051"
    owned = {"/var/task": "0o40755", "/opt": "0o40755", "/tmp": "0o41777", "/lambda-entrypoint.sh": "0o100755"}
    assert body["owned"] == {path: [0, 0, mode] for path, mode in owned.items()} and body["read-only"]
    assert body["sandbox"] == "127.0.0.1"
    assert body["uid"] != 0 and body["cwd"] == "/var/task" and str(body["memory"]) == "192"
    assert abs(body["time"] - time.time()) < 60, "the guest's wall clock is wrong after the restore"
    assert 0 < body["remaining"] <= 30_000
    assert body["arn"].endswith(":function:probe")


def test_dry_run_does_not_run(client, hello):
    assert client.invoke(FunctionName=hello, InvocationType="DryRun")["StatusCode"] == 204


def test_an_unknown_function_is_not_found(client):
    with pytest.raises(ClientError) as error:
        client.invoke(FunctionName="nobody")
    assert code_of(error) == ("ResourceNotFoundException", 404)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function(FunctionName="nobody")


def test_a_broken_zip_is_refused_at_once(client):
    with pytest.raises(ClientError) as error:
        client.create_function(
            FunctionName="broken", Runtime="python3.11", Handler="a.b", Role=ROLE, Code={"ZipFile": b"this is no zip"}
        )
    assert code_of(error) == ("InvalidParameterValueException", 400)
    assert "Could not unzip uploaded file" in str(error.value)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function(FunctionName="broken")


def test_a_taken_name_is_a_conflict(client, hello):
    with pytest.raises(client.exceptions.ResourceConflictException):
        client.create_function(
            FunctionName=hello, Runtime="python3.11", Handler="a.b", Role=ROLE, Code={"ZipFile": zip_of(a="")}
        )


@pytest.fixture(scope="module")
def sizes(deploy):
    code = """
import logging
def handler(event, context):
    logging.getLogger().warning("sized")
    return 'x' * event if isinstance(event, int) else len(event['filler'])
"""
    return deploy("sizes", zip_of(app=code), LoggingConfig={"LogFormat": "JSON"})


def test_a_log_of_json_is_json_line_by_line(sizes, invoke):
    _, answer = invoke(sizes, 1, LogType="Tail")
    lines = [json.loads(line) for line in base64.b64decode(answer["LogResult"]).decode().splitlines()]
    assert [line.get("type", line.get("message")) for line in lines] == ["platform.start", "sized", "platform.report"]
    assert lines[1]["level"] == "WARNING" and lines[1]["requestId"] == lines[0]["record"]["requestId"]


def test_a_request_over_6_mb_is_refused_and_one_below_it_passes(sizes, invoke):
    with pytest.raises(ClientError) as error:
        invoke(sizes, {"filler": "x" * (6 * 1024 * 1024)})
    assert code_of(error) == ("RequestTooLargeException", 413)
    assert invoke(sizes, {"filler": "x" * 5_000_000})[0] == 5_000_000


def test_a_response_over_the_limit_is_the_functions_error(sizes, invoke):
    body, answer = invoke(sizes, 6_500_000)
    assert answer["FunctionError"] == "Unhandled" and body["errorType"] == "Function.ResponseSizeTooLarge"
    assert len(invoke(sizes, 6_000_000)[0]) == 6_000_000


def test_an_operation_that_is_not_served_says_so_in_lambdas_shape(client):
    with pytest.raises(client.exceptions.InvalidParameterValueException, match="CreateEventSourceMapping is not supported"):
        client.create_event_source_mapping(FunctionName="any")


def test_the_aws_cli_creates_invokes_lists_and_deletes(gateway, tmp_path):
    (tmp_path / "code.zip").write_bytes(zip_of(app="def handler(event, context): return {'got': event}"))
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }

    def aws(*arguments):
        command = [sys.executable, "-m", "awscli", "--endpoint-url", gateway.url, "lambda", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    aws("create-function", "--function-name", "by-cli", "--runtime", "python3.11", "--handler", "app.handler", "--role", ROLE,
        "--timeout", "30", "--zip-file", "fileb://code.zip")
    aws("wait", "function-active-v2", "--function-name", "by-cli")
    aws("invoke", "--function-name", "by-cli", "--payload", '{"a": 1}', "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"got": {"a": 1}}
    assert "by-cli" in aws("list-functions")
    aws("delete-function", "--function-name", "by-cli")
    assert "by-cli" not in aws("list-functions")
