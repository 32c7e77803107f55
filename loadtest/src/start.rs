//! How the sandbox that answered was started. Figures of different kinds are never mixed.

use serde::Serialize;

/// The value of the answer's `x-thaw-start` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StartKind {
    /// A monitor process was started for this request.
    Cold,
    /// A shell that stood ready was given the snapshot.
    Claimed,
    /// A used sandbox was put back to its snapshot.
    Rewound,
    /// A used sandbox was used again as it was.
    Warm,
    /// The server did not say, or said something that this program does not know.
    Untold,
}

impl StartKind {
    /// From the header's value.
    pub fn told(value: Option<&[u8]>) -> Self {
        match value {
            Some(b"cold") => Self::Cold,
            Some(b"claimed") => Self::Claimed,
            Some(b"rewound") => Self::Rewound,
            Some(b"warm") => Self::Warm,
            _ => Self::Untold,
        }
    }

    /// As the header has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Claimed => "claimed",
            Self::Rewound => "rewound",
            Self::Warm => "warm",
            Self::Untold => "untold",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told_by_its_name_and_strangers_are_untold() {
        for kind in [
            StartKind::Cold,
            StartKind::Claimed,
            StartKind::Rewound,
            StartKind::Warm,
        ] {
            assert_eq!(StartKind::told(Some(kind.name().as_bytes())), kind);
        }
        assert_eq!(StartKind::told(Some(b"lukewarm")), StartKind::Untold);
        assert_eq!(StartKind::told(None), StartKind::Untold);
    }
}
