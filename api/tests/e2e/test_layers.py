"""Layers as unmodified boto3 and the command line use them, on the /opt of real guests."""

import hashlib
import base64
import io
import json
import urllib.request
import zipfile

import pytest
from conftest import ROLE, zip_of

BOOTSTRAP = """#!/bin/sh
while true; do
  headers=$(mktemp)
  curl -sS -D "$headers" -o /tmp/event "http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation/next"
  id=$(sed -n 's/^[Ll]ambda-[Rr]untime-[Aa]ws-[Rr]equest-[Ii]d: *//p' "$headers" | tr -d '\\r')
  curl -sS -o /dev/null -d "[\\"$(tool)\\", \\"$(cat /var/task/name)\\", \\"$_HANDLER\\"]" \\
    "http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation/$id/response"
done
"""


def tree(links=(), **files):
    """A zip with these paths, `__` for a slash; all may be run. Links are (path, target)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name.replace("__", "/"))
            info.external_attr = 0o755 << 16
            archive.writestr(info, text)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = 0o120777 << 16, 3
            archive.writestr(info, target)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def publish(client):
    """publish(name, zip, …) publishes a layer version; all are removed at the end."""
    made = []

    def publish(name, content, **more):
        version = client.publish_layer_version(LayerName=name, Content={"ZipFile": content}, **more)
        made.append((name, version["Version"]))
        return version

    yield publish
    for name, number in made:
        client.delete_layer_version(LayerName=name, VersionNumber=number)


def test_layer_versions_live_and_their_numbers_are_never_given_twice(client, publish):
    content = tree(python__lib="x = 1")
    numbers = []
    for text in ["first", "second"]:
        more = {"CompatibleRuntimes": ["python3.11"], "CompatibleArchitectures": ["x86_64"], "LicenseInfo": "MIT"}
        made = publish("cycle", content, Description=text, **more)
        numbers.append(made["Version"])
        assert made["LayerVersionArn"] == f"{made['LayerArn']}:{made['Version']}"
        assert made["Content"]["CodeSha256"] == base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert (made["Content"]["CodeSize"], made["Description"], made["LicenseInfo"]) == (len(content), text, "MIT")
    first, second = numbers
    assert second == first + 1
    found = client.get_layer_version(LayerName="cycle", VersionNumber=first)
    assert found["Description"] == "first" and found["CompatibleRuntimes"] == ["python3.11"]
    with urllib.request.urlopen(found["Content"]["Location"]) as answer:
        assert answer.read() == content
    by_arn = client.get_layer_version_by_arn(Arn=found["LayerVersionArn"])
    assert by_arn["CreatedDate"] == found["CreatedDate"]
    pages = client.get_paginator("list_layer_versions").paginate(LayerName="cycle", PaginationConfig={"PageSize": 1})
    assert [version["Version"] for page in pages for version in page["LayerVersions"]] == [second, first]
    newest = {layer["LayerName"]: layer["LatestMatchingVersion"]["Version"] for layer in client.list_layers()["Layers"]}
    assert newest["cycle"] == second
    client.delete_layer_version(LayerName="cycle", VersionNumber=second)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_layer_version(LayerName="cycle", VersionNumber=second)
    assert publish("cycle", content)["Version"] == second + 1
    with pytest.raises(client.exceptions.InvalidParameterValueException, match="Could not unzip uploaded file"):
        client.publish_layer_version(LayerName="cycle", Content={"ZipFile": b"no zip"})


def test_a_layers_policy_is_kept(client, publish):
    number = publish("policy", tree(a="b"))["Version"]
    layer = {"LayerName": "policy", "VersionNumber": number}
    client.add_layer_version_permission(StatementId="all", Action="lambda:GetLayerVersion", Principal="*", **layer)
    policy = json.loads(client.get_layer_version_policy(**layer)["Policy"])
    assert [statement["Sid"] for statement in policy["Statement"]] == ["all"]
    client.remove_layer_version_permission(StatementId="all", **layer)
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        client.get_layer_version_policy(**layer)


HANDLER = """
import os, shared, vendored
def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        return type(error).__name__
def write(path):
    try:
        open(path, "w")
    except OSError as error:
        return error.strerror
def handler(event, context):
    return {"shared": shared.NAME, "vendored": vendored.NAME, "tool": os.popen("tool").read(), "path": shared.__file__,
            "link": read("/opt/link"), "folder": read("/opt/swapped"), "write": write("/opt/x"), "top": sorted(os.listdir("/opt"))}
"""


def test_a_function_imports_from_layers_of_which_the_later_wins_and_keeps_them(client, deploy, invoke, publish):
    lower = publish(
        "lower",
        tree(**{"python__shared.py": "NAME = 'lower'", "bin__tool": "#!/bin/sh\nprintf lower", "swapped__x": "gone"}),
    )
    vendored = "python__lib__python3.11__site-packages__vendored.py"
    upper = publish(
        "upper",
        tree(links=[("link", "/opt/swapped")], **{"python__shared.py": "NAME = 'upper'", vendored: "NAME = 'there'", "swapped": "a file"}),
    )
    arns = [lower["LayerVersionArn"], upper["LayerVersionArn"]]
    name = deploy("layered", zip_of(app=HANDLER), Layers=arns)
    shown = client.get_function_configuration(FunctionName=name)["Layers"]
    assert shown == [{"Arn": layer["LayerVersionArn"], "CodeSize": layer["Content"]["CodeSize"]} for layer in (lower, upper)]
    expected = {
        "shared": "upper",
        "vendored": "there",
        "tool": "lower",
        "path": "/opt/python/shared.py",
        "link": "a file",
        "folder": "a file",
        "write": "Read-only file system",
        "top": ["bin", "link", "python", "swapped"],
    }
    assert invoke(name)[0] == expected

    client.publish_version(FunctionName=name)
    client.get_waiter("published_version_active").wait(FunctionName=name, Qualifier="1")
    # Without the layer there is no module; the published version keeps what it had.
    client.delete_layer_version(LayerName="upper", VersionNumber=upper["Version"])
    client.update_function_configuration(FunctionName=name, Layers=[arns[0]])
    client.get_waiter("function_updated_v2").wait(FunctionName=name)
    body, answer = invoke(name)
    assert answer["FunctionError"] and "No module named 'vendored'" in body["errorMessage"]
    assert invoke(name, Qualifier="1")[0] == expected
    assert len(client.get_function_configuration(FunctionName=name, Qualifier="1")["Layers"]) == 2
    with pytest.raises(client.exceptions.InvalidParameterValueException, match=f"Layer version {arns[1]} does not exist."):
        client.update_function_configuration(FunctionName=name, Layers=arns)


def test_a_provided_functions_bootstrap_comes_from_a_layer_by_the_command_line(gateway, client, invoke, tmp_path):
    layer, code = tmp_path / "runtime", tmp_path / "code"
    (layer / "bin").mkdir(parents=True)
    code.mkdir()
    for path, text in [(layer / "bootstrap", BOOTSTRAP), (layer / "bin/tool", "#!/bin/sh\nprintf tool\n")]:
        path.write_text(text)
        path.chmod(0o755)
    (code / "name").write_text("from-a-layer")
    printed = gateway.cli("layers", "publish", "shell-runtime", str(layer), "--description", "a shell").stdout
    version = printed.split()[1]
    assert version.startswith("shell-runtime:")
    assert "a shell" in gateway.cli("layers", "ls").stdout
    options = ("--runtime", "provided", "--handler", "any", "--timeout", "30", "--layer", version)
    gateway.cli("deploy", str(code), "--name", "by-layer", *options)
    try:
        assert invoke("by-layer")[0] == ["tool", "from-a-layer", "any"]
    finally:
        client.delete_function(FunctionName="by-layer")
        gateway.cli("layers", "rm", *version.split(":"))
    refused = gateway.cli("deploy", str(code), "--name", "by-layer", *options, check=False)
    assert refused.returncode != 0 and f"there is no layer version {version}" in refused.stderr


def test_a_function_has_at_most_five_layers(client, publish):
    arns = [publish(f"many-{number}", tree(a="b"))["LayerVersionArn"] for number in range(6)]
    with pytest.raises(client.exceptions.InvalidParameterValueException, match="Cannot reference more than 5 layers."):
        client.create_function(
            FunctionName="too-many", Runtime="python3.11", Handler="app.handler", Role=ROLE, Code={"ZipFile": zip_of(app="")}, Layers=arns
        )
