"""Node.js functions in real guests: the handlers that Lambda's own runtime takes, and its errors."""

import base64
import http.client
import io
import json
import time
import urllib.parse
import zipfile

import pytest
from conftest import ROOT

RUNTIME = "nodejs18.x"


def node_zip(**files):
    """A zip of modules; index_mjs becomes index.mjs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(".".join(name.rsplit("_", 1)), text)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def node(deploy):
    def node(name, handler="index.handler", memory=256, **files):
        return deploy(name, node_zip(**files), runtime=RUNTIME, handler=handler, timeout=60, MemorySize=memory)

    return node


def test_the_example_is_known_for_node_by_its_index_and_answers(gateway):
    is_made = (gateway.home / "images" / RUNTIME / "manifest.json").exists()
    deployed = gateway.cli("deploy", ROOT / "examples/node", "--timeout", "30")
    assert "/fn/node/" in deployed.stdout
    for step in ["download packages", "compile native parts", "pack the image"]:
        assert is_made or f"runtime image: {step}" in deployed.stderr
    told = json.loads(gateway.cli("invoke", "node", "-d", '{"name": "you"}').stdout)
    assert told["greeting"] == "Hello, you!" and told["node"].startswith("v18.")
    again = json.loads(gateway.cli("invoke", "node").stdout)
    assert again["started"] == told["started"] and again["machine"] != told["machine"]
    status, _, body = gateway.get("/fn/node/?name=url")
    assert status == 200 and json.loads(body)["greeting"] == "Hello, url!"
    gateway.cli("rm", "node")


COMMON = """
exports.async = async (event, context) => ({ event, left: context.getRemainingTimeInMillis(), name: context.functionName,
    env: process.env, cwd: process.cwd(), exe: process.argv0, uid: process.getuid() });
exports.callback = (event, context, callback) =>
    setTimeout(() => event.fail ? callback(new TypeError('by callback')) : callback(null, { later: event }), 20);
exports.failing = async () => { class Refused extends Error { constructor(m) { super(m); this.name = 'Refused'; } } throw new Refused('not today'); };
exports.exiting = async () => process.exit(3);
exports.unhandled = async () => { Promise.reject(new Error('nobody catches it')); await new Promise((r) => setTimeout(r, 5000)); };
exports.handler = (event, context, callback) => exports[event.do](event, context, callback);
"""


@pytest.fixture(scope="module")
def common(node):
    return node("node-common", index_js=COMMON)


def test_an_async_handler_sees_lambdas_context_and_environment(common, invoke):
    told, _ = invoke(common, {"do": "async", "x": [1, "ü"]})
    assert told["event"] == {"do": "async", "x": [1, "ü"]} and 0 < told["left"] <= 60_000
    assert told["name"] == common and told["cwd"] == "/var/task" and told["uid"] != 0
    assert told["env"]["AWS_EXECUTION_ENV"] == "AWS_Lambda_nodejs18.x" and told["env"]["_HANDLER"] == "index.handler"
    folders = "/opt/nodejs/node18/node_modules:/opt/nodejs/node_modules:/var/runtime/node_modules"
    assert told["env"]["NODE_PATH"].startswith(folders)


def test_an_error_has_lambdas_type_message_and_trace_and_is_logged(common, client):
    answer = client.invoke(FunctionName=common, Payload=json.dumps({"do": "failing"}), LogType="Tail")
    told = json.loads(answer["Payload"].read())
    assert answer["FunctionError"] == "Unhandled"
    assert told["errorType"] == "Refused" and told["errorMessage"] == "not today"
    assert told["trace"][0] == "Refused: not today" and any("/var/task/index.js" in line for line in told["trace"])


def test_a_process_that_ends_or_rejects_fails_its_invocation(common, invoke):
    told, answer = invoke(common, {"do": "exiting"})
    assert answer["FunctionError"] == "Unhandled" and told["errorType"] == "Runtime.ExitError"
    told, answer = invoke(common, {"do": "unhandled"})
    assert told["errorType"] == "Runtime.UnhandledPromiseRejection" and "nobody catches it" in told["errorMessage"]
    assert invoke(common, {"do": "async"})[0]["event"] == {"do": "async"}


def test_a_handler_with_a_callback_answers_and_fails_by_it(common, invoke):
    assert invoke(common, {"do": "callback", "a": 1})[0] == {"later": {"do": "callback", "a": 1}}
    told, answer = invoke(common, {"do": "callback", "fail": True})
    assert answer["FunctionError"] == "Unhandled" and (told["errorType"], told["errorMessage"]) == ("TypeError", "by callback")


MODULE = """
import { greet } from './lib/greet.mjs';
const ready = await new Promise((resolve) => setTimeout(() => resolve('top-level await'), 10));
console.log('at start');
export const handler = async (event, context) => { console.log('in the handler'); console.error('in error'); return greet(event.name, ready); };
"""


def test_an_es_module_with_top_level_await_imports_its_neighbour_and_logs(deploy, client):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.mjs", MODULE)
        archive.writestr("lib/greet.mjs", "export const greet = (name, how) => `${name} by ${how}`;")
    name = deploy("node-module", buffer.getvalue(), runtime=RUNTIME, handler="index.handler", timeout=60, MemorySize=256)
    answer = client.invoke(FunctionName=name, Payload=b'{"name": "me"}', LogType="Tail")
    assert json.loads(answer["Payload"].read()) == "me by top-level await"
    log = base64.b64decode(answer["LogResult"]).decode()
    request = answer["ResponseMetadata"]["RequestId"]
    assert f"{request}\tINFO\tin the handler" in log and f"{request}\tERROR\tin error" in log


def test_a_module_that_cannot_be_loaded_answers_with_its_error(node, invoke):
    told, answer = invoke(node("node-broken", index_js="require('./absent')"))
    assert answer["FunctionError"] == "Unhandled" and told["errorType"] == "Runtime.ImportModuleError"
    assert "Cannot find module './absent'" in told["errorMessage"]


def test_newer_node_is_refused_with_what_there_is(client):
    with pytest.raises(client.exceptions.InvalidParameterValueException, match="nodejs18.x"):
        client.create_function(
            FunctionName="node22", Runtime="nodejs22.x", Handler="index.handler", Role="arn:aws:iam::000000000000:role/test",
            Code={"ZipFile": node_zip(index_js=COMMON)},
        )


STREAM = """
export const handler = awslambda.streamifyResponse(async (event, stream) => {
    const response = awslambda.HttpResponseStream.from(stream, { statusCode: 201, headers: { 'Content-Type': 'text/plain', 'X-Mine': 'yes' } });
    for (let piece = 0; piece < 5; piece += 1) {
        response.write(`piece ${piece}\\n`);
        await new Promise((resolve) => setTimeout(resolve, 200));
    }
    if (event.rawQueryString === 'fail') throw new Error('midway');
    response.end();
});
"""


@pytest.fixture(scope="module")
def stream(node):
    return node("node-stream", index_mjs=STREAM)


def test_a_streamed_response_comes_piece_by_piece_with_its_status(gateway, client, stream):
    made = client.create_function_url_config(FunctionName=stream, AuthType="NONE", InvokeMode="RESPONSE_STREAM")
    url = urllib.parse.urlsplit(made["FunctionUrl"])
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    connection.request("GET", url.path)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["X-Mine"]) == (201, "yes")
    times, text = [], b""
    while piece := answer.read1():
        times.append(time.monotonic())
        text += piece
    assert text.decode() == "".join(f"piece {number}\n" for number in range(5))
    assert len(times) >= 3 and times[-1] - times[0] > 0.3, times


def test_a_stream_that_fails_midway_ends_with_the_error(client, stream):
    answer = client.invoke_with_response_stream(FunctionName=stream, Payload=b'{"rawQueryString": "fail"}')
    events = list(answer["EventStream"])
    end = events[-1]["InvokeComplete"]
    assert end["ErrorCode"] == "Unhandled" and json.loads(end["ErrorDetails"])["errorMessage"] == "midway"
    assert b"piece 4" in b"".join(event["PayloadChunk"]["Payload"] for event in events if "PayloadChunk" in event)
