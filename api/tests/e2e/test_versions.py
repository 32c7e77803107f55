"""Versions, aliases, concurrency, URLs and asynchronous invocation as unmodified boto3 and AWS CLI use them."""

import json
import os
import subprocess
import sys
import time

import pytest
from botocore.exceptions import ClientError
from conftest import zip_of


def answers(text):
    return zip_of(app=f"import os\ndef handler(event, context):\n    return [{text!r}, os.environ['AWS_LAMBDA_FUNCTION_VERSION'], context.function_version]")


@pytest.fixture(scope="module")
def versioned(client, deploy):
    """A function with the versions 1 and 2."""
    name = deploy("versioned", answers("one"))
    first = client.publish_version(FunctionName=name, Description="the first")
    assert first["Version"] == "1" and first["Description"] == "the first" and first["State"] == "Active"
    second = client.update_function_code(FunctionName=name, ZipFile=answers("two"), Publish=True)
    assert second["Version"] == "2"
    client.get_waiter("function_updated_v2").wait(FunctionName=name)
    client.get_waiter("published_version_active").wait(FunctionName=name, Qualifier="2")
    return name


def test_each_version_answers_with_its_own_code(client, versioned, invoke):
    for qualifier, expected in [("1", ["one", "1", "1"]), ("2", ["two", "2", "2"]), ("$LATEST", ["two"] + ["$LATEST"] * 2)]:
        body, answer = invoke(versioned, Qualifier=qualifier)
        assert (body, answer["ExecutedVersion"]) == (expected, qualifier)
    again = client.publish_version(FunctionName=versioned)
    assert again["Version"] == "2", "nothing has changed"
    pages = client.get_paginator("list_versions_by_function").paginate(FunctionName=versioned, PaginationConfig={"PageSize": 1})
    assert [version["Version"] for page in pages for version in page["Versions"]] == ["$LATEST", "1", "2"]


def test_an_alias_names_a_version_and_divides_invocations(client, versioned, invoke):
    made = client.create_alias(FunctionName=versioned, Name="live", FunctionVersion="1")
    assert made["AliasArn"].endswith(f":{versioned}:live")
    body, answer = invoke(f"{versioned}:live")
    assert body[0] == "one" and answer["ExecutedVersion"] == "1"
    client.update_alias(FunctionName=versioned, Name="live", RoutingConfig={"AdditionalVersionWeights": {"2": 0.5}})
    executed = {invoke(versioned, Qualifier="live")[1]["ExecutedVersion"] for _ in range(30)}
    assert executed == {"1", "2"}
    with pytest.raises(client.exceptions.ResourceConflictException):
        client.delete_function(FunctionName=versioned, Qualifier="2")
    with pytest.raises(client.exceptions.PreconditionFailedException):
        client.update_alias(FunctionName=versioned, Name="live", RevisionId=made["RevisionId"])
    assert [alias["Name"] for alias in client.list_aliases(FunctionName=versioned)["Aliases"]] == ["live"]
    assert client.get_alias(FunctionName=versioned, Name="live")["FunctionVersion"] == "1"
    client.delete_alias(FunctionName=versioned, Name="live")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_alias(FunctionName=versioned, Name="live")


def test_the_aws_cli_publishes_and_tags(gateway, versioned):
    environment = os.environ | {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}

    def aws(*arguments):
        command = [sys.executable, "-m", "awscli", "--endpoint-url", gateway.url, "lambda", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout or "null")

    assert aws("publish-version", "--function-name", versioned)["Version"] == "2"
    arn = aws("get-function-configuration", "--function-name", versioned)["FunctionArn"]
    aws("tag-resource", "--resource", arn, "--tags", "team=ours")
    assert aws("list-tags", "--resource", arn) == {"Tags": {"team": "ours"}}
    aws("untag-resource", "--resource", arn, "--tag-keys", "team")
    assert aws("list-tags", "--resource", arn) == {"Tags": {}}
    assert aws("get-account-settings")["AccountLimit"]["ConcurrentExecutions"] == 1000


def test_reserved_concurrency_throttles_with_its_reason(client, versioned):
    client.put_function_concurrency(FunctionName=versioned, ReservedConcurrentExecutions=0)
    assert client.get_function_concurrency(FunctionName=versioned)["ReservedConcurrentExecutions"] == 0
    with pytest.raises(client.exceptions.TooManyRequestsException) as error:
        client.invoke(FunctionName=versioned, Qualifier="1")
    assert error.value.response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert error.value.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "1"
    client.delete_function_concurrency(FunctionName=versioned)
    assert client.invoke(FunctionName=versioned)["StatusCode"] == 200


def test_a_url_of_an_alias_is_configured_called_and_removed(client, gateway, versioned):
    client.create_alias(FunctionName=versioned, Name="web", FunctionVersion="1")
    cors = {"AllowOrigins": ["https://a.example"], "AllowMethods": ["GET"]}
    made = client.create_function_url_config(FunctionName=versioned, Qualifier="web", AuthType="NONE", Cors=cors)
    status, headers, body = gateway.get(made["FunctionUrl"].removeprefix(gateway.url), headers={"Origin": "https://a.example"})
    assert status == 200 and json.loads(body)[0] == "one" and headers["Access-Control-Allow-Origin"] == "https://a.example"
    listed = client.list_function_url_configs(FunctionName=versioned)["FunctionUrlConfigs"]
    assert [url["FunctionArn"] for url in listed] == [made["FunctionArn"]]
    changed = client.update_function_url_config(FunctionName=versioned, Qualifier="web", AuthType="AWS_IAM")
    assert changed["AuthType"] == "AWS_IAM" and changed["Cors"] == cors
    assert client.get_function_url_config(FunctionName=versioned, Qualifier="web")["AuthType"] == "AWS_IAM"
    client.delete_function_url_config(FunctionName=versioned, Qualifier="web")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function_url_config(FunctionName=versioned, Qualifier="web")
    client.delete_alias(FunctionName=versioned, Name="web")


def test_events_run_later_and_their_destination_is_told(client, gateway, deploy, versioned):
    sink = deploy("told", zip_of(app="def handler(event, context): print('told', event['responsePayload'], flush=True)"))
    arn = client.get_function_configuration(FunctionName=sink)["FunctionArn"]
    made = client.put_function_event_invoke_config(
        FunctionName=versioned, MaximumRetryAttempts=1, DestinationConfig={"OnSuccess": {"Destination": arn}}
    )
    assert made["LastModified"].timestamp() == pytest.approx(time.time(), abs=60)
    merged = client.update_function_event_invoke_config(FunctionName=versioned, MaximumEventAgeInSeconds=60)
    assert merged["MaximumRetryAttempts"] == 1 and merged["DestinationConfig"]["OnSuccess"]["Destination"] == arn
    assert client.get_function_event_invoke_config(FunctionName=versioned)["MaximumEventAgeInSeconds"] == 60
    listed = client.list_function_event_invoke_configs(FunctionName=versioned)["FunctionEventInvokeConfigs"]
    assert len(listed) == 1
    assert client.invoke(FunctionName=versioned, InvocationType="Event", Payload=b"{}")["StatusCode"] == 202
    assert client.invoke_async(FunctionName=versioned, InvokeArgs=b"{}")["Status"] == 202
    deadline = time.monotonic() + 60
    while gateway.cli("logs", sink).stdout.count("told ['two', '$LATEST', '$LATEST']") < 2:
        assert time.monotonic() < deadline, gateway.cli("logs", sink).stdout
        time.sleep(0.1)
    client.delete_function_event_invoke_config(FunctionName=versioned)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_function_event_invoke_config(FunctionName=versioned)


def test_settings_are_changed_for_latest_alone_and_a_stale_revision_is_refused(client, versioned, invoke):
    code = zip_of(app="import os\ndef handler(event, context): return os.environ.get('WORD')")
    checked = client.update_function_code(FunctionName=versioned, ZipFile=code, DryRun=True)
    assert checked["CodeSha256"] == client.get_function_configuration(FunctionName=versioned)["CodeSha256"]
    stale = client.update_function_code(FunctionName=versioned, ZipFile=code)["RevisionId"]
    client.get_waiter("function_updated_v2").wait(FunctionName=versioned)
    current = client.get_function_configuration(FunctionName=versioned)["RevisionId"]
    changed = client.update_function_configuration(
        FunctionName=versioned, RevisionId=current, MemorySize=192, Environment={"Variables": {"WORD": "changed"}}
    )
    assert changed["LastUpdateStatus"] == "InProgress" and changed["MemorySize"] == 192
    client.get_waiter("function_updated_v2").wait(FunctionName=versioned)
    assert invoke(versioned)[0] == "changed" and invoke(versioned, Qualifier="2")[0][0] == "two"
    with pytest.raises(client.exceptions.PreconditionFailedException):
        client.update_function_configuration(FunctionName=versioned, RevisionId=stale, Timeout=9)


def test_a_version_is_deleted_alone(client, versioned):
    client.delete_function(FunctionName=versioned, Qualifier="1")
    with pytest.raises(ClientError) as error:
        client.invoke(FunctionName=versioned, Qualifier="1")
    assert error.value.response["Error"]["Code"] == "ResourceNotFoundException"
    assert client.invoke(FunctionName=versioned, Qualifier="2")["StatusCode"] == 200


def test_provisioned_concurrency_keeps_machines_ready(client, versioned, invoke):
    client.create_alias(FunctionName=versioned, Name="warm", FunctionVersion="2")
    with pytest.raises(client.exceptions.ProvisionedConcurrencyConfigNotFoundException):
        client.get_provisioned_concurrency_config(FunctionName=versioned, Qualifier="warm")
    wanted = client.put_provisioned_concurrency_config(FunctionName=versioned, Qualifier="warm", ProvisionedConcurrentExecutions=2)
    assert wanted["RequestedProvisionedConcurrentExecutions"] == 2
    deadline = time.monotonic() + 60
    while (config := client.get_provisioned_concurrency_config(FunctionName=versioned, Qualifier="warm"))["Status"] != "READY":
        assert config["Status"] == "IN_PROGRESS" and time.monotonic() < deadline, config
        time.sleep(0.1)
    assert config["AllocatedProvisionedConcurrentExecutions"] == 2
    assert invoke(versioned, Qualifier="warm")[0] == ["two", "2", "2"]
    listed = client.list_provisioned_concurrency_configs(FunctionName=versioned)["ProvisionedConcurrencyConfigs"]
    assert [config["FunctionArn"].rsplit(":", 1)[1] for config in listed] == ["warm"]
    client.delete_provisioned_concurrency_config(FunctionName=versioned, Qualifier="warm")
    client.delete_alias(FunctionName=versioned, Name="warm")


def test_a_policy_is_written_and_read_back(client, versioned):
    statement = {"StatementId": "anyone", "Action": "lambda:InvokeFunctionUrl", "Principal": "*", "FunctionUrlAuthType": "NONE"}
    made = json.loads(client.add_permission(FunctionName=versioned, **statement)["Statement"])
    assert made["Condition"] == {"StringEquals": {"lambda:FunctionUrlAuthType": "NONE"}}
    assert json.loads(client.get_policy(FunctionName=versioned)["Policy"])["Statement"] == [made]
    client.remove_permission(FunctionName=versioned, StatementId="anyone")
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_policy(FunctionName=versioned)


def test_what_deployment_tools_read_of_every_function(client, versioned):
    assert "CodeSigningConfigArn" not in client.get_function_code_signing_config(FunctionName=versioned)
    assert client.get_runtime_management_config(FunctionName=versioned)["UpdateRuntimeOn"] == "Auto"
    assert client.list_event_source_mappings(FunctionName=versioned)["EventSourceMappings"] == []
    assert client.list_code_signing_configs()["CodeSigningConfigs"] == []
    assert client.put_runtime_management_config(FunctionName=versioned, UpdateRuntimeOn="Auto")["UpdateRuntimeOn"] == "Auto"
    client.put_function_recursion_config(FunctionName=versioned, RecursiveLoop="Allow")
    assert client.get_function_recursion_config(FunctionName=versioned)["RecursiveLoop"] == "Allow"


def test_there_are_no_mappings_and_no_signing_configurations(client, versioned):
    mapping = {"UUID": "00000000-0000-4000-8000-000000000000"}
    signing = {"CodeSigningConfigArn": "arn:aws:lambda:us-east-1:000000000000:code-signing-config:csc-0123456789abcdef0"}
    missing = client.exceptions.ResourceNotFoundException
    for ask in [
        lambda: client.get_event_source_mapping(**mapping),
        lambda: client.update_event_source_mapping(**mapping),
        lambda: client.delete_event_source_mapping(**mapping),
        lambda: client.get_code_signing_config(**signing),
        lambda: client.update_code_signing_config(**signing),
        lambda: client.delete_code_signing_config(**signing),
        lambda: client.list_functions_by_code_signing_config(**signing),
    ]:
        with pytest.raises(missing):
            ask()
    with pytest.raises(client.exceptions.CodeSigningConfigNotFoundException):
        client.put_function_code_signing_config(FunctionName=versioned, **signing)
    client.delete_function_code_signing_config(FunctionName=versioned)
