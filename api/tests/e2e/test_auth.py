"""The gateway with auth on: unmodified boto3 and AWS CLI with keys of `thaw keys`, and nobody else."""

import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import boto3
import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from conftest import ROLE, THAW, zip_of

ARN = "arn:aws:lambda:us-east-1:000000000000:function:hello"


@pytest.fixture(scope="module")
def guarded(gateway, hello):
    """The session's gateway, with auth on as long as this module runs."""
    gateway.stop()
    gateway.options = ("--auth",)
    yield gateway.start()
    gateway.stop()
    gateway.options = ()
    gateway.start()


def run(*arguments):
    return subprocess.run([THAW, *arguments], capture_output=True, text=True, timeout=60)


def key(gateway, *options):
    return json.loads(gateway.cli("--json", "keys", "create", *options).stdout)


def client(gateway, key, **options):
    config = Config(read_timeout=120, retries={"total_max_attempts": 1})
    credentials = {"aws_access_key_id": key["access_key_id"], "aws_secret_access_key": key["secret_access_key"]}
    return boto3.client("lambda", endpoint_url=gateway.url, config=config, **({"region_name": "us-east-1"} | credentials | options))


def refused(call, **arguments):
    with pytest.raises(ClientError) as error:
        call(**arguments)
    return error.value.response["Error"]["Code"], error.value.response["ResponseMetadata"]["HTTPStatusCode"]


@pytest.fixture(scope="module")
def manager(guarded):
    return key(guarded, "--name", "manager")


def test_boto3_names_functions_in_every_way_with_a_key(guarded, manager):
    boto = client(guarded, manager)
    for name in ["hello", "000000000000:hello", ARN, ARN + ":$LATEST"]:
        answer = boto.invoke(FunctionName=name, Payload=b'{"name": "key"}', LogType="Tail", ClientContext="e30=")
        assert json.loads(answer["Payload"].read())["greeting"] == "Hello, key!", name
    assert [f["FunctionName"] for f in boto.list_functions(MaxItems=50)["Functions"]].count("hello") == 1
    location = boto.get_function(FunctionName=ARN)["Code"]["Location"]
    with urllib.request.urlopen(location) as answer:
        assert answer.read(2) == b"PK"
    assert guarded.get("/thaw/v1/functions/hello/code")[0] == 403


def test_nobody_else_is_let_in(guarded, manager):
    assert refused(guarded.client().list_functions) == ("UnrecognizedClientException", 403)
    wrong = client(guarded, manager, aws_secret_access_key="wrong")
    assert refused(wrong.list_functions) == ("InvalidSignatureException", 403)
    code = zip_of(app="x = 1" + "0" * 3_000_000)
    create = {"FunctionName": "f", "Runtime": "python3.11", "Handler": "a.b", "Role": ROLE, "Code": {"ZipFile": code}}
    assert refused(wrong.create_function, **create) == ("InvalidSignatureException", 403)
    elsewhere = client(guarded, manager, region_name="eu-west-1")
    assert refused(elsewhere.list_functions) == ("InvalidSignatureException", 403)
    for path in ["/2015-03-31/functions", "/thaw/v1/functions", "/thaw/v1/keys", "/fn/hello/"]:
        assert guarded.get(path)[0] == 403, path
    assert guarded.get("/healthz")[0] == 200


def test_a_key_may_what_it_was_made_for(guarded):
    invoker = key(guarded, "--allow", "invoke", "--function", "hel*")
    boto = client(guarded, invoker)
    assert boto.invoke(FunctionName="hello", Payload=b"{}")["StatusCode"] == 200
    denied = ("AccessDeniedException", 403)
    assert refused(boto.delete_function, FunctionName="hello") == denied
    assert refused(boto.get_function, FunctionName="hello") == denied
    assert refused(boto.list_functions) == denied
    assert refused(boto.invoke, FunctionName="other", Payload=b"{}") == denied
    guarded.cli("keys", "limit", invoker["access_key_id"], "--concurrency", "2")
    assert "2 at once" in guarded.cli("keys", "ls").stdout
    guarded.cli("keys", "disable", invoker["access_key_id"])
    assert refused(boto.invoke, FunctionName="hello", Payload=b"{}") == ("UnrecognizedClientException", 403)
    guarded.cli("keys", "rm", invoker["access_key_id"])
    assert invoker["access_key_id"] not in guarded.cli("keys", "ls").stdout


def test_function_urls_take_signed_and_presigned_requests(guarded, manager):
    credentials = Credentials(manager["access_key_id"], manager["secret_access_key"])
    url = guarded.url + "/fn/hello/a%20b?name=url&x=%3A"
    for body, signer in [
        (b'{"name": "body"}', SigV4Auth(credentials, "lambda", "us-east-1")),
        (None, SigV4QueryAuth(credentials, "lambda", "us-east-1", expires=60)),
    ]:
        request = AWSRequest("POST" if body else "GET", url, data=body)
        signer.add_auth(request)
        headers = dict(request.headers.items())
        with urllib.request.urlopen(urllib.request.Request(request.url, body, headers, method=request.method)) as answer:
            assert answer.status == 200
    status, _, answer = guarded.get("/fn/hello/")
    assert status == 403 and b"Forbidden" in answer


def test_the_aws_cli_takes_a_key(guarded, manager, tmp_path):
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": manager["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": manager["secret_access_key"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [pathlib.Path(sys.executable).parent / "aws", "--endpoint-url", guarded.url, "lambda", "invoke"]
    command += ["--function-name", ARN, "--payload", '{"name": "aws"}', tmp_path / "answer"]
    subprocess.run(command, check=True, env=environment, timeout=120, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "answer").read_text())["greeting"] == "Hello, aws!"


def test_the_command_line_of_this_home_needs_no_key_and_another_does(guarded, tmp_path):
    assert "hello" in guarded.cli("ls").stdout
    assert json.loads(guarded.cli("invoke", "hello", "-d", '{"name": "cli"}').stdout)["greeting"] == "Hello, cli!"
    for name in ["root-key", "thaw.db"]:
        assert (guarded.home / name).stat().st_mode & 0o777 == 0o600
    stranger = run("--home", tmp_path, "--endpoint", guarded.url, "ls")
    assert stranger.returncode == 1 and "asks for a key" in stranger.stderr


def test_keys_are_made_before_there_is_a_gateway_but_not_beside_one(guarded, tmp_path):
    nowhere = ["--endpoint", "http://127.0.0.1:1", "--json", "keys"]
    options = ["--name", "early", "--allow", "invoke", "--rate", "50", "--burst", "100", "--memory-mib", "4096"]
    made = json.loads(run("--home", tmp_path, *nowhere, "create", *options).stdout)
    run("--home", tmp_path, *nowhere, "limit", made["access_key_id"], "--rate", "20", "--burst", "none")
    listed = run("--home", tmp_path, *nowhere, "ls").stdout
    assert [found["access_key_id"] for found in json.loads(listed)["keys"]] == [made["access_key_id"]]
    assert json.loads(listed)["keys"][0]["limits"] == {"rate": 20, "memory_mib": 4096}
    assert made["secret_access_key"] not in listed and (tmp_path / "thaw.db").stat().st_mode & 0o777 == 0o600
    beside = run("--home", guarded.home, *nowhere, "create")
    assert beside.returncode == 1 and "name it with --endpoint" in beside.stderr
