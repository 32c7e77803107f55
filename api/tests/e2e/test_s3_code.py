"""Code from an S3-compatible store: a small one, that judges signatures with botocore's own signer."""

import http.server
import threading
import urllib.parse

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from conftest import ROLE, S3_KEY, S3_PORT, S3_SECRET, zip_of

CODE = zip_of(app="def handler(event, context): return 'from s3'")
OBJECTS = {"/code/a b/app.zip": CODE}


def refusal(code, message):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


class Store(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = self.answer()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        if self.headers["Authorization"] != self.expected():
            return 403, refusal("SignatureDoesNotMatch", "another signature was expected")
        body = OBJECTS.get(urllib.parse.unquote(self.path))
        return (200, body) if body else (404, refusal("NoSuchKey", "The specified key does not exist."))

    def expected(self):
        """The Authorization of this request as botocore makes it, at the time that the request names."""
        signed = {name: self.headers[name] for name in ("host", "x-amz-content-sha256", "x-amz-date")}
        request = AWSRequest("GET", f"http://{signed['host']}{self.path}", headers=dict(signed))
        request.context["timestamp"] = signed["x-amz-date"]
        auth = S3SigV4Auth(Credentials(S3_KEY, S3_SECRET), "s3", "us-east-1")
        text = auth.string_to_sign(request, auth.canonical_request(request))
        signature = auth.signature(text, request)
        names = auth.signed_headers(auth.headers_to_sign(request))
        return f"AWS4-HMAC-SHA256 Credential={auth.scope(request)}, SignedHeaders={names}, Signature={signature}"

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def store():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", S3_PORT), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def test_a_store_that_cannot_be_reached_is_named(client):
    """Before the one that starts the store: nothing listens there yet."""
    with pytest.raises(client.exceptions.ServiceException, match="the S3 endpoint http://.* cannot be read"):
        client.create_function(
            FunctionName="unstored", Runtime="python3.11", Handler="app.handler", Role=ROLE,
            Code={"S3Bucket": "code", "S3Key": "x.zip"},
        )


def test_a_function_is_made_from_s3_and_given_other_code_from_there(client, store, invoke):
    client.create_function(
        FunctionName="stored", Runtime="python3.11", Handler="app.handler", Role=ROLE, Timeout=30,
        Code={"S3Bucket": "code", "S3Key": "a b/app.zip"},
    )
    client.get_waiter("function_active_v2").wait(FunctionName="stored")
    assert invoke("stored")[0] == "from s3"
    refused = "S3 Error Code: NoSuchKey. S3 Error Message: The specified key does not exist."
    with pytest.raises(client.exceptions.InvalidParameterValueException, match=refused):
        client.update_function_code(FunctionName="stored", S3Bucket="code", S3Key="absent.zip")
    with pytest.raises(client.exceptions.InvalidParameterValueException, match="no usable key"):
        client.update_function_code(FunctionName="stored", S3Bucket="code", S3Key="../code/absent.zip")
    updated = client.update_function_code(FunctionName="stored", S3Bucket="code", S3Key="a b/app.zip", DryRun=True)
    assert updated["CodeSize"] == len(CODE)
    client.delete_function(FunctionName="stored")
