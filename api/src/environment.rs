//! What a function's process sees: its environment as AWS sets it, its bootstrap, its share of the machine.

use std::collections::BTreeMap;

use thaw_runtime::AUTHORITIES_FILE;

use crate::clock;
use crate::record::{Settings, VersionId};

/// Variables that clients may not set, as in Lambda.
pub const RESERVED: [&str; 19] = [
    "_HANDLER",
    "_X_AMZN_TRACE_ID",
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
    "AWS_LAMBDA_FUNCTION_NAME",
    "AWS_LAMBDA_FUNCTION_VERSION",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_LAMBDA_MAX_CONCURRENCY",
    "AWS_LAMBDA_RUNTIME_API",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "LAMBDA_RUNTIME_DIR",
    "LAMBDA_TASK_ROOT",
];

/// Memory for which AWS gives a function one whole CPU.
const MIB_PER_VCPU: u32 = 1769;

/// Most virtual CPUs of a guest.
const VCPUS_MAX: u32 = 4;

/// Where Python's clients, AWS's, those of OpenSSL and Node.js look for authorities: the last for more than their own.
const AUTHORITIES: [&str; 4] = [
    "AWS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
];

/// Where X-Ray's daemon would be: datagrams to it go nowhere, as no daemon runs in a guest.
const XRAY_HOST: &str = "127.0.0.1";
const XRAY_PORT: &str = "2000";

/// Virtual CPUs for a function of this size: one for each 1769 MiB begun, at most 4.
#[must_use]
pub fn vcpu_count(memory_mib: u32) -> u8 {
    let count = memory_mib.div_ceil(MIB_PER_VCPU).clamp(1, VCPUS_MAX);
    u8::try_from(count).unwrap_or(1)
}

/// Whether the runtime is the function's own program.
#[must_use]
pub fn is_provided(runtime: &str) -> bool {
    runtime.starts_with("provided")
}

/// Programs that speak the Runtime API; the first that exists runs.
#[must_use]
pub fn bootstrap(runtime: &str) -> Vec<String> {
    let paths: &[&str] = if is_provided(runtime) {
        &[
            "/var/runtime/bootstrap",
            "/var/task/bootstrap",
            "/opt/bootstrap",
        ]
    } else {
        &["/var/runtime/bootstrap"]
    };
    paths.iter().map(|path| (*path).to_owned()).collect()
}

/// The runtime's whole environment but for `AWS_LAMBDA_RUNTIME_API`, which the agent adds. Recorded from AWS.
#[must_use]
pub fn variables(
    name: &str,
    version: VersionId,
    region: &str,
    settings: &Settings,
) -> BTreeMap<String, String> {
    const PATH: &str = "/var/lang/bin:/usr/local/bin:/usr/bin/:/bin:/opt/bin";
    const LIBRARIES: &str = "/var/lang/lib:/lib64:/usr/lib64:/var/runtime:/var/runtime/lib:/var/task:/var/task/lib:/opt/lib";
    // The older runtimes for programs of one's own name no /var/lang; all others do.
    let has_lang = !matches!(settings.runtime.as_str(), "provided" | "provided.al2");
    let without_lang = |list: &'static str| match list.split_once(':') {
        Some((_, rest)) if !has_lang => rest,
        _ => list,
    };
    let stream = format!(
        "{}/[{version}]{}",
        clock::day(clock::unix_ms()),
        uuid::Uuid::new_v4().simple()
    );
    let number = version.to_string();
    let memory = settings.memory_mib.to_string();
    let kind = match version {
        VersionId::Number(_) if settings.snap_start => "snap-start",
        _ => "on-demand",
    };
    let group = settings.logging.group_of(name);
    let mut variables: BTreeMap<String, String> = settings.environment.clone().unwrap_or_default();
    if let Some(levels) = &settings.logging.json {
        // The runtimes' clients write their lines accordingly.
        variables.insert("AWS_LAMBDA_LOG_FORMAT".to_owned(), "JSON".to_owned());
        variables.insert(
            "AWS_LAMBDA_LOG_LEVEL".to_owned(),
            levels.application.clone(),
        );
    }
    let fixed = [
        ("_HANDLER", settings.handler.as_str()),
        ("LAMBDA_TASK_ROOT", "/var/task"),
        ("LAMBDA_RUNTIME_DIR", "/var/runtime"),
        ("AWS_LAMBDA_FUNCTION_NAME", name),
        ("AWS_LAMBDA_FUNCTION_VERSION", &number),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory),
        ("AWS_LAMBDA_LOG_GROUP_NAME", &group),
        ("AWS_LAMBDA_LOG_STREAM_NAME", &stream),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", kind),
        ("AWS_REGION", region),
        ("AWS_DEFAULT_REGION", region),
        // Thaw has no IAM: SDKs inside a function find credentials, and no service accepts them.
        ("AWS_ACCESS_KEY_ID", "thaw"),
        ("AWS_SECRET_ACCESS_KEY", "thaw"),
        ("AWS_SESSION_TOKEN", "thaw"),
        ("TZ", ":UTC"),
        ("_AWS_XRAY_DAEMON_ADDRESS", XRAY_HOST),
        ("_AWS_XRAY_DAEMON_PORT", XRAY_PORT),
    ];
    for (key, value) in fixed {
        variables.insert(key.to_owned(), value.to_owned());
    }
    if !is_provided(&settings.runtime) {
        variables.insert(
            "AWS_EXECUTION_ENV".to_owned(),
            format!("AWS_Lambda_{}", settings.runtime),
        );
    }
    // These a client may set itself.
    let has_secrets = settings
        .network
        .as_ref()
        .is_some_and(|policy| !policy.secrets.is_empty());
    if has_secrets {
        // Clients that bring authorities of their own know nothing of the one by which secrets are put in.
        for key in AUTHORITIES {
            let file = AUTHORITIES_FILE.to_owned();
            variables.entry(key.to_owned()).or_insert(file);
        }
    }
    let xray = format!("{XRAY_HOST}:{XRAY_PORT}");
    let defaults = [
        ("LANG", "en_US.UTF-8"),
        ("PATH", without_lang(PATH)),
        ("LD_LIBRARY_PATH", without_lang(LIBRARIES)),
        // X-Ray's SDKs raise errors where no segment is open, unless they are told to write a line instead.
        ("AWS_XRAY_CONTEXT_MISSING", "LOG_ERROR"),
        ("AWS_XRAY_DAEMON_ADDRESS", &xray),
    ];
    for (key, value) in defaults {
        variables
            .entry(key.to_owned())
            .or_insert_with(|| value.to_owned());
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::LogLevels;
    use crate::testing::version;

    #[test]
    fn cpus_grow_with_memory() {
        let counts = [128, 1769, 1770, 3538, 3539, 10_240].map(vcpu_count);
        assert_eq!(counts, [1, 1, 2, 2, 3, 4]);
    }

    #[test]
    fn a_client_cannot_shadow_what_the_platform_sets_but_may_set_the_rest() {
        let mut settings = version("f").target.settings;
        settings.environment = Some(BTreeMap::from([
            ("AWS_REGION".to_owned(), "x".to_owned()),
            ("LANG".to_owned(), "C".to_owned()),
            ("A".to_owned(), "b".to_owned()),
        ]));
        let variables = variables("f", VersionId::Latest, "eu-west-1", &settings);
        assert_eq!(variables["AWS_REGION"], "eu-west-1");
        assert_eq!(variables["LANG"], "C");
        assert_eq!(variables["A"], "b");
        assert_eq!(variables["AWS_EXECUTION_ENV"], "AWS_Lambda_python3.11");
        assert!(!variables.contains_key("AWS_LAMBDA_RUNTIME_API"));
        assert!(!variables.contains_key("AWS_LAMBDA_MAX_CONCURRENCY"));
        assert!(!variables.contains_key("SSL_CERT_FILE"));
        let secret = serde_json::json!({"host": "a.b", "header": "x", "value": "v"});
        let policy = serde_json::json!({ "secrets": [secret] });
        settings.network = Some(serde_json::from_value(policy).unwrap());
        let own = BTreeMap::from([("AWS_CA_BUNDLE".to_owned(), "/var/task/mine".to_owned())]);
        settings.environment = Some(own);
        let variables = super::variables("f", VersionId::Latest, "eu-west-1", &settings);
        assert_eq!(variables["SSL_CERT_FILE"], AUTHORITIES_FILE);
        assert_eq!(variables["AWS_CA_BUNDLE"], "/var/task/mine");
        settings.runtime = "provided.al2023".to_owned();
        settings.snap_start = true;
        let variables = super::variables("f", VersionId::Number(2), "eu-west-1", &settings);
        assert_eq!(variables["AWS_LAMBDA_FUNCTION_VERSION"], "2");
        assert_eq!(variables["AWS_LAMBDA_INITIALIZATION_TYPE"], "snap-start");
        assert!(!variables.contains_key("AWS_EXECUTION_ENV"));
        assert!(variables["PATH"].starts_with("/var/lang/bin:"));
        settings.runtime = "provided.al2".to_owned();
        let variables = super::variables("f", VersionId::Latest, "eu-west-1", &settings);
        assert_eq!(variables["PATH"], "/usr/local/bin:/usr/bin/:/bin:/opt/bin");
        assert!(variables["LD_LIBRARY_PATH"].starts_with("/lib64:"));
        assert_eq!(variables["AWS_XRAY_DAEMON_ADDRESS"], "127.0.0.1:2000");
        assert_eq!(bootstrap("provided.al2023").len(), 3);
        assert!(!variables.contains_key("AWS_LAMBDA_LOG_FORMAT"));
        settings.logging.group = Some("mine".to_owned());
        settings.logging.json = Some(LogLevels {
            application: "DEBUG".to_owned(),
            ..LogLevels::default()
        });
        let variables = super::variables("f", VersionId::Latest, "eu-west-1", &settings);
        assert_eq!(variables["AWS_LAMBDA_LOG_GROUP_NAME"], "mine");
        assert_eq!(variables["AWS_LAMBDA_LOG_FORMAT"], "JSON");
        assert_eq!(variables["AWS_LAMBDA_LOG_LEVEL"], "DEBUG");
    }
}
