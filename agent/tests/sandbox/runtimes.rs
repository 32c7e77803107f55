//! Unmodified runtime clients: what a function's owner really runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};
use thaw_agent_protocol::AgentMessage;

use crate::support::Sandbox;

const AWSLAMBDARIC: &str = "awslambdaric==4.2.2";

/// Folder with the Python client, installed by pip once per target folder.
fn awslambdaric() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = root.join(AWSLAMBDARIC);
        if !folder.exists() {
            // Installed beside its final name and renamed, so that an interrupted installation is not taken for one.
            let scratch = tempfile::tempdir_in(root).unwrap();
            let status = Command::new("python3")
                .args([
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                ])
                .args(["--only-binary", ":all:", AWSLAMBDARIC, "--target"])
                .arg(scratch.path())
                .status()
                .expect("python3 is installed");
            assert!(status.success(), "pip could not install {AWSLAMBDARIC}");
            std::fs::rename(scratch.keep(), &folder).unwrap();
        }
        folder
    })
}

/// What runs a function in the image, from the image's own source.
fn image_runtime() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/src/runtime/recipe");
    std::fs::read_to_string(folder.join("thaw_runtime.py")).unwrap()
}

/// A function as the image runs it.
fn python(app: &str, handler: &str) -> Sandbox {
    let variables = [
        ("_HANDLER", handler),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
    ];
    start_python("thaw_runtime", app, &variables)
}

/// A function that the client alone runs, by its own SnapStart protocol.
fn snap_start(app: &str) -> Sandbox {
    let variables = [
        ("_HANDLER", "app.handler"),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "snap-start"),
    ];
    start_python("awslambdaric", app, &variables)
}

fn start_python(module: &str, app: &str, variables: &[(&str, &str)]) -> Sandbox {
    let mut sandbox = Sandbox::boot();
    sandbox.write("app.py", app);
    sandbox.write("thaw_runtime.py", &image_runtime());
    sandbox.write(
        "bootstrap",
        &format!("#!/bin/sh\nexec python3 -m {module} \"$_HANDLER\"\n"),
    );
    let task_root = sandbox.folder.path().to_str().unwrap().to_owned();
    let path = format!("{}:{task_root}", awslambdaric().display());
    let mut environment = vec![
        ("PYTHONPATH", path.as_str()),
        ("LAMBDA_TASK_ROOT", &task_root),
        ("HOME", &task_root),
    ];
    environment.extend(variables);
    sandbox.configure(&["bootstrap"], &environment);
    sandbox
}

fn thaw(sandbox: &mut Sandbox) {
    assert_eq!(
        sandbox.message(),
        AgentMessage::Ready,
        "{}",
        sandbox.log_text()
    );
    sandbox.thaw(1);
    sandbox.hear_thawed();
}

fn response(sandbox: &mut Sandbox) -> Value {
    match sandbox.message() {
        AgentMessage::Response(reply) => serde_json::from_slice(&reply.payload).unwrap(),
        other => panic!("{other:?}: {}", sandbox.log_text()),
    }
}

fn example(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn python_client_runs_the_hello_example_twice() {
    let mut sandbox = python(&example("hello/app.py"), "app.handler");
    thaw(&mut sandbox);
    for name in ["Ada", "Bob"] {
        let event = json!({"name": name, "text": "ü\u{1F600}"});
        sandbox.invoke(1, name, event.to_string().as_bytes());
        let answer = response(&mut sandbox);
        assert_eq!(answer["greeting"], format!("Hello, {name}!"));
        assert_eq!(answer["event"], event);
        assert_eq!(sandbox.message(), AgentMessage::Ready);
    }
}

#[test]
fn python_client_takes_an_empty_event_and_six_megabytes() {
    let app = "def handler(event, context):\n    return {'size': len(event.get('x', ''))}\n";
    let mut sandbox = python(app, "app.handler");
    thaw(&mut sandbox);
    sandbox.invoke(1, "empty", b"");
    assert_eq!(response(&mut sandbox), json!({"size": 0}));
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    let length = thaw_agent_protocol::PAYLOAD_BYTES_MAX - 8;
    let event = format!(r#"{{"x":"{}"}}"#, "y".repeat(length));
    sandbox.invoke(1, "large", event.as_bytes());
    assert_eq!(response(&mut sandbox), json!({"size": length}));
}

#[test]
fn python_exception_arrives_with_type_message_and_stack_trace() {
    let app = "def handler(event, context):\n    print('before')\n    raise ValueError('boom')\n";
    let mut sandbox = python(app, "app.handler");
    thaw(&mut sandbox);
    sandbox.invoke(1, "r1", b"{}");
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    let document: Value = serde_json::from_slice(&error.payload).unwrap();
    assert_eq!(document["errorType"], "ValueError");
    assert_eq!(document["errorMessage"], "boom");
    assert!(
        document["stackTrace"][0]
            .as_str()
            .unwrap()
            .contains("app.py")
    );
    assert!(sandbox.log_text().contains("before"));
    assert!(sandbox.log_text().contains("boom"));
}

#[test]
fn python_import_error_is_an_init_error_with_its_traceback() {
    let mut sandbox = python("import no_such_module\n", "app.handler");
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error: {}", sandbox.log_text());
    };
    assert_eq!(error.error_type, "Runtime.ImportModuleError");
    let document: Value = serde_json::from_slice(&error.payload).unwrap();
    assert!(
        document["errorMessage"]
            .as_str()
            .unwrap()
            .contains("no_such_module")
    );
}

#[test]
fn python_handler_that_does_not_exist_is_an_init_error() {
    let mut sandbox = python("", "app.nothing");
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error: {}", sandbox.log_text());
    };
    assert_eq!(error.error_type, "Runtime.HandlerNotFound");
}

#[test]
fn python_response_over_the_limit_is_answered_in_lambdas_words() {
    let app = "def handler(event, context):\n    return 'x' * 6291556\n";
    let mut sandbox = python(app, "app.handler");
    thaw(&mut sandbox);
    sandbox.invoke(1, "r1", b"{}");
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    assert_eq!(
        error.error_type.as_deref(),
        Some("Function.ResponseSizeTooLarge")
    );
}

#[test]
fn shell_example_answers() {
    let mut sandbox = Sandbox::boot();
    sandbox.write("bootstrap", &example("shell/bootstrap"));
    sandbox.configure(&["bootstrap"], &[]);
    thaw(&mut sandbox);
    for id in ["r1", "r2"] {
        sandbox.invoke(1, id, br#"{"name":"Ada"}"#);
        let answer = response(&mut sandbox);
        assert_eq!(answer["greeting"], "Hello from a shell script!");
        assert_eq!(answer["event"], json!({"name": "Ada"}));
        assert_eq!(answer["request_id"], id);
        assert_eq!(sandbox.message(), AgentMessage::Ready);
    }
}

const HOOKS: &str = "
import random, sys
from snapshot_restore_py import register_before_snapshot, register_after_restore
seen = ['init']
random.seed(7)
state = random.getstate()
register_before_snapshot(lambda: seen.append('before'))
@register_after_restore
def after():
    seen.append('after, reseeded' if random.getstate() != state else 'after, the same')
def handler(event, context):
    seen.append(event)
    return seen
";

#[test]
fn python_hooks_run_around_the_freeze_and_generators_are_reseeded_before_the_functions_own() {
    let mut sandbox = python(HOOKS, "app.handler");
    thaw(&mut sandbox);
    assert_eq!(sandbox.log_text(), "", "the rehearsal is heard");
    for (id, seen) in [
        ("r1", json!(["init", "before", "after, reseeded", "r1"])),
        (
            "r2",
            json!(["init", "before", "after, reseeded", "r1", "r2"]),
        ),
    ] {
        sandbox.invoke(1, id, json!(id).to_string().as_bytes());
        assert_eq!(response(&mut sandbox), seen);
        assert_eq!(sandbox.message(), AgentMessage::Ready);
    }
}

#[test]
fn python_client_speaks_snap_start_by_itself() {
    let mut sandbox = snap_start(HOOKS);
    thaw(&mut sandbox);
    assert_eq!(sandbox.message(), AgentMessage::Restoring);
    sandbox.invoke(1, "r1", b"1");
    assert_eq!(sandbox.message(), AgentMessage::Restored);
    assert_eq!(
        response(&mut sandbox),
        json!(["init", "before", "after, the same", 1])
    );
}

#[test]
fn python_hook_that_fails_after_the_restore_fails_the_invocation_and_the_handler_never_runs() {
    let app = "
from snapshot_restore_py import register_after_restore
@register_after_restore
def after():
    raise ValueError('no new connection')
def handler(event, context):
    print('handled')
";
    for (mut sandbox, by_itself) in [(python(app, "app.handler"), false), (snap_start(app), true)] {
        thaw(&mut sandbox);
        if by_itself {
            assert_eq!(sandbox.message(), AgentMessage::Restoring);
        }
        sandbox.invoke(1, "r1", b"{}");
        let message = sandbox.message();
        let AgentMessage::RestoreError(error) = message else {
            panic!("{message:?}: {}", sandbox.log_text());
        };
        assert_eq!(error.request_id, "r1");
        let error_type = error.error_type.as_deref();
        assert_eq!(error_type, Some("Runtime.AfterRestoreError"));
        let document: Value = serde_json::from_slice(&error.payload).unwrap();
        assert_eq!(document["errorType"], "ValueError");
        assert_eq!(document["errorMessage"], "no new connection");
        assert!(!sandbox.log_text().contains("handled"));
        sandbox.shutdown().unwrap();
    }
}

#[test]
fn python_hooks_of_a_version_with_snap_start_have_a_time_that_is_not_the_functions() {
    let hook = "
from snapshot_restore_py import register_after_restore
@register_after_restore
def after():
    time.sleep(0.3)
";
    let variables = [
        ("_HANDLER", "app.handler"),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "snap-start"),
    ];
    for hook in [hook, ""] {
        let app = format!(
            "import time\n{hook}\ndef handler(event, context):\n    return time.time() * 1000 + context.get_remaining_time_in_millis()\n"
        );
        let mut sandbox = start_python("thaw_runtime", &app, &variables);
        thaw(&mut sandbox);
        if !hook.is_empty() {
            assert_eq!(sandbox.message(), AgentMessage::Restoring);
        }
        sandbox.invoke(1, "r1", b"{}");
        if !hook.is_empty() {
            assert_eq!(sandbox.message(), AgentMessage::Restored);
        }
        let deadline = response(&mut sandbox).as_f64().unwrap();
        let given = 4_000_000_000_000.0;
        let is_later = deadline > given + 250.0;
        assert_eq!(is_later, !hook.is_empty(), "{deadline}");
    }
}

#[test]
fn python_reseeding_that_fails_fails_the_invocation() {
    let app = "
import random
class Broken:
    def seed(self):
        if frozen: raise OSError('no entropy')
frozen = False
random._inst = Broken()
from snapshot_restore_py import register_before_snapshot
@register_before_snapshot
def before():
    global frozen
    frozen = True
def handler(event, context):
    print('handled')
";
    // Fails in the rehearsal already: the function is never frozen.
    let mut sandbox = python(app, "app.handler");
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error: {}", sandbox.log_text());
    };
    assert_eq!(error.error_type, "Runtime.BeforeSnapshotError");
    // And after the thaw.
    let late = app.replace(
        "if frozen",
        "import os\n        if os.path.exists('/proc/self/cwd/thawed')",
    );
    let mut sandbox = python(&late, "app.handler");
    thaw(&mut sandbox);
    sandbox.write("thawed", "");
    sandbox.invoke(1, "r1", b"{}");
    let AgentMessage::RestoreError(error) = sandbox.message() else {
        panic!("no error: {}", sandbox.log_text());
    };
    let error_type = error.error_type.as_deref();
    assert_eq!(error_type, Some("Runtime.AfterRestoreError"));
    assert!(!sandbox.log_text().contains("handled"));
}

#[test]
fn python_hook_that_fails_before_the_snapshot_is_an_init_error() {
    let app = "
from snapshot_restore_py import register_before_snapshot
@register_before_snapshot
def before():
    raise ValueError('cannot freeze')
def handler(event, context):
    return 1
";
    let mut sandbox = python(app, "app.handler");
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error: {}", sandbox.log_text());
    };
    assert_eq!(error.error_type, "Runtime.BeforeSnapshotError");
    let document: Value = serde_json::from_slice(&error.payload).unwrap();
    assert_eq!(document["errorMessage"], "cannot freeze");
}

#[test]
fn python_generators_are_reseeded_even_where_the_function_switches_the_hooks_off() {
    let app = "
import os, random
os.environ.pop('AWS_LAMBDA_INITIALIZATION_TYPE')
random.seed(7)
state = random.getstate()
def handler(event, context):
    return random.getstate() != state
";
    let mut sandbox = python(app, "app.handler");
    thaw(&mut sandbox);
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(response(&mut sandbox), json!(true));
}

#[test]
fn python_functions_see_the_hosts_initialization_type_and_hooks_run_in_any_case() {
    let app = "
import os
from snapshot_restore_py import register_after_restore
seen = [os.environ['AWS_LAMBDA_INITIALIZATION_TYPE']]
register_after_restore(lambda: seen.append('after'))
def handler(event, context):
    return seen + [os.environ['AWS_LAMBDA_INITIALIZATION_TYPE']]
";
    for kind in ["on-demand", "snap-start"] {
        let variables = [
            ("_HANDLER", "app.handler"),
            ("AWS_LAMBDA_INITIALIZATION_TYPE", kind),
        ];
        let mut sandbox = start_python("thaw_runtime", app, &variables);
        thaw(&mut sandbox);
        if kind == "snap-start" {
            assert_eq!(sandbox.message(), AgentMessage::Restoring);
        }
        sandbox.invoke(1, "r1", b"{}");
        if kind == "snap-start" {
            assert_eq!(sandbox.message(), AgentMessage::Restored);
        }
        assert_eq!(response(&mut sandbox), json!([kind, "after", kind]));
    }
}
