//! From a client's body to settings that make sense; every refusal in Lambda's words. Pure.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use thaw_api_types::lambda::{
    CreateFunctionRequest, FunctionCode, FunctionSettings, TracingConfig,
};
use thaw_images::RuntimeName;

use super::errors::{ApiError, violation};
use super::layers::RUNTIMES;
use super::logging;
use crate::engine::EPHEMERAL_MIB_DEFAULT;
use crate::environment::RESERVED;
use crate::network;
use crate::record::{Logging, Settings, Tracing};

/// Largest zip, bytes.
pub const ZIP_BYTES_MAX: usize = 52_428_800;
/// Largest environment, bytes of its JSON.
const ENVIRONMENT_BYTES_MAX: usize = 4096;
/// Instruction sets that the model knows.
pub(super) const ARCHITECTURES: [&str; 2] = ["x86_64", "arm64"];
/// Runtimes that AWS makes no functions with any more, but for those that this gateway has.
const DEPRECATED: [&str; 19] = [
    "dotnetcore1.0",
    "dotnetcore2.0",
    "dotnetcore2.1",
    "dotnetcore3.1",
    "go1.x",
    "java8",
    "nodejs",
    "nodejs10.x",
    "nodejs12.x",
    "nodejs14.x",
    "nodejs4.3",
    "nodejs4.3-edge",
    "nodejs6.10",
    "nodejs8.10",
    "python2.7",
    "python3.6",
    "python3.7",
    "ruby2.5",
    "ruby2.7",
];
/// Bytes of an environment that an error repeats.
const SHOWN_BYTES_MAX: usize = 8192;
/// Most tags of a function.
pub(super) const TAGS_MAX: usize = 50;
const HANDLER_CHARS_MAX: usize = 128;
const DESCRIPTION_CHARS_MAX: usize = 256;
const TIMEOUT_SECONDS: std::ops::RangeInclusive<i64> = 1..=900;
const MEMORY_MIB: std::ops::RangeInclusive<i64> = 128..=10_240;
const EPHEMERAL_MIB: std::ops::RangeInclusive<i64> = 512..=10_240;
/// `ApplyOn` of SnapStart.
const PUBLISHED_VERSIONS: &str = "PublishedVersions";

/// Settings of a new function.
///
/// # Errors
/// What Lambda refuses, and what Thaw does not serve.
pub fn create(request: &CreateFunctionRequest) -> Result<Settings, ApiError> {
    let mut violations = Vec::new();
    let role = request.role.clone().unwrap_or_default();
    check_role(&role, &mut violations);
    if request.code.is_none() {
        violations.push(null("code"));
    }
    check_settings(&request.settings, &mut violations);
    violations.extend(malformed_architectures(request.architectures.as_deref()));
    finish(&violations)?;
    match request.package_type.as_deref() {
        None | Some("Zip") => {}
        Some("Image") => return Err(images_unsupported()),
        Some(other) => {
            return Err(ApiError::validation(&[violation(
                other,
                "packageType",
                "Member must satisfy enum value set: [Zip, Image]",
            )]));
        }
    }
    check_architectures(request.architectures.as_deref())?;
    if request
        .tags
        .as_ref()
        .is_some_and(|tags| tags.len() > TAGS_MAX)
    {
        return Err(ApiError::too_many_tags());
    }
    let (Some(_), Some(_)) = (&request.settings.runtime, &request.settings.handler) else {
        return Err(ApiError::invalid_parameter(
            "Runtime and Handler are mandatory parameters for functions created with deployment packages.",
        ));
    };
    let default = Settings {
        runtime: String::new(),
        handler: String::new(),
        role,
        description: String::new(),
        timeout_seconds: 3,
        memory_mib: 128,
        environment: None,
        snap_start: false,
        layers: Vec::new(),
        ephemeral_mib: EPHEMERAL_MIB_DEFAULT,
        logging: Logging::default(),
        tracing: Tracing::default(),
        network: None,
    };
    merge(default, &request.settings)
}

/// Settings of a function after an update.
///
/// # Errors
/// What Lambda refuses, and what Thaw does not serve.
pub fn update(
    current: Settings,
    role: Option<&str>,
    change: &FunctionSettings,
) -> Result<Settings, ApiError> {
    let mut violations = Vec::new();
    if let Some(role) = role {
        check_role(role, &mut violations);
    }
    check_settings(change, &mut violations);
    finish(&violations)?;
    let current = Settings {
        role: role.map_or(current.role, str::to_owned),
        ..current
    };
    merge(current, change)
}

/// Only one instruction set runs here.
///
/// # Errors
/// Any other.
pub fn check_architectures(architectures: Option<&[String]>) -> Result<(), ApiError> {
    finish(&Vec::from_iter(malformed_architectures(architectures)))?;
    match architectures {
        None | Some([]) => Ok(()),
        Some([one]) if one == "x86_64" => Ok(()),
        Some(other) => Err(ApiError::invalid_parameter(format!(
            "Architectures [{}] are not supported: this gateway runs [x86_64].",
            other.join(", ")
        ))),
    }
}

/// What the model does not know as a list of instruction sets.
fn malformed_architectures(architectures: Option<&[String]>) -> Option<String> {
    let architectures = architectures?;
    if architectures.len() > 1 {
        let shown = format!("[{}]", architectures.join(", "));
        let constraint = "Member must have length less than or equal to 1";
        return Some(violation(&shown, "architectures", constraint));
    }
    unknown_architectures("architectures", architectures)
}

/// A list of instruction sets with one that the model does not know.
pub(super) fn unknown_architectures(member: &str, list: &[String]) -> Option<String> {
    if list.iter().all(|one| ARCHITECTURES.contains(&one.as_str())) {
        return None;
    }
    let constraint = "Member must satisfy constraint: [Member must satisfy enum value set: [x86_64, arm64], Member must not be null]";
    Some(violation(
        &format!("[{}]", list.join(", ")),
        member,
        constraint,
    ))
}

/// The zip of an upload.
///
/// # Errors
/// There is none, it is an image, no base64, or too large.
pub fn zip(code: FunctionCode) -> Result<Bytes, ApiError> {
    if code.image_uri.is_some() {
        return Err(images_unsupported());
    }
    let Some(text) = code.zip_file else {
        return Err(ApiError::invalid_parameter(
            "Please provide a source for function code.",
        ));
    };
    let zip = STANDARD.decode(text).map_err(|error| {
        ApiError::invalid_content(format!(
            "Could not parse request body into json: ZipFile is not base64: {error}"
        ))
    })?;
    if zip.is_empty() {
        return Err(ApiError::invalid_parameter(
            "Uploaded file must be a non-empty zip",
        ));
    }
    if zip.len() > ZIP_BYTES_MAX {
        return Err(ApiError {
            message: format!("Zipped size must be smaller than {ZIP_BYTES_MAX} bytes"),
            ..ApiError::entity_too_large(ZIP_BYTES_MAX, "")
        });
    }
    Ok(zip.into())
}

fn images_unsupported() -> ApiError {
    ApiError::invalid_parameter(
        "Functions from container images are not supported by this gateway: upload the code as ZipFile.",
    )
}

pub(super) fn finish(violations: &[String]) -> Result<(), ApiError> {
    if violations.is_empty() {
        Ok(())
    } else {
        Err(ApiError::validation(violations))
    }
}

/// A required member is missing.
pub(super) fn null(member: &str) -> String {
    format!("Value null at '{member}' failed to satisfy constraint: Member must not be null")
}

fn check_role(role: &str, violations: &mut Vec<String>) {
    if role.is_empty() {
        violations.push(null("role"));
    } else if !is_role(role) {
        violations.push(violation(
            role,
            "role",
            "Member must satisfy regular expression pattern: arn:(aws[a-zA-Z-]*)?:iam::\\d{12}:role/?[a-zA-Z_0-9+=,.@\\-_/]+",
        ));
    }
}

fn is_role(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let ["arn", partition, "iam", "", account, name] = parts.as_slice() else {
        return false;
    };
    let Some(name) = name.strip_prefix("role") else {
        return false;
    };
    (partition.is_empty() || partition.starts_with("aws"))
        && account.len() == 12
        && account.bytes().all(|byte| byte.is_ascii_digit())
        && !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_+=,.@-/".contains(&byte))
}

fn check_settings(settings: &FunctionSettings, violations: &mut Vec<String>) {
    let mut number = |value: Option<i64>, member, range: &std::ops::RangeInclusive<i64>| {
        let Some(value) = value else { return };
        let constraint = if value < *range.start() {
            format!("greater than or equal to {}", range.start())
        } else if value > *range.end() {
            format!("less than or equal to {}", range.end())
        } else {
            return;
        };
        let constraint = format!("Member must have value {constraint}");
        violations.push(violation(&value.to_string(), member, &constraint));
    };
    number(settings.timeout, "timeout", &TIMEOUT_SECONDS);
    number(settings.memory_size, "memorySize", &MEMORY_MIB);
    let ephemeral = settings.ephemeral_storage.map(|storage| storage.size);
    number(ephemeral, "ephemeralStorage.size", &EPHEMERAL_MIB);
    if let Some(handler) = &settings.handler {
        if handler.chars().count() > HANDLER_CHARS_MAX {
            let constraint = "Member must have length less than or equal to 128";
            violations.push(violation(handler, "handler", constraint));
        } else if handler.is_empty() || handler.contains(char::is_whitespace) {
            let constraint = "Member must satisfy regular expression pattern: [^\\s]+";
            violations.push(violation(handler, "handler", constraint));
        }
    }
    violations.extend(long_description(settings.description.as_deref()));
    if let Some(snap_start) = &settings.snap_start
        && !["None", PUBLISHED_VERSIONS].contains(&snap_start.apply_on.as_str())
    {
        let constraint = "Member must satisfy enum value set: [PublishedVersions, None]";
        violations.push(violation(
            &snap_start.apply_on,
            "snapStart.applyOn",
            constraint,
        ));
    }
    if let Some(tracing) = &settings.tracing_config
        && tracing_of(tracing).is_none()
    {
        let constraint = "Member must satisfy enum value set: [Active, PassThrough]";
        violations.push(violation(&tracing.mode, "tracingConfig.mode", constraint));
    }
    if let Some(logging) = &settings.logging_config {
        logging::check(logging, violations);
    }
    if let Some(environment) = &settings.environment
        && let Some(key) = environment.variables.keys().find(|key| !is_variable(key))
    {
        let constraint = "Map keys must satisfy constraint: [Member must satisfy regular expression pattern: [a-zA-Z]([a-zA-Z0-9_])+]";
        violations.push(violation(key, "environment.variables", constraint));
    }
}

pub(super) fn long_description(description: Option<&str>) -> Option<String> {
    let text = description.filter(|text| text.chars().count() > DESCRIPTION_CHARS_MAX)?;
    let constraint = "Member must have length less than or equal to 256";
    Some(violation(text, "description", constraint))
}

/// A description of a version or an alias.
///
/// # Errors
/// It is too long.
pub(super) fn check_description(description: Option<&str>) -> Result<(), ApiError> {
    finish(&Vec::from_iter(long_description(description)))
}

fn is_variable(key: &str) -> bool {
    // Reserved names may begin otherwise; they are refused by name, later and more clearly.
    let mut bytes = key.bytes();
    RESERVED.contains(&key)
        || (bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic())
            && key.len() >= 2
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
}

fn tracing_of(config: &TracingConfig) -> Option<Tracing> {
    let known = [Tracing::PassThrough, Tracing::Active];
    known.into_iter().find(|known| known.word() == config.mode)
}

/// Lays the named members over `current`.
fn merge(current: Settings, change: &FunctionSettings) -> Result<Settings, ApiError> {
    check_unsupported(change)?;
    if let Some(runtime) = &change.runtime {
        check_runtime(runtime)?;
    }
    let environment = match &change.environment {
        Some(environment) => {
            check_environment(&environment.variables)?;
            Some(environment.variables.clone())
        }
        None => current.environment,
    };
    let unsigned = |value: Option<i64>, current: u32| {
        value.map_or(current, |value| u32::try_from(value).unwrap_or(current))
    };
    Ok(Settings {
        runtime: change.runtime.clone().unwrap_or(current.runtime),
        handler: change.handler.clone().unwrap_or(current.handler),
        role: current.role,
        description: change.description.clone().unwrap_or(current.description),
        timeout_seconds: unsigned(change.timeout, current.timeout_seconds),
        memory_mib: unsigned(change.memory_size, current.memory_mib),
        ephemeral_mib: unsigned(
            change.ephemeral_storage.map(|storage| storage.size),
            current.ephemeral_mib,
        ),
        logging: logging::merge(current.logging, change.logging_config.as_ref())?,
        tracing: change
            .tracing_config
            .as_ref()
            .and_then(tracing_of)
            .unwrap_or(current.tracing),
        network: match &change.thaw_network {
            Some(setting) => network::parse(setting)
                .map_err(|why| ApiError::invalid_parameter(format!("ThawNetwork: {why}.")))?,
            None => current.network,
        },
        environment,
        layers: current.layers,
        snap_start: change
            .snap_start
            .as_ref()
            .map_or(current.snap_start, |snap_start| {
                snap_start.apply_on == PUBLISHED_VERSIONS
            }),
    })
}

/// A name that Lambda does not know is refused in Lambda's words; one that it knows and this gateway lacks, in plain ones.
fn check_runtime(runtime: &str) -> Result<(), ApiError> {
    let served: Vec<_> = RuntimeName::served().collect();
    if served.contains(&runtime) {
        return Ok(());
    }
    if DEPRECATED.contains(&runtime) {
        return Err(ApiError::deprecated_runtime(runtime));
    }
    let served = served.join(", ");
    Err(ApiError::invalid_parameter(
        match RUNTIMES.contains(&runtime) {
            true => format!(
                "The runtime {runtime} is not supported by this gateway, which has {served}."
            ),
            false => format!(
                "Value {} at 'runtime' failed to satisfy constraint: Member must satisfy enum value set: [{served}] or be a valid ARN",
                runtime.chars().take(128).collect::<String>()
            ),
        },
    ))
}

fn check_unsupported(change: &FunctionSettings) -> Result<(), ApiError> {
    let refuse = |what: &str| {
        Err(ApiError::invalid_parameter(format!(
            "{what} is not supported by this gateway."
        )))
    };
    if change.image_config.as_ref().is_some_and(is_given) {
        return refuse("ImageConfig");
    }
    let targets = change.dead_letter_config.as_ref();
    if targets
        .and_then(|config| config.get("TargetArn"))
        .is_some_and(is_given)
    {
        return refuse("DeadLetterConfig");
    }
    if change.kms_key_arn.as_ref().is_some_and(is_given) {
        return refuse("KMSKeyArn");
    }
    if change.file_system_configs.as_ref().is_some_and(is_given) {
        return refuse("FileSystemConfigs");
    }
    let vpc = change
        .vpc_config
        .as_ref()
        .and_then(|vpc| vpc.get("SubnetIds"));
    if vpc.is_some_and(is_given) {
        return refuse("VpcConfig");
    }
    Ok(())
}

fn is_given(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null => false,
        serde_json::Value::String(text) => !text.is_empty(),
        serde_json::Value::Array(items) => !items.is_empty(),
        serde_json::Value::Object(members) => !members.is_empty(),
        _ => true,
    }
}

fn check_environment(variables: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let prefix = "Lambda was unable to configure your environment variables because the environment variables you have provided";
    let reserved: Vec<&str> = variables
        .keys()
        .map(String::as_str)
        .filter(|key| RESERVED.contains(key))
        .collect();
    if !reserved.is_empty() {
        return Err(ApiError::invalid_parameter(format!(
            "{prefix} contains reserved keys that are currently not supported for modification. Reserved keys used in this request: {}",
            reserved.join(", ")
        )));
    }
    if let Some((key, _)) = variables.iter().find(|(_, value)| value.contains('\0')) {
        return Err(ApiError::invalid_parameter(format!(
            "{prefix} contains a NUL character in {key}."
        )));
    }
    let measured = serde_json::to_string(variables).unwrap_or_default();
    if measured.len() > ENVIRONMENT_BYTES_MAX {
        let shown: String = measured.chars().take(SHOWN_BYTES_MAX).collect();
        return Err(ApiError::invalid_parameter(format!(
            "{prefix} exceeded the 4KB limit. String measured: {shown}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use thaw_api_types::lambda::Environment;

    use super::*;

    fn request() -> CreateFunctionRequest {
        serde_json::from_str(
            r#"{"FunctionName":"f","Role":"arn:aws:iam::000000000000:role/r","Runtime":"python3.11",
                "Handler":"a.b","Code":{"ZipFile":"UEs="}}"#,
        )
        .unwrap()
    }

    fn refused(change: impl FnOnce(&mut CreateFunctionRequest)) -> ApiError {
        let mut request = request();
        change(&mut request);
        create(&request).unwrap_err()
    }

    #[test]
    fn defaults_are_lambdas() {
        let settings = create(&request()).unwrap();
        assert_eq!((settings.timeout_seconds, settings.memory_mib), (3, 128));
        assert_eq!(settings.environment, None);
    }

    #[test]
    fn several_violations_are_told_at_once() {
        let error = refused(|request| {
            request.settings.timeout = Some(901);
            request.settings.memory_size = Some(127);
            request.role = Some("nobody".to_owned());
        });
        assert_eq!(error.code, "ValidationException");
        assert!(
            error
                .message
                .starts_with("3 validation errors detected: Value 'nobody' at 'role'")
        );
        assert!(error.message.contains(
            "; Value '901' at 'timeout' failed to satisfy constraint: Member must have value less than or equal to 900; "
        ));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let image = refused(|request| request.package_type = Some("Image".to_owned()));
        assert!(image.message.contains("container images"));
        let runtime = refused(|request| request.settings.runtime = Some("cobol".to_owned()));
        assert!(
            runtime
                .message
                .starts_with("Value cobol at 'runtime' failed to satisfy constraint")
                && runtime
                    .message
                    .contains("enum value set: [python3.11, python3.13, nodejs18.x")
        );
        let runtime = refused(|request| request.settings.runtime = Some("python3.12".to_owned()));
        assert!(
            runtime
                .message
                .starts_with("The runtime python3.12 is not supported by this gateway, which has python3.11, python3.13, "),
            "{}",
            runtime.message
        );
        for name in RuntimeName::served() {
            assert!(RUNTIMES.contains(&name), "{name} is none of Lambda's");
        }
        let deprecated = refused(|request| request.settings.runtime = Some("go1.x".to_owned()));
        assert!(deprecated.message.contains("no longer supported"));
        let arm = refused(|request| request.architectures = Some(vec!["arm64".to_owned()]));
        assert!(arm.message.contains("arm64"));
        let missing = refused(|request| request.settings.handler = None);
        assert!(
            missing
                .message
                .starts_with("Runtime and Handler are mandatory")
        );
        assert!(
            zip(FunctionCode::default())
                .unwrap_err()
                .message
                .starts_with("Please provide a source")
        );
    }

    #[test]
    fn environments_have_limits() {
        let with = |key: &str, value: &str| {
            let variables = BTreeMap::from([(key.to_owned(), value.to_owned())]);
            refused(|request| request.settings.environment = Some(Environment { variables }))
        };
        assert!(
            with("AWS_REGION", "x")
                .message
                .ends_with("request: AWS_REGION")
        );
        assert!(with("_HANDLER", "x").message.ends_with("request: _HANDLER"));
        assert!(
            with("KEY", &"x".repeat(5000))
                .message
                .contains("exceeded the 4KB limit")
        );
        assert_eq!(with("1KEY", "x").code, "ValidationException");
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let current = create(&request()).unwrap();
        let change = FunctionSettings {
            timeout: Some(9),
            ..FunctionSettings::default()
        };
        let settings = update(current.clone(), None, &change).unwrap();
        assert_eq!(
            settings,
            Settings {
                timeout_seconds: 9,
                ..current
            }
        );
    }

    proptest! {
        #[test]
        fn accepted_numbers_are_within_lambdas_ranges(timeout: i64, memory: i64) {
            let mut request = request();
            request.settings.timeout = Some(timeout);
            request.settings.memory_size = Some(memory);
            let fits = TIMEOUT_SECONDS.contains(&timeout) && MEMORY_MIB.contains(&memory);
            prop_assert_eq!(create(&request).is_ok(), fits);
        }

        #[test]
        fn no_role_panics(role in ".{0,80}") {
            let _ = is_role(&role);
        }
    }
}
