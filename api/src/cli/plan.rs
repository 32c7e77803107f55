//! What a deployment would change: the function as the gateway has it against the function as it is wanted. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;
use thaw_api::network;
use thaw_api::record::{Code, Settings};
use thaw_api_types::lambda::{Cors, FunctionConfiguration, FunctionUrlConfig, FunctionUrlRequest};

use super::output;

/// The function as the gateway has it.
#[derive(Clone, Debug, Default)]
pub struct Current {
    /// Code and settings.
    pub configuration: FunctionConfiguration,
    /// Reserved concurrency.
    pub reserved: Option<i64>,
    /// Its URL's configuration, if it has one.
    pub url: Option<FunctionUrlConfig>,
}

/// The function as it is wanted.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Everything but the code.
    pub settings: &'a Settings,
    /// Its layers' ARNs.
    pub layers: &'a [String],
    /// The code.
    pub code: &'a Code,
    /// Reserved concurrency; `None` leaves it as it is.
    pub reserved: Option<u32>,
    /// The URL's configuration; `None` leaves it as it is.
    pub url: Option<&'a FunctionUrlRequest>,
}

/// One key that is new, changes or goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// As in thaw.toml.
    pub key: String,
    /// What it was, unless it is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// What it will be, unless it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
}

/// What a deployment does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The function is new.
    pub create: bool,
    /// In the order of thaw.toml.
    pub settings: Vec<Change>,
    /// At most one.
    pub code: Vec<Change>,
    /// At most one.
    pub reserved: Vec<Change>,
    /// The URL's keys.
    pub url: Vec<Change>,
    /// The newest deployment failed: it is done again even if nothing changes.
    pub again: bool,
}

impl Plan {
    /// All changes.
    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        [&self.code, &self.settings, &self.reserved, &self.url]
            .into_iter()
            .flatten()
    }

    /// Whether the function has to be frozen again.
    pub fn freezes(&self) -> bool {
        self.create || self.again || !self.settings.is_empty() || !self.code.is_empty()
    }

    /// For people, a line each.
    pub fn lines(&self) -> Vec<String> {
        let width = self.changes().map(|change| change.key.len()).max();
        let line = |change: &Change| {
            let text = match (&change.old, &change.new) {
                (None, Some(new)) => {
                    format!("+ {:width$}  {new}", change.key, width = width.unwrap_or(0))
                }
                (Some(old), None) => {
                    format!("- {:width$}  {old}", change.key, width = width.unwrap_or(0))
                }
                (old, new) => format!(
                    "~ {:width$}  {} → {}",
                    change.key,
                    old.as_deref().unwrap_or_default(),
                    new.as_deref().unwrap_or_default(),
                    width = width.unwrap_or(0)
                ),
            };
            format!("  {text}")
        };
        self.changes().map(line).collect()
    }
}

/// Compares.
pub fn compare(current: Option<&Current>, wanted: &Wanted<'_>) -> Plan {
    let known = current.map(|current| &current.configuration);
    let (old, new) = (known.map(of_configuration), of_settings(wanted.settings));
    let mut settings = differences(&old.unwrap_or_default(), &new);
    let layers = known.map(|known| known.layers.iter().map(|layer| layer.arn.clone()).collect());
    let layers: Option<Vec<String>> = layers;
    settings.extend(changed(
        "layers",
        listed(&layers.unwrap_or_default()),
        listed(wanted.layers),
    ));
    settings.extend(environment(known, wanted.settings));
    let code = known.map(|known| (known.code_size, known.code_sha256.as_str()));
    let code = changed(
        "code",
        code.map(told),
        Some(told((wanted.code.bytes, &wanted.code.sha256))),
    );
    let reserved = wanted.reserved.and_then(|wanted| {
        let old = current.and_then(|current| current.reserved);
        let old = old.map(|count| count.to_string());
        changed("reserved_concurrency", old, Some(wanted.to_string()))
    });
    let url = wanted.url.map(|wanted| {
        let old = current.and_then(|current| current.url.as_ref());
        differences(&old.map(of_url).unwrap_or_default(), &of_request(wanted))
    });
    Plan {
        create: current.is_none(),
        settings,
        code: code.into_iter().collect(),
        reserved: reserved.into_iter().collect(),
        url: url.unwrap_or_default(),
        again: known.is_some_and(failed),
    }
}

fn listed(arns: &[String]) -> Option<String> {
    (!arns.is_empty()).then(|| arns.join(", "))
}

fn failed(known: &FunctionConfiguration) -> bool {
    let is = |status: &Option<String>| status.as_deref() == Some("Failed");
    is(&known.state) || is(&known.last_update_status)
}

type Keys = Vec<(&'static str, String)>;

fn of_configuration(known: &FunctionConfiguration) -> Keys {
    let mut keys = vec![
        ("runtime", known.runtime.clone()),
        ("handler", known.handler.clone()),
        ("memory", format!("{} MiB", known.memory_size)),
        ("timeout", format!("{} s", known.timeout)),
        (
            "ephemeral_storage",
            format!("{} MiB", known.ephemeral_storage.size),
        ),
        (
            "snap_start",
            (known.snap_start.apply_on == "PublishedVersions").to_string(),
        ),
    ];
    keys.extend(known.thaw_network.as_ref().map(of_network));
    keys
}

fn of_network(shown: &Value) -> (&'static str, String) {
    ("network", shown.to_string())
}

fn of_settings(wanted: &Settings) -> Keys {
    let mut keys = vec![
        ("runtime", wanted.runtime.clone()),
        ("handler", wanted.handler.clone()),
        ("memory", format!("{} MiB", wanted.memory_mib)),
        ("timeout", format!("{} s", wanted.timeout_seconds)),
        ("ephemeral_storage", format!("{} MiB", wanted.ephemeral_mib)),
        ("snap_start", wanted.snap_start.to_string()),
    ];
    keys.extend((wanted.network.as_ref()).map(|policy| of_network(&network::shown(policy))));
    keys
}

fn of_url(url: &FunctionUrlConfig) -> Keys {
    url_keys(&url.auth_type, &url.invoke_mode, url.cors.as_ref())
}

fn of_request(url: &FunctionUrlRequest) -> Keys {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    url_keys(
        &text(&url.auth_type),
        &text(&url.invoke_mode),
        url.cors.as_ref(),
    )
}

fn url_keys(auth: &str, mode: &str, cors: Option<&Cors>) -> Keys {
    let mut keys = vec![
        (
            "url.auth",
            if auth == "AWS_IAM" { "iam" } else { "none" }.to_owned(),
        ),
        ("url.streaming", (mode == "RESPONSE_STREAM").to_string()),
    ];
    let Some(cors) = cors else { return keys };
    for (key, list) in [
        ("url.allow_origins", &cors.allow_origins),
        ("url.allow_methods", &cors.allow_methods),
        ("url.allow_headers", &cors.allow_headers),
    ] {
        let list = list.iter().flatten().map(String::as_str);
        let text = list.collect::<Vec<_>>().join(", ");
        if !text.is_empty() {
            keys.push((key, text));
        }
    }
    keys
}

fn differences(old: &Keys, new: &Keys) -> Vec<Change> {
    let value = |keys: &Keys, wanted: &str| {
        let found = keys.iter().find(|(key, _)| *key == wanted);
        found.map(|(_, value)| value.clone())
    };
    let gone = old.iter().filter(|(key, _)| value(new, key).is_none());
    let all = new.iter().chain(gone).map(|(key, _)| *key);
    all.filter_map(|key| changed(key, value(old, key), value(new, key)))
        .collect()
}

/// Variables may hold secrets, and what is printed is kept in logs of builds: their values are not told.
fn environment(known: Option<&FunctionConfiguration>, wanted: &Settings) -> Vec<Change> {
    let empty = BTreeMap::new();
    let old = known.and_then(|known| known.environment.as_ref());
    let old = old.map_or(&empty, |environment| &environment.variables);
    let new = wanted.environment.as_ref().unwrap_or(&empty);
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let change = |name: &String| {
        let (was, is) = (old.get(name), new.get(name));
        (was != is).then(|| Change {
            key: format!("environment.{name}"),
            old: was.map(|_| "(a value)".to_owned()),
            new: is.map(|_| {
                if was.is_some() {
                    "(another)"
                } else {
                    "(a value)"
                }
                .to_owned()
            }),
        })
    };
    names.into_iter().filter_map(change).collect()
}

fn changed(key: &str, old: Option<String>, new: Option<String>) -> Option<Change> {
    let key = key.to_owned();
    (old != new).then_some(Change { key, old, new })
}

/// Code for people: its size, and the hash's beginning.
fn told((bytes, sha256): (u64, &str)) -> String {
    let hash: String = sha256.chars().take(10).collect();
    format!("{} ({hash}…)", output::bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_api_types::lambda::Environment;

    fn settings() -> Settings {
        super::super::deploy::Settings::default().record(std::path::Path::new("."))
    }

    fn code(sha256: &str) -> Code {
        Code {
            bytes: 2048,
            sha256: sha256.to_owned(),
            unzipped_bytes: 4096,
        }
    }

    fn known() -> Current {
        let settings = settings();
        let configuration = FunctionConfiguration {
            runtime: settings.runtime,
            handler: settings.handler,
            memory_size: settings.memory_mib,
            timeout: settings.timeout_seconds,
            code_size: 2048,
            code_sha256: "same".into(),
            ..FunctionConfiguration::default()
        };
        Current {
            configuration,
            ..Current::default()
        }
    }

    fn wanted<'a>(settings: &'a Settings, code: &'a Code) -> Wanted<'a> {
        Wanted {
            settings,
            layers: &[],
            code,
            reserved: None,
            url: None,
        }
    }

    #[test]
    fn the_same_function_does_not_change() {
        let plan = compare(Some(&known()), &wanted(&settings(), &code("same")));
        assert_eq!(plan, Plan::default());
        assert!(!plan.freezes());
    }

    #[test]
    fn layers_that_come_and_go_are_told() {
        let (settings, code) = (settings(), code("same"));
        let arns = ["arn:1".to_owned(), "arn:2".to_owned()];
        let layered = Wanted {
            layers: &arns,
            ..wanted(&settings, &code)
        };
        let plan = compare(Some(&known()), &layered);
        assert!(plan.freezes());
        assert_eq!(plan.lines(), ["  + layers  arn:1, arn:2"]);
    }

    #[test]
    fn changes_are_told_old_and_new_and_secrets_are_not() {
        let (mut current, mut settings) = (known(), settings());
        let variables = [("KEEP", "1"), ("TOKEN", "old-secret"), ("GONE", "x")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        current.configuration.environment = Some(Environment {
            variables: variables.into(),
        });
        let variables = [("KEEP", "1"), ("TOKEN", "new-secret"), ("FRESH", "y")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        settings.environment = Some(variables.into());
        settings.memory_mib = 256;
        let plan = compare(Some(&current), &wanted(&settings, &code("other")));
        assert!(plan.freezes() && !plan.create);
        let text = plan.lines().join("\n");
        for line in [
            "~ code               2 KiB (same…) → 2 KiB (other…)",
            "~ memory             128 MiB → 256 MiB",
            "+ environment.FRESH  (a value)",
            "- environment.GONE   (a value)",
            "~ environment.TOKEN  (a value) → (another)",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert_eq!(plan.changes().count(), 5, "{text}");
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn a_new_function_is_new_in_every_key_and_a_failed_one_is_tried_again() {
        let (settings, code) = (settings(), code("same"));
        let plan = compare(None, &wanted(&settings, &code));
        assert!(plan.create && plan.changes().all(|change| change.old.is_none()));
        let mut failed = known();
        failed.configuration.last_update_status = Some("Failed".into());
        let plan = compare(Some(&failed), &wanted(&settings, &code));
        assert!(plan.freezes() && plan.changes().next().is_none());
    }

    #[test]
    fn url_and_concurrency_change_without_a_new_snapshot_and_stay_where_not_named() {
        let (settings, code) = (settings(), code("same"));
        let mut current = known();
        current.reserved = Some(3);
        current.url = Some(FunctionUrlConfig {
            auth_type: "NONE".into(),
            invoke_mode: "BUFFERED".into(),
            cors: Some(Cors {
                allow_origins: Some(vec!["https://a.example".into()]),
                ..Cors::default()
            }),
            ..FunctionUrlConfig::default()
        });
        let plan = compare(Some(&current), &wanted(&settings, &code));
        assert_eq!(plan, Plan::default());
        let request = FunctionUrlRequest {
            auth_type: Some("AWS_IAM".into()),
            invoke_mode: Some("BUFFERED".into()),
            cors: Some(Cors::default()),
        };
        let named = Wanted {
            reserved: Some(5),
            url: Some(&request),
            ..wanted(&settings, &code)
        };
        let plan = compare(Some(&current), &named);
        assert!(!plan.freezes());
        let told: Vec<_> = plan.changes().map(|change| change.key.as_str()).collect();
        assert_eq!(
            told,
            ["reserved_concurrency", "url.auth", "url.allow_origins"]
        );
    }
}
