"""Function URLs: what curl and browsers see."""

import json

from conftest import ROOT, zip_of

ECHO = """
import base64
def handler(event, context):
    path = event["rawPath"]
    if path == "/plain":
        return {"statusCode": 201, "headers": {"content-type": "text/plain", "x-own": "1"}, "cookies": ["a=1", "b=2"], "body": "made"}
    if path == "/binary":
        return {"statusCode": 200, "headers": {"content-type": "image/png"}, "isBase64Encoded": True, "body": base64.b64encode(b"\\x89PNG\\xff").decode()}
    if path == "/fail":
        raise ValueError("no")
    return event
"""


def test_get_reaches_the_function_as_payload_2_0(gateway, deploy):
    name = deploy("url", zip_of(app=ECHO))
    status, headers, body = gateway.get(f"/fn/{name}/a/b?x=1&x=2&y=%20", headers={"X-One": "1", "Cookie": "c=3; d=4"})
    event = json.loads(body)
    assert status == 200 and headers["content-type"] == "application/json"
    assert event["version"] == "2.0" and event["routeKey"] == "$default" and event["rawPath"] == "/a/b"
    assert event["rawQueryString"] == "x=1&x=2&y=%20" and event["queryStringParameters"] == {"x": "1,2", "y": " "}
    assert event["headers"]["x-one"] == "1" and event["cookies"] == ["c=3", "d=4"]
    assert event["requestContext"]["http"]["method"] == "GET" and event["isBase64Encoded"] is False


def test_post_bodies_arrive_as_text_or_as_base64(gateway):
    event = json.loads(gateway.get("/fn/url/", b'{"k": "v"}', {"content-type": "application/json"})[2])
    assert json.loads(event["body"]) == {"k": "v"} and not event["isBase64Encoded"]
    event = json.loads(gateway.get("/fn/url/", b"\xff\x00", {"content-type": "application/octet-stream"})[2])
    assert event["body"] == "/wA=" and event["isBase64Encoded"]


def test_the_answer_sets_status_headers_cookies_and_bytes(gateway):
    status, headers, body = gateway.get("/fn/url/plain")
    assert (status, headers["x-own"], headers.get_all("set-cookie"), body) == (201, "1", ["a=1", "b=2"], b"made")
    status, headers, body = gateway.get("/fn/url/binary")
    assert (headers["content-type"], body) == ("image/png", b"\x89PNG\xff")


def test_a_failing_function_is_a_bad_gateway(gateway):
    status, _, body = gateway.get("/fn/url/fail")
    assert status == 502 and body == b"Internal Server Error"


def test_an_unknown_function_says_how_to_deploy_one(gateway):
    status, _, body = gateway.get("/fn/nobody/")
    assert status == 404 and b"thaw deploy" in body


def test_a_shell_script_is_a_function(gateway, deploy, invoke):
    name = deploy("shell", zip_of(bootstrap=(ROOT / "examples/shell/bootstrap").read_text()), runtime="provided.al2023", handler="any")
    body, answer = invoke(name, {"from": "test"})
    assert "FunctionError" not in answer and "test" in json.dumps(body)
