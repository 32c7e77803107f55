//! Names of runtimes.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::table::{ROWS, Row};

/// A runtime that Thaw can make an image for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuntimeName(&'static str);

/// A name that no image has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown runtime {name:?}: there are {}", RuntimeName::served().collect::<Vec<_>>().join(", "))]
pub struct UnknownRuntime {
    /// The name.
    pub name: String,
}

impl RuntimeName {
    /// Runs any executable named `bootstrap`.
    pub const PROVIDED: Self = Self("provided");

    /// Those whose images are made before a gateway serves; another is made when a function first wants it.
    pub const AHEAD: [Self; 2] = [Self::PROVIDED, Self("python3.11")];

    /// Every runtime.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|row| Self(row.names[0]))
    }

    /// Every name that is understood, as the Lambda API spells it; several may mean the same image.
    pub fn served() -> impl Iterator<Item = &'static str> {
        ROWS.iter().flat_map(|row| row.names.iter().copied())
    }

    /// The name as the Lambda API spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.0
    }

    pub(super) fn row(self) -> &'static Row {
        let mut rows = ROWS.iter();
        rows.find(|row| row.names[0] == self.0)
            .expect("each name is a row's")
    }
}

impl fmt::Display for RuntimeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RuntimeName {
    type Err = UnknownRuntime;

    fn from_str(name: &str) -> Result<Self, UnknownRuntime> {
        let row = ROWS.iter().find(|row| row.names.contains(&name));
        row.map(|row| Self(row.names[0]))
            .ok_or_else(|| UnknownRuntime {
                name: name.to_owned(),
            })
    }
}

impl Serialize for RuntimeName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0)
    }
}

impl<'de> Deserialize<'de> for RuntimeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_versioned_provided_names_are_known() {
        for name in RuntimeName::all().chain(RuntimeName::AHEAD) {
            assert_eq!(name.to_string().parse(), Ok(name));
            assert_eq!(name.row().names[0], name.as_str());
        }
        assert_eq!("provided.al2023".parse(), Ok(RuntimeName::PROVIDED));
        let python: RuntimeName = "python3.13".parse().unwrap();
        let json = serde_json::to_string(&python).unwrap();
        assert_eq!(json, "\"python3.13\"");
        assert_eq!(serde_json::from_str::<RuntimeName>(&json).unwrap(), python);
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_exist() {
        let error = "cobol".parse::<RuntimeName>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown runtime \"cobol\": there are python3.11, python3.13, nodejs18.x, nodejs20.x, nodejs22.x, nodejs24.x, \
             provided, provided.al2, provided.al2023"
        );
    }
}
