//! Host names, normalised, and patterns of them.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest name, bytes (RFC 1035, 2.3.4, without the root's dot).
const NAME_BYTES_MAX: usize = 253;
/// Longest label, bytes.
const LABEL_BYTES_MAX: usize = 63;

/// What is no host name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no host name: labels of a-z, 0-9, '-' and '_' with dots between, at most 253 bytes; other alphabets as punycode"
)]
pub struct NameError(String);

/// A host name: lower case, no dot at its end, no address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    /// Normalises `text`: case and one dot at the end do not count.
    ///
    /// # Errors
    /// It is no host name. An IPv4 address is none: its last label is a number (RFC 1123, 2.1).
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        let label_fits = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let numeric = name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if name.len() > NAME_BYTES_MAX || numeric || !name.split('.').all(label_fits) {
            // As much as a message should hold.
            return Err(NameError(text.chars().take(NAME_BYTES_MAX).collect()));
        }
        Ok(Self(name.to_ascii_lowercase()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DomainName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<DomainName> for String {
    fn from(name: DomainName) -> Self {
        name.0
    }
}

/// `api.example.com`: that name. `*.example.com`: every name below `example.com`, at any depth, not itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainPattern {
    name: DomainName,
    below: bool,
}

impl DomainPattern {
    /// A pattern from its text.
    ///
    /// # Errors
    /// What is left without `*.` at the start is no host name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (name, below) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        Ok(Self {
            name: DomainName::parse(name)?,
            below,
        })
    }

    /// Whether `name` is one of them.
    pub fn matches(&self, name: &DomainName) -> bool {
        if !self.below {
            return *name == self.name;
        }
        name.as_str()
            .strip_suffix(self.name.as_str())
            .is_some_and(|rest| rest.ends_with('.'))
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.below { "*." } else { "" };
        write!(f, "{star}{}", self.name)
    }
}

impl TryFrom<String> for DomainPattern {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<DomainPattern> for String {
    fn from(pattern: DomainPattern) -> Self {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap()
    }

    #[test]
    fn case_and_the_last_dot_do_not_count() {
        assert_eq!(name("API.Example.com."), name("api.example.com"));
    }

    #[test]
    fn what_is_no_host_name_is_refused() {
        let long = "a.".repeat(127) + "a";
        for text in [
            "", ".", "..", "a..b", ".a", "a b", "a/b", "ä.de", "*.a.b", "a:80", "1.2.3.4", "a.1",
            "*",
        ] {
            assert!(DomainName::parse(text).is_err(), "{text:?}");
        }
        assert!(DomainName::parse(&"a".repeat(64)).is_err());
        assert!(DomainName::parse(&long).is_err());
        assert!(DomainName::parse(&long[2..]).is_ok());
    }

    #[test]
    fn a_star_matches_what_is_below_and_nothing_that_only_ends_alike() {
        let pattern = DomainPattern::parse("*.example.com").unwrap();
        assert!(
            pattern.matches(&name("a.example.com")) && pattern.matches(&name("a.b.example.com"))
        );
        for other in [
            "example.com",
            "aexample.com",
            "a.example.com.evil.org",
            "com",
        ] {
            assert!(!pattern.matches(&name(other)), "{other}");
        }
        let exact = DomainPattern::parse("example.com").unwrap();
        assert!(exact.matches(&name("EXAMPLE.com.")) && !exact.matches(&name("a.example.com")));
        for text in ["*", "*.", "*.*.com", "a.*.com", "*a.com", "*."] {
            assert!(DomainPattern::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]
        #[test]
        fn any_text_is_a_name_or_refused_and_a_name_stays_itself(text in "[a-zA-Z0-9_.*: -]{0,80}|\\PC{0,40}") {
            if let Ok(name) = DomainName::parse(&text) {
                prop_assert_eq!(DomainName::parse(name.as_str()), Ok(name.clone()));
                let child = DomainName::parse(&format!("x.{name}"));
                if let Ok(child) = child {
                    let below = DomainPattern::parse(&format!("*.{name}")).unwrap();
                    prop_assert!(below.matches(&child) && !below.matches(&name));
                }
            }
            if let Ok(pattern) = DomainPattern::parse(&text) {
                prop_assert_eq!(DomainPattern::parse(&pattern.to_string()), Ok(pattern));
            }
        }
    }
}
