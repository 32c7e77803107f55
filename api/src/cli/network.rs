//! `[network]` of thaw.toml: what a function may reach.

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use thaw_api::network;
use thaw_runtime::NetworkPolicy;

/// `[network]`. Without it a function reaches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkTable {
    /// `"internet"`, names (`"api.example.com"`, `"*.example.com"`), addresses and ranges (`"10.1.0.0/16"`); each may end with `:PORT`.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Bytes a second, each way.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Connections at once.
    pub connections_max: Option<u32>,
    /// Headers that requests get on their way out of the machine.
    #[serde(default)]
    pub secrets: Vec<SecretTable>,
}

/// `[[network.secrets]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretTable {
    /// The function asks it by `https://` or `http://`; it is asked by `https://`.
    pub host: String,
    /// Name of the header.
    pub header: String,
    /// The environment variable of who deploys that has the header's value.
    pub environment: String,
}

impl NetworkTable {
    /// As the gateway takes it; `variable` is the deployer's environment.
    ///
    /// # Errors
    /// What the gateway would refuse, or a variable that is not set.
    pub fn policy(
        &self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<NetworkPolicy>> {
        let mut setting = Map::new();
        setting.insert(
            "allow".into(),
            self.allow.iter().map(|text| rule(text)).collect(),
        );
        if let Some(rate) = self.bandwidth_bytes_per_second {
            setting.insert("bandwidth_bytes_per_second".into(), json!(rate));
        }
        if let Some(most) = self.connections_max {
            setting.insert("connections_max".into(), json!(most));
        }
        let secrets = self.secrets.iter().map(|secret| {
            let name = &secret.environment;
            let value = variable(name).with_context(|| {
                format!("the secret for {} is to be in {name}, which is not set", secret.host)
            })?;
            ensure!(!value.is_empty(), "the secret for {} in {name} is empty", secret.host);
            Ok(json!({ "host": secret.host, "header": secret.header.to_lowercase(), "value": value }))
        });
        let secrets = secrets.collect::<anyhow::Result<Vec<Value>>>()?;
        setting.insert("secrets".into(), secrets.into());
        network::parse(&Value::Object(setting))
            .map_err(anyhow::Error::msg)
            .context("[network] of thaw.toml")
    }
}

/// A rule as the gateway takes it. What is no address and no range is a name, of which the gateway says if it is none.
fn rule(text: &str) -> Value {
    if text == "internet" {
        return json!(text);
    }
    let port = text
        .rsplit_once(':')
        .and_then(|(target, port)| Some((target, port.parse::<u16>().ok()?)));
    let (target, ports) = match port {
        Some((target, port)) => (target, vec![port]),
        None => (text, Vec::new()),
    };
    let is_address = target.parse::<std::net::Ipv4Addr>().is_ok();
    match target {
        address if is_address => json!({ "cidr": format!("{address}/32"), "ports": ports }),
        range if range.contains('/') => json!({ "cidr": range, "ports": ports }),
        name => json!({ "domain": name, "ports": ports }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> NetworkTable {
        toml::from_str(text).expect("a table")
    }

    #[test]
    fn rules_are_names_ranges_addresses_and_the_internet_with_or_without_a_port() {
        let table =
            table(r#"allow = ["internet", "*.example.com:443", "10.1.0.0/16", "192.0.2.7:5432"]"#);
        let policy = table.policy(|_| None).expect("valid").expect("some");
        let rules = json!(policy)["allow"].clone();
        assert_eq!(
            rules,
            json!([
                "internet",
                { "domain": "*.example.com", "ports": [443] },
                { "cidr": "10.1.0.0/16" },
                { "cidr": "192.0.2.7/32", "ports": [5432] },
            ])
        );
    }

    #[test]
    fn a_secret_comes_out_of_the_deployers_environment() {
        let table = table(
            "[[secrets]]\nhost = \"api.example.com\"\nheader = \"Authorization\"\nenvironment = \"TOKEN\"",
        );
        let policy = table.policy(|name| (name == "TOKEN").then(|| "Bearer x".into()));
        let policy = policy.expect("valid").expect("some");
        assert_eq!(policy.secrets[0].value, "Bearer x");
        let missing = format!("{:#}", table.policy(|_| None).expect_err("not set"));
        assert!(missing.contains("TOKEN, which is not set"), "{missing}");
    }

    #[test]
    fn a_rule_that_is_nothing_is_named() {
        let wrong = table(r#"allow = ["not a name"]"#).policy(|_| None);
        let wrong = format!("{:#}", wrong.expect_err("refused"));
        assert!(wrong.contains("not a name"), "{wrong}");
        assert_eq!(table("").policy(|_| None).expect("valid"), None);
    }
}
