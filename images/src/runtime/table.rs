//! The runtimes, as data: another one is another row.
//!
//! A row's packages come from a stable release of Debian, or from a wheel that is pinned to one file. Python 3.12 is in none of
//! them, and Python 3.14 in Debian's testing alone, whose packages are other ones every day.

use super::npm::{AWS_LAMBDA_RIC_3, AWS_LAMBDA_RIC_4, NpmPackage};
use super::wheels::{self, NODEJS22, NODEJS24, Wheel};
use crate::apt::Suite;

/// A runtime.
#[derive(Debug)]
pub(super) struct Row {
    /// As the Lambda API spells it: the image's name first, then others for the same image.
    pub(super) names: &'static [&'static str],
    /// What all packages of the image come from.
    pub(super) suite: Suite,
    pub(super) language: Language,
}

/// What runs a function.
#[derive(Debug)]
pub(super) enum Language {
    /// Itself.
    Own,
    Python(Python),
    Node(Node),
}

#[derive(Debug)]
pub(super) struct Python {
    /// As in the names of its package and its program: `3.11`.
    pub(super) version: &'static str,
    /// The Lambda client with what it depends on.
    pub(super) client: [Wheel; 3],
}

#[derive(Debug)]
pub(super) struct Node {
    /// As in the names of layers' folders: `node22`.
    pub(super) major: &'static str,
    /// The program with its headers, where they are not the suite's.
    pub(super) program: Option<Wheel>,
    /// The Lambda client.
    pub(super) client: NodeClient,
    /// Features that Lambda switches off unless `NODE_OPTIONS` switches them on (Lambda's guide, "Building Lambda functions
    /// with Node.js").
    pub(super) off: &'static [&'static str],
}

/// A client's package, and how it is started.
#[derive(Debug)]
pub(super) struct NodeClient {
    pub(super) package: NpmPackage,
    /// The folder in the package that has `index.mjs`, which looks for `rapid-client.node` beside it.
    pub(super) folder: &'static str,
    /// The program that starts it with the function's handler.
    pub(super) index: &'static str,
}

/// The last major version that takes handlers with a callback, as Lambda does up to Node.js 22.
const CLIENT_3: NodeClient = NodeClient {
    package: AWS_LAMBDA_RIC_3,
    folder: "dist",
    index: include_str!("recipe/thaw_index_3.mjs"),
};

/// For Node.js 24.
const CLIENT_4: NodeClient = NodeClient {
    package: AWS_LAMBDA_RIC_4,
    folder: "",
    index: include_str!("recipe/thaw_index_4.mjs"),
};

const TRIXIE: Suite = Suite::Debian("trixie");

pub(super) const ROWS: [Row; 7] = [
    Row {
        names: &["python3.11"],
        suite: Suite::Machine,
        language: Language::Python(Python {
            version: "3.11",
            client: wheels::CLIENT_FOR_PYTHON_3_11,
        }),
    },
    Row {
        names: &["python3.13"],
        suite: TRIXIE,
        language: Language::Python(Python {
            version: "3.13",
            client: wheels::CLIENT_FOR_PYTHON_3_13,
        }),
    },
    Row {
        names: &["nodejs18.x"],
        suite: Suite::Machine,
        language: Language::Node(Node {
            major: "18",
            program: None,
            client: CLIENT_3,
            off: &[],
        }),
    },
    Row {
        names: &["nodejs20.x"],
        suite: TRIXIE,
        language: Language::Node(Node {
            major: "20",
            program: None,
            client: CLIENT_3,
            off: &["require-module"],
        }),
    },
    Row {
        names: &["nodejs22.x"],
        suite: Suite::Machine,
        language: Language::Node(Node {
            major: "22",
            program: Some(NODEJS22),
            client: CLIENT_3,
            off: &["require-module", "detect-module"],
        }),
    },
    Row {
        names: &["nodejs24.x"],
        suite: Suite::Machine,
        language: Language::Node(Node {
            major: "24",
            program: Some(NODEJS24),
            client: CLIENT_4,
            off: &[],
        }),
    },
    Row {
        names: &["provided", "provided.al2", "provided.al2023"],
        suite: Suite::Machine,
        language: Language::Own,
    },
];
