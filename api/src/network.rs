//! What functions may reach, as requests ask for it and as answers tell it. AWS has no such setting: `ThawNetwork` in CreateFunction and
//! UpdateFunctionConfiguration, which other clients neither send nor see. Pure.

use serde_json::{Value, json};
use thaw_runtime::NetworkPolicy;

use crate::auth::sigv4::hex_digest;

/// A request's setting; `None` for one that opens nothing, which is what a function has that has none: no network device.
///
/// # Errors
/// Why it is refused, for people.
pub fn parse(setting: &Value) -> Result<Option<NetworkPolicy>, String> {
    if !setting.is_object() {
        return Err("a table like {\"allow\": [\"internet\"]} is expected".into());
    }
    let policy: NetworkPolicy =
        serde_json::from_value(setting.clone()).map_err(|e| e.to_string())?;
    policy.check().map_err(|error| error.to_string())?;
    let opens_nothing = policy.allow.is_empty() && policy.secrets.is_empty();
    Ok(Some(policy).filter(|_| !opens_nothing))
}

/// How an answer tells it: a secret's value is a digest, by which a client that knows it sees whether it changes.
#[must_use]
pub fn shown(policy: &NetworkPolicy) -> Value {
    let mut shown = json!(policy);
    if let Some(secrets) = shown["secrets"].as_array_mut() {
        for secret in secrets {
            let value = secret["value"].as_str().unwrap_or_default();
            secret["value"] = json!(format!("sha256:{}", hex_digest(value.as_bytes())));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_opens_nothing_is_no_network() {
        assert_eq!(parse(&json!({})), Ok(None));
        assert_eq!(parse(&json!({ "connections_max": 3 })), Ok(None));
        assert!(parse(&json!({ "allow": ["internet"] })).is_ok_and(|policy| policy.is_some()));
    }

    #[test]
    fn what_is_refused_is_named() {
        for (setting, named) in [
            (json!({ "alow": [] }), "alow"),
            (json!({ "allow": ["everything"] }), "everything"),
            (
                json!({ "allow": [{ "cidr": "10.0.0.0/99" }] }),
                "10.0.0.0/99",
            ),
            (
                json!({ "allow": ["internet"], "connections_max": 0 }),
                "connections_max",
            ),
            (json!("internet"), "a table"),
        ] {
            let why = parse(&setting).expect_err("refused");
            assert!(why.contains(named), "{why}");
        }
    }

    #[test]
    fn no_answer_tells_a_secret() {
        let secret =
            json!({ "host": "api.example.com", "header": "authorization", "value": "Bearer hush" });
        let policy = parse(&json!({ "secrets": [secret] }))
            .expect("valid")
            .expect("some");
        let told = shown(&policy).to_string();
        assert!(!told.contains("hush"), "{told}");
        assert!(told.contains("sha256:"), "{told}");
        assert_ne!(told, json!(policy).to_string());
    }
}
