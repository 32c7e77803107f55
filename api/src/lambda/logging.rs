//! `LoggingConfig` of functions: the group's name that the function is told, and whether its log is text or JSON. Pure.

use thaw_api_types::lambda::LoggingConfigRequest;

use super::errors::{ApiError, violation};
use crate::record::{LogLevels, Logging};

const GROUP_CHARS_MAX: usize = 512;
const FORMATS: [&str; 2] = ["JSON", "Text"];
const APPLICATION_LEVELS: [&str; 6] = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"];
const SYSTEM_LEVELS: [&str; 3] = ["DEBUG", "INFO", "WARN"];

/// What the model does not allow.
pub(super) fn check(request: &LoggingConfigRequest, violations: &mut Vec<String>) {
    for (member, value, known) in [
        ("logFormat", &request.log_format, FORMATS.as_slice()),
        (
            "applicationLogLevel",
            &request.application_log_level,
            &APPLICATION_LEVELS,
        ),
        ("systemLogLevel", &request.system_log_level, &SYSTEM_LEVELS),
    ] {
        if let Some(value) = value
            .as_ref()
            .filter(|value| !known.contains(&value.as_str()))
        {
            let constraint = format!("Member must satisfy enum value set: [{}]", known.join(", "));
            let member = format!("loggingConfig.{member}");
            violations.push(violation(value, &member, &constraint));
        }
    }
    if let Some(group) = &request.log_group {
        let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/#".contains(&byte);
        let constraint = if group.is_empty() {
            "Member must have length greater than or equal to 1"
        } else if group.len() > GROUP_CHARS_MAX {
            "Member must have length less than or equal to 512"
        } else if !group.bytes().all(is_fit) {
            r"Member must satisfy regular expression pattern: [\.\-_/#A-Za-z0-9]+"
        } else {
            return;
        };
        violations.push(violation(group, "loggingConfig.logGroup", constraint));
    }
}

/// Lays what a request names over what there is. Levels are of JSON alone.
///
/// # Errors
/// Levels of a log that is text.
pub(super) fn merge(
    current: Logging,
    request: Option<&LoggingConfigRequest>,
) -> Result<Logging, ApiError> {
    let Some(request) = request else {
        return Ok(current);
    };
    let group = request.log_group.clone().or(current.group);
    let is_json = match request.log_format.as_deref() {
        Some(format) => format == "JSON",
        None => current.json.is_some(),
    };
    if !is_json {
        if request.application_log_level.is_some() || request.system_log_level.is_some() {
            return Err(ApiError::invalid_parameter(
                "LogLevel is not supported when LogFormat is set to \"Text\". Remove LogLevel from your request or change the LogFormat to \"JSON\" and try again.",
            ));
        }
        return Ok(Logging { group, json: None });
    }
    let levels = current.json.unwrap_or_default();
    let given = |level: &Option<String>, current| level.clone().unwrap_or(current);
    Ok(Logging {
        group,
        json: Some(LogLevels {
            application: given(&request.application_log_level, levels.application),
            system: given(&request.system_log_level, levels.system),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> LoggingConfigRequest {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn levels_come_and_go_with_json() {
        let json = request(r#"{"LogFormat":"JSON","SystemLogLevel":"WARN"}"#);
        let logging = merge(Logging::default(), Some(&json)).unwrap();
        let levels = logging.json.clone().unwrap();
        assert_eq!(
            (levels.application.as_str(), levels.system.as_str()),
            ("INFO", "WARN")
        );
        let group = request(r#"{"LogGroup":"g"}"#);
        let logging = merge(logging, Some(&group)).unwrap();
        assert_eq!(logging.group_of("f"), "g");
        assert_eq!(logging.json, Some(levels));
        let text = merge(
            Logging::default(),
            Some(&request(r#"{"LogFormat":"Text"}"#)),
        )
        .unwrap();
        assert_eq!(text.group_of("f"), "/aws/lambda/f");
        assert_eq!(text.json, None);
        let refused = request(r#"{"ApplicationLogLevel":"INFO"}"#);
        let error = merge(Logging::default(), Some(&refused)).unwrap_err();
        assert!(error.message.starts_with("LogLevel is not supported"));
    }

    #[test]
    fn members_have_the_models_values() {
        let wrong = request(
            r#"{"LogFormat":"XML","ApplicationLogLevel":"info","SystemLogLevel":"ERROR","LogGroup":"a b"}"#,
        );
        let mut violations = Vec::new();
        check(&wrong, &mut violations);
        assert_eq!(violations.len(), 4, "{violations:?}");
    }
}
