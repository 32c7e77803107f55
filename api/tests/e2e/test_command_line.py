"""The command line as a person uses it: a project is written, deployed, changed, watched; mistakes are told with their remedy."""

import contextlib
import json
import signal
import subprocess
import time

import pytest
from conftest import THAW


@pytest.fixture
def named(gateway):
    """named(name) is a function that is removed at the end."""
    made = []

    def named(name):
        made.append(name)
        return name

    yield named
    gateway.cli("rm", *made)


def test_a_reader_that_has_had_enough_ends_what_prints():
    command = [THAW, "completions", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == -signal.SIGPIPE


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def answer(gateway, name, event="{}"):
    return json.loads(gateway.cli("invoke", name, "-d", event).stdout)


def test_a_project_is_written_deployed_and_deployed_again_only_where_it_changes(gateway, named, tmp_path):
    root, name = tmp_path / "shop", named("cli-shop")
    written = gateway.cli("init", root, "--name", name)
    assert "app.py" in written.stdout and f"thaw deploy {root}" in written.stdout
    planned = gateway.cli("deploy", root, "--dry-run")
    assert f"{name} is new" in planned.stdout and "128 MiB" in planned.stdout
    assert gateway.cli("invoke", name, check=False).returncode == 1, "a dry run deploys nothing"
    assert "is frozen" in gateway.cli("deploy", root).stdout
    assert answer(gateway, name, '{"name": "Ada"}') == {"greeting": "Hello, Ada!"}

    def served():
        functions = json.loads(gateway.cli("--json", "ls").stdout)["functions"]
        return next(function["revision"] for function in functions if function["name"] == name)

    first = served()
    again = gateway.cli("deploy", root)
    assert "nothing changes" in again.stdout and "frozen (" not in again.stdout
    assert json.loads(gateway.cli("--json", "deploy", root).stdout) == {"name": name, "changes": []}
    assert served() == first
    edit(root / "app.py", "Hello", "Welcome")
    edit(root / "thaw.toml", "memory = 128", "memory = 192")
    edit(root / "thaw.toml", "[environment]", '[environment]\nTOKEN = "do-not-tell"')
    planned = json.loads(gateway.cli("--json", "deploy", root, "--dry-run").stdout)
    assert [change["key"] for change in planned["changes"]] == ["code", "memory", "environment.TOKEN"]
    assert answer(gateway, name)["greeting"] == "Hello, world!"
    changed = gateway.cli("deploy", root).stdout
    assert "128 MiB → 192 MiB" in changed and "~ code" in changed and "+ environment.TOKEN" in changed
    assert "do-not-tell" not in changed
    assert answer(gateway, name)["greeting"] == "Welcome, world!" and served() != first
    # flags win over thaw.toml
    assert "192 MiB → 256 MiB" in gateway.cli("deploy", root, "--memory", "256", "--dry-run").stdout
    second = served()
    assert "is frozen" in gateway.cli("deploy", root, "--force").stdout and served() != second


def test_url_concurrency_and_alias_of_a_project_need_no_new_snapshot(gateway, client, named, tmp_path):
    root, name = tmp_path / "web", named("cli-web")
    gateway.cli("init", root, "--name", name)
    gateway.cli("deploy", root)
    manifest = root / "thaw.toml"
    url = '[url]\nauth = "none"\nallow_origins = ["https://a.example"]\n'
    manifest.write_text('alias = "live"\nreserved_concurrency = 4\n' + manifest.read_text() + url)
    done = gateway.cli("deploy", root)
    assert "+ reserved_concurrency" in done.stdout and "is frozen" not in done.stdout
    assert f"{name}:live names it" in done.stderr
    assert client.get_function_concurrency(FunctionName=name)["ReservedConcurrentExecutions"] == 4
    config = client.get_function_url_config(FunctionName=name)
    assert config["Cors"]["AllowOrigins"] == ["https://a.example"] and config["Cors"]["AllowMethods"] == ["*"]
    assert client.get_alias(FunctionName=name, Name="live")["FunctionVersion"] == "1"
    again = gateway.cli("deploy", root)
    assert "nothing changes" in again.stdout
    assert client.get_alias(FunctionName=name, Name="live")["FunctionVersion"] == "1"


def test_a_shell_project_runs_as_it_was_written(gateway, named, tmp_path):
    root, name = tmp_path / "sh", named("cli-shell")
    gateway.cli("init", root, "--template", "shell", "--name", name)
    gateway.cli("deploy", root)
    assert answer(gateway, name, '{"a": 1}') == {"greeting": "Hello from a shell script!", "event": {"a": 1}}


def test_build_makes_the_package(gateway, named, tmp_path):
    root, name = tmp_path / "built", named("cli-built")
    gateway.cli("init", root, "--name", name)
    manifest = root / "thaw.toml"
    manifest.write_text('build = "mkdir -p out && sed s/Hello/Built/ app.py > out/app.py"\npackage = "out"\n' + manifest.read_text())
    gateway.cli("deploy", root)
    assert answer(gateway, name)["greeting"] == "Built, world!"
    edit(manifest, "mkdir -p out", "echo no compiler; false")
    failed = gateway.cli("deploy", root, check=False)
    assert failed.returncode == 1 and "no compiler" in failed.stderr and "`build` in thaw.toml failed" in failed.stderr


@contextlib.contextmanager
def developing(gateway, root, output, *options):
    command = [THAW, "--home", gateway.home, "--endpoint", gateway.url, "dev", root, "--watch", *options]
    with output.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_dev_deploys_each_save_shows_errors_and_goes_on(gateway, named, tmp_path):
    root, name, output = tmp_path / "dev", named("cli-dev"), tmp_path / "output"
    gateway.cli("init", root, "--name", name)

    def until(what, seconds=120):
        deadline = time.monotonic() + seconds
        while not what():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)

    with developing(gateway, root, output, "--invoke", '{"name": "dev"}') as process:
        until(lambda: '"Hello, dev!"' in output.read_text())
        until(lambda: "greeting dev" in output.read_text())  # what it writes is followed
        edit(root / "app.py", "Hello", "Saved")
        until(lambda: '"Saved, dev!"' in output.read_text())
        manifest = root / "thaw.toml"
        edit(manifest, "memory", "memmory")
        until(lambda: "did you mean `memory`?" in output.read_text())
        assert answer(gateway, name)["greeting"] == "Saved, world!"
        edit(manifest, "memmory", "memory")
        edit(root / "app.py", "Saved", "Mended")
        until(lambda: '"Mended, dev!"' in output.read_text())
        assert answer(gateway, name)["greeting"] == "Mended, world!"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_usual_mistakes_are_told_with_their_remedy(gateway, hello, tmp_path):
    def mistake(*arguments, **options):
        options = {"--home": gateway.home, "--endpoint": gateway.url} | options
        options = [part for option in options.items() for part in option]
        done = subprocess.run([THAW, *options, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) <= 2, done.stderr
        return done.stderr

    assert "start one with `thaw up`" in mistake("ls", **{"--endpoint": "http://127.0.0.1:9"})
    assert "http://HOST:PORT" in mistake("ls", **{"--endpoint": "localhost:8080"})
    assert "did you mean hello?" in mistake("invoke", "helo")
    assert "did you mean hello?" in mistake("logs", "hallo")
    assert "`thaw ls` lists what there is" in mistake("rm", "something-else")
    (tmp_path / "app.py").write_text("def handler(event, context): pass")
    assert "did you mean python3.11?" in mistake("deploy", tmp_path, "--name", "f", "--runtime", "python3.12")
    assert "no other.py for the handler other.run" in mistake("deploy", tmp_path, "--handler", "other.run")
    assert "app.py" in mistake("init", tmp_path, "--template", "python")
    (tmp_path / "empty").mkdir()
    assert "`thaw init" in mistake("deploy", tmp_path / "empty")
    (tmp_path / "thaw.toml").write_text("timout = 3\n")
    assert "line 1: unknown field `timout`" in mistake("deploy", tmp_path)
    (tmp_path / "file").write_text("")
    assert "another folder with --home" in mistake("up", **{"--home": tmp_path / "file" / "home"})
